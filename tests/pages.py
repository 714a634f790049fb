"""The pages of the documentation: their fenced blocks and links, and how their commands are run.

A page is run as a reader would: its blocks in order, in one bash, in a folder with the kit's tars
and copies of the configs. By the words after the three backticks a block is:

    bash          run, `set -euo pipefail`
    bash slurm    run on the devcluster, by tests/slurm/test_docs.py
    python        run, as a script of its own
    X FILE        written to FILE, and not run
    yaml          part of a config; its keys must be a config's
    text, json    only shown
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote

import yaml
from kit import SHARDS
from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
RUN, SHOWN = ("bash", "python"), ("text", "json", "yaml")
INFOS = ("bash slurm", *RUN, *SHOWN)

TARS = ("00000", "00001", "odd")
"""Of the golden kit; `odd` is the third, by the name that its place gives it."""
BY_CI = {"scripts/demo": ".ci/run", "scripts/test": ".ci/run", "pip install .": "scripts/env.sh"}
"""Commands that CI runs itself, before any test, and the files that do so."""
SECONDS = 300


@dataclass(frozen=True)
class Block:
    """A fenced block: the words after its backticks, its text, the line that it begins at."""

    info: str
    text: str
    line: int

    @property
    def kind(self) -> str:
        return self.info.split()[0] if self.info else ""

    @property
    def is_for_slurm(self) -> bool:
        return self.info == "bash slurm"

    @property
    def file(self) -> str:
        """Where the text goes; empty for a block that is run, or only shown."""
        words = self.info.split()
        return words[1] if len(words) == 2 and not self.is_for_slurm else ""


@cache
def _tokens(page: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))


def blocks(page: Path) -> list[Block]:
    """All fenced blocks, and as blocks without a kind those that are only indented."""
    return [
        Block(token.info.strip(), token.content, (token.map or [0])[0] + 1)
        for token in _tokens(page)
        if token.type in ("fence", "code_block")
    ]


def links(page: Path) -> list[str]:
    """Where the page's links and pictures lead."""
    inline = (child for token in _tokens(page) for child in token.children or ())
    found = (child.attrGet("href") or child.attrGet("src") for child in inline)
    return [unquote(str(link)) for link in found if link]


def anchors(page: Path) -> set[str]:
    """The headings' anchors, as GitHub makes them: lower case, spaces to dashes, no punctuation."""
    tokens = _tokens(page)
    titles = (b.content for a, b in pairwise(tokens) if a.type == "heading_open")
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def script(page: Path, folder: Path, slurm: bool = False) -> str:
    """The page's commands as one bash script; writes what they need beside it in `folder`.

    Each block says where it stands before it is run, so that a failure tells its own place.
    """
    lines = ["set -euo pipefail"]
    for block in blocks(page):
        if block.file or (block.kind in RUN and block.is_for_slurm == slurm):
            lines += [f'echo "--- {page.name}, line {block.line}" >&2', _commands(block, folder)]
    return "\n".join(lines) + "\n"


def _commands(block: Block, folder: Path) -> str:
    if block.kind == "bash" and not block.file:
        return "\n".join(line for line in block.text.splitlines() if command(line) not in BY_CI)
    folder.mkdir(exist_ok=True)
    kept = folder / f"block-{block.line}"
    kept.write_text(block.text, encoding="utf-8")
    if block.file:
        return f"mkdir -p $(dirname {block.file}) && cp {kept} {block.file}"
    return f"python {kept}"


def command(line: str) -> str:
    """Without its comment."""
    return line.partition(" #")[0].strip()


NETS = ("README", "models")
"""Pages on which the quickstart runs with all of its nets."""


def make_world(folder: Path, page: str) -> Path:
    """The folder that a page is run in: `configs/`, `demo/tars/`, and the checkout's `slurm/`.

    Most pages submit the quickstart again and again, and are about other things than its nets,
    which take ten seconds of CPU each time: there it has its statistics alone.
    """
    (folder / "demo" / "tars").mkdir(parents=True)
    for number, stem in enumerate(TARS):
        shutil.copy(SHARDS / f"{stem}.tar", folder / "demo" / "tars" / f"{number:05d}.tar")
    shutil.copytree(ROOT / "configs", folder / "configs")
    for path in (folder / "configs").rglob("*.yml"):
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        # Large nets take a second a sample here: the tar with the fewest.
        small = path.stem == "datacomp" or path.parent.name == "recipes"
        values["input_tars"] = "demo/tars/00002.tar" if small else "demo/tars/{00000..00002}.tar"
        values["allow_unpublished_weights"] = True
        if path.stem == "quickstart" and page not in NETS:
            values |= {"models": ["image-stats", "text-stats"]}
            for outputs in ("postprocess_columns", "postprocess_features"):
                values[outputs] = [n for n in values[outputs] if n.startswith(("image-", "text-"))]
        path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    (folder / "slurm").symlink_to(ROOT / "slurm")
    return folder


def search_path(folder: Path, hidden: Iterable[str] = ()) -> str:
    """This Python's commands first; folders with a hidden command are replaced by one without.

    Args:
        folder: made anew, for the commands of the replaced ones.
    """
    hidden, kept = set(hidden), [str(Path(sys.executable).parent)]
    for place in os.environ["PATH"].split(os.pathsep):
        if not any(Path(place, name).exists() for name in hidden):
            kept.append(place)
            continue
        replaced = folder / f"bin-{len(kept)}"
        replaced.mkdir(parents=True)
        for path in Path(place).iterdir():
            if path.name not in hidden:
                (replaced / path.name).symlink_to(path)
        kept.append(str(replaced))
    return os.pathsep.join(kept)


def run(text: str, world: Path, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a script in a world; its errors come among its output."""
    return subprocess.run(
        ["bash", "-c", text],
        cwd=world,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
        check=False,
    )
