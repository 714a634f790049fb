"""The report where people look: its path after a run, and `d2m report --serve`."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from http.client import HTTPConnection
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit

import pytest
from kit import STATS, submit, write_config, write_shards

import d2m_hpc as d2m
from d2m_hpc.errors import ConfigError, D2MError
from d2m_hpc.watch import serve
from d2m_hpc.watch.serve import ReportServer


@pytest.fixture
def config(tmp_path: Path) -> Path:
    write_shards(tmp_path / "tars", 2, samples=3)
    common = {"input_tars": str(tmp_path / "tars" / "*.tar")}
    return write_config(
        tmp_path / "c.yml", {**STATS, **common, "output_metadata_dir": str(tmp_path / "out")}
    )


def asked(
    url: str, path: str | None = None, method: str = "GET"
) -> tuple[int, dict[str, str], str]:
    """Status, headers and body of an answer."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    connection = HTTPConnection(parts.hostname, parts.port, timeout=30)
    connection.request(method, parts.path if path is None else path)
    answer = connection.getresponse()
    body = answer.read().decode()
    connection.close()
    return answer.status, dict(answer.getheaders()), body


def test_the_report_is_written_and_named_at_the_end(config: Path) -> None:
    environment = {**os.environ, "D2M_REPORT": "true"}
    for _ in range(2):  # the second finds nothing left to do
        ended = submit(config, env=environment)
        assert ended.returncode == 0, ended.stderr
        path = config.parent / "out" / ".d2m" / "report.html"
        assert f"report: {path}" in ended.stdout.replace("\n", "")
        assert "<!doctype html>" in path.read_text().lower()
        path.unlink()
    assert "report: " not in submit(config, "--no-report", env=environment).stdout
    path.mkdir()  # what stands in its way is told, and the run is as it is
    ended = submit(config, env=environment)
    assert ended.returncode == 0
    assert "no report is written" in ended.stdout


def test_the_page_is_served_and_nothing_else(config: Path, tmp_path: Path) -> None:
    assert submit(config, "--set", f"input_tars={tmp_path}/tars/00000.tar").returncode == 0
    run = d2m.open(config)
    with run.serve(samples=1) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            assert server.url.startswith("http://127.0.0.1:")
            status, headers, body = asked(server.url)
            assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
            assert "<!doctype html>" in body.lower()
            assert "Refresh" not in headers  # it is complete
            assert asked(server.url, method="HEAD")[::2] == (200, "")
            secret = urlsplit(server.url).path
            others = (
                "/",
                "/favicon.ico",
                f"{secret}x",
                f"{secret}../shards.parquet",
                "//etc/passwd",
            )
            for path in (*others, f"{secret}?a", "/%2e%2e/out/00000.parquet"):
                assert asked(server.url, path)[0] == 404
            assert asked(server.url, method="POST")[0] == 501
        finally:
            server.shutdown()
            thread.join()


def test_it_is_made_anew_until_the_run_is_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = iter([(b"one", False), (b"two", True)])

    def page() -> tuple[bytes, bool]:
        try:
            return next(pages)
        except StopIteration:
            raise D2MError("out/x.parquet cannot be read") from None

    now = [100.0]
    monkeypatch.setattr(serve.time, "monotonic", lambda: now[0])
    with ReportServer(page) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            for _ in range(2):
                status, headers, body = asked(server.url)
                assert (body, headers["Refresh"]) == ("one", str(serve.REFRESH))
            now[0] += serve.FRESH + 1
            status, headers, body = asked(server.url)
            assert body == "two"
            assert "Refresh" not in headers
            now[0] += serve.FRESH + 1
            status, headers, body = asked(server.url)
            assert (status, body) == (500, "out/x.parquet cannot be read")
            assert headers["Content-Type"] == "text/plain; charset=utf-8"
        finally:
            server.shutdown()
            thread.join()


def test_the_command_says_where_and_how_to_reach_it(config: Path) -> None:
    assert submit(config).returncode == 0
    command = [sys.executable, "-m", "d2m_hpc", "report", "--serve", str(config)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as served:
        assert served.stdout is not None
        first, second = served.stdout.readline(), served.stdout.readline()
        found = re.match(r"(http://127\.0\.0\.1:(\d+)/\S+/) \(Ctrl-C ends it\)", first)
        assert found, first
        assert f"ssh -L {found[2]}:127.0.0.1:{found[2]} " in second
        assert asked(found[1])[0] == 200
        served.send_signal(signal.SIGINT)
        assert served.wait(60) == 0


def test_what_cannot_be_served_is_told(config: Path) -> None:
    assert submit(config).returncode == 0
    run = d2m.open(config)
    with ReportServer(lambda: (b"", True)) as server:
        taken = server.server_address[1]
        for port in (taken, 99999):
            with pytest.raises(ConfigError, match="take another --port"):
                run.serve(port=port, score="none")  # before the page is made, which takes seconds
    for host in ("192.0.2.1", "no.such.invalid", "::1", "x" * 70):
        with pytest.raises(ConfigError, match=r"as --host$"):
            run.serve(host=host, score="none")
    with pytest.raises(ConfigError, match="no column 'none'"):
        run.serve(score="none")
