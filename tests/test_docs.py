"""README and docs/: every command is run, every link leads somewhere, every config key is one."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pages
import pytest
import tiny_blip2
import warm
import yaml

from d2m_hpc.config import Config
from d2m_hpc.models.published import HubRepo

MORE = {
    "README": "weights_mirror",
    "weights": "weights_mirror",
    "filter-for-clip": "weights_mirror",
    "faces": "weights_mirror",
    "recaption": "captioner",
    "object-stores": "s3_bucket",
}
"""Pages whose commands need more of the world: fixtures that give a dict of variables."""
TASKS = ("score-a-folder", "filter-for-clip", "recaption", "deduplicate", "faces")
"""Pages on a task each, which a reader does in a few commands."""
SLURM = ("sbatch", "squeue", "scontrol", "scancel")


def page_names() -> list[str]:
    return [page.stem for page in pages.PAGES]


@pytest.fixture
def environment(
    request: pytest.FixtureRequest, tmp_path: Path, checkpoints: Path
) -> dict[str, str]:
    """What the page is run with: no Slurm, which this machine may have but not started."""
    weights = shutil.copytree(checkpoints, tmp_path / "weights", copy_function=os.symlink)
    found = {"PATH": pages.search_path(tmp_path, SLURM), "D2M_WEIGHTS": str(weights)}
    name = request.node.callspec.params["page"].stem
    found |= request.getfixturevalue(MORE[name]) if name in MORE else {}
    commands = warm.commands(tmp_path / "warm", {**os.environ, **found})
    return {**found, "PATH": f"{commands}:{found['PATH']}"}


@pytest.fixture
def captioner(tmp_path: Path, checkpoints: Path) -> dict[str, str]:
    """A weights folder with a small BLIP-2, too."""
    weights = shutil.copytree(checkpoints, tmp_path / "more-weights", copy_function=os.symlink)
    tiny_blip2.save(weights / HubRepo("Salesforce/blip2-opt-2.7b").name)
    return {"D2M_WEIGHTS": str(weights)}


@pytest.mark.parametrize("name", TASKS)
def test_a_task_takes_five_commands_at_most(name: str) -> None:
    page = pages.ROOT / "docs" / f"{name}.md"
    run = [b.text.replace("\\\n", "") for b in pages.blocks(page) if b.info == "bash"]
    assert 0 < len("".join(run).splitlines()) <= 5


@pytest.mark.parametrize("page", pages.PAGES, ids=page_names())
def test_every_command_of_the_page_runs(
    page: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    world = pages.make_world(tmp_path / "world", page.stem)
    ended = pages.run(pages.script(page, tmp_path / "blocks"), world, environment)
    assert ended.returncode == 0, ended.stdout


@pytest.mark.parametrize("page", pages.PAGES, ids=page_names())
def test_no_command_of_the_page_slips_past(page: Path) -> None:
    assert _of_no_kind(page) == []


def _of_no_kind(page: Path) -> list[str]:
    return [b.text for b in pages.blocks(page) if not b.file and b.info not in pages.INFOS]


@pytest.mark.parametrize("page", pages.PAGES, ids=page_names())
def test_every_key_in_the_page_s_yaml_is_one(page: Path) -> None:
    for block in pages.blocks(page):
        if block.kind == "yaml":
            keys = {key for key in yaml.safe_load(block.text) if not key.startswith("x-")}
            assert keys <= Config.model_fields.keys(), block.line


@pytest.mark.parametrize("page", pages.PAGES, ids=page_names())
def test_every_link_of_the_page_leads_somewhere(page: Path) -> None:
    broken = [link for link in pages.links(page) if not _leads_somewhere(page, link)]
    assert broken == []


def _leads_somewhere(page: Path, link: str) -> bool:
    if re.match(r"[a-z]+:", link):
        return True
    path, _, anchor = link.partition("#")
    target = page.parent / path if path else page
    if not target.exists():
        return False
    return not anchor or (target.suffix == ".md" and anchor in pages.anchors(target))


def test_readme_lists_every_page() -> None:
    listed = {link.partition("#")[0] for link in pages.links(pages.PAGES[0])}
    assert {str(p.relative_to(pages.ROOT)) for p in pages.PAGES[1:]} <= listed


@pytest.mark.parametrize(("line", "file"), pages.BY_CI.items())
def test_what_is_left_to_ci_is_run_by_it(line: str, file: str) -> None:
    """`scripts/env.sh` installs with uv, and is sourced by all of CI's steps."""
    text = (pages.ROOT / file).read_text(encoding="utf-8")
    wanted = r"uv pip install .*\"\.\$\{1" if line.startswith("pip") else f"^{line}$"
    assert re.search(wanted, text, re.MULTILINE)


class TestPages:
    """The readers of pages themselves, on one made for it."""

    TEXT = """\
# A page: with `code`, and more

[here](#a-page-with-code-and-more) ![there](picture.png)

```bash
echo one > one.txt
scripts/demo    # CI's
```

```yaml mine.yml
models: [image-stats]
```

```python
print(open("one.txt").read() + open("mine.yml").read())
```

```bash slurm
false
```

    echo indented
"""

    @pytest.fixture
    def page(self, tmp_path: Path) -> Path:
        path = tmp_path / "page.md"
        path.write_text(self.TEXT)
        return path

    def test_its_blocks_run_in_order_and_in_one_folder(self, page: Path, tmp_path: Path) -> None:
        found = pages.script(page, tmp_path / "blocks")
        ended = pages.run(found, tmp_path, {"PATH": pages.search_path(tmp_path)})
        assert ended.returncode == 0, ended.stdout
        assert "one\nmodels: [image-stats]" in ended.stdout
        assert "page.md, line 5" in ended.stdout

    def test_a_failure_says_where(self, page: Path, tmp_path: Path) -> None:
        found = pages.script(page, tmp_path / "blocks", slurm=True)
        ended = pages.run(found, tmp_path, {})
        assert ended.returncode == 1
        assert ended.stdout.splitlines()[-1] == "--- page.md, line 18"

    def test_what_is_only_indented_is_of_no_kind(self, page: Path) -> None:
        assert _of_no_kind(page) == ["echo indented\n"]

    def test_links_and_anchors(self, page: Path) -> None:
        assert pages.links(page) == ["#a-page-with-code-and-more", "picture.png"]
        assert _leads_somewhere(page, "#a-page-with-code-and-more")
        assert not _leads_somewhere(page, "picture.png")
        assert not _leads_somewhere(page, "#nowhere")

    def test_slurm_can_be_hidden(self, tmp_path: Path) -> None:
        place = tmp_path / "place"
        place.mkdir()
        for name in ("sbatch", "other"):
            (place / name).write_text("")
            (place / name).chmod(0o755)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PATH", str(place), prepend=":")
            found = pages.search_path(tmp_path, ["sbatch"])
        assert shutil.which("sbatch", path=found) is None
        assert shutil.which("other", path=found)
