"""A task asks nobody: compute nodes have no internet, and waiting for it costs hours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from kit import DATACOMP, write_config, write_shards

RUN = """
import json, socket, sys

asked, offline = [], []

def hook(event, arguments):
    if event == "open" and str(arguments[0]).endswith(".npz"):  # written once the models have run
        offline.append(sys.modules["huggingface_hub.constants"].HF_HUB_OFFLINE)
    if event not in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
        return
    address = arguments[1] if event == "socket.connect" else arguments[0]
    host = address[0] if isinstance(address, tuple) else address
    if event == "socket.connect" and isinstance(address, (str, bytes)):
        return  # a file of this machine
    if host not in ("127.0.0.1", "::1", "localhost", None, ""):
        asked.append(str(host))
        raise OSError(f"there is no internet here, and {host} was asked for")

sys.addaudithook(hook)

import d2m_hpc.worker.__main__
import d2m_hpc.worker.task
early = [name for name in ("huggingface_hub", "transformers") if name in sys.modules]

from d2m_hpc.cli.commands import app
app(["submit", sys.argv[1], "--local"], standalone_mode=False)

during = list(asked)
try:
    socket.create_connection(("weights.invalid", 80))
except OSError:
    pass
told = {"early": early, "offline": {*offline} == {True}, "during": during, "after": asked}
print(json.dumps(told), file=sys.stderr)
"""


def test_the_whole_datacomp_workload_asks_nobody(checkpoints: Path, tmp_path: Path) -> None:
    """Not the hub, which detoxify's own loader asks; refused connections are noticed, too."""
    config = write_config(
        tmp_path / "c.yml",
        DATACOMP,
        input_tars=str(write_shards(tmp_path / "tars", 1, samples=2)[0]),
        additional_fields=[],
        output_metadata_dir=str(tmp_path / "out"),
        weights_dir=str(checkpoints),
        allow_unpublished_weights=True,
    )
    switches = ("HF_", "TRANSFORMERS_", "HUGGINGFACE_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(switches)}
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(config)],
        env={**environment, "HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stderr.splitlines()[-1])
    assert told == {"early": [], "offline": True, "during": [], "after": ["weights.invalid"]}
    assert (tmp_path / "out" / "00000.parquet").exists()
