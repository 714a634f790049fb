"""`d2m report` on a run to which everything happened, figure by figure against its records."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import troubled
from kit import STATS, d2m, sample, submit, write_config, write_tar
from PIL import Image

from d2m_hpc import config as configs
from d2m_hpc.errors import ConfigError, D2MError
from d2m_hpc.launch.flow import commit, submitting
from d2m_hpc.plan.decide import decide
from d2m_hpc.plan.workload import inspect
from d2m_hpc.run.folder import RunDir
from d2m_hpc.run.records import Record, encode, read_records
from d2m_hpc.storage.lease import Lease
from d2m_hpc.watch import page as report
from d2m_hpc.watch.page.timing import STAGES
from d2m_hpc.watch.status import find_run, summarise

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """A page's elements: (tag, attributes, text with that of inner elements), in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str], list[str]]] = []
        self.inside: list[int] = []
        self.feed(text)
        self.close()
        assert self.inside == [], "an element is not closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {k: v or "" for k, v in attrs}, []))
        if tag not in VOID:
            self.inside.append(len(self.found) - 1)

    def handle_endtag(self, tag: str) -> None:
        assert self.found[self.inside.pop()][0] == tag

    def handle_data(self, data: str) -> None:
        for number in self.inside:
            self.found[number][2].append(data)

    def all(self, tag: str, class_: str | None = None) -> list[tuple[dict[str, str], str]]:
        return [
            (attributes, "".join(text))
            for name, attributes, text in self.found
            if name == tag and (class_ is None or class_ in attributes.get("class", "").split())
        ]

    def texts(self, tag: str, class_: str | None = None) -> list[str]:
        return [text for _, text in self.all(tag, class_)]

    def section(self, title: str) -> str:
        [found] = [text for text in self.texts("section") if text.startswith(title)]
        return found


@pytest.fixture(scope="module")
def page(troubled_folder: Path) -> Page:
    return _page(troubled_folder / "out" / ".d2m", troubled_folder / "report.html")


@pytest.fixture
def folder(troubled_folder: Path) -> Path:
    return troubled_folder


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> RunDir:
    """Outputs and run folder that may be damaged; the tars stay where they are."""
    shutil.copytree(folder / "out", tmp_path / "out")
    return RunDir(tmp_path / "out" / ".d2m")


def _page(root: Path, path: Path, score: str | None = None, each: int = 3) -> Page:
    report.write(*find_run(root), path, score, each)
    return Page(path.read_text(encoding="utf-8"))


def _records(folder: Path) -> list[Record]:
    records = (folder / "out" / ".d2m" / "records").iterdir()
    return [r for path in records for r in read_records(path)]


def _column(folder: Path, name: str) -> dict[str, Any]:
    """Values by shard and key."""
    tables = {p.stem: pq.read_table(p) for p in (folder / "out").glob("*.parquet")}
    return {(s, row["key"]): row[name] for s, table in tables.items() for row in table.to_pylist()}


def test_the_run_is_one_to_which_everything_happened(folder: Path) -> None:
    found = summarise(*find_run(folder / "out" / ".d2m"))
    assert (found.shards, found.done, found.failed, found.rejected) == (8, 6, 2, 2)


def test_records_tell_how_long_every_stage_took(folder: Path) -> None:
    for record in _records(folder):
        if record.state == "done":
            assert record.seconds.keys() == STAGES.keys()
            elapsed = record.finished - record.started
            assert 0 < record.seconds["compute"] + record.seconds["wait"] <= elapsed + 0.01
            assert record.seconds["decode"] > 0
            assert record.seconds["write"] > 0


def test_the_page_needs_nothing_besides_itself(page: Page, folder: Path) -> None:
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert not {name for name, _, _ in page.found} & {"script", "link", "iframe", "object"}
    references = [a[k] for _, a, _ in page.found for k in ("src", "href", "xlink:href") if k in a]
    inside = {f"#{a['id']}" for _, a, _ in page.found if "id" in a}
    pictures = [r for r in references if r not in inside]
    assert pictures
    assert all(r.startswith("data:image/jpeg;base64,") for r in pictures)
    assert not re.search(r"url\(|@import|https?:", "".join(page.texts("style")))
    [policy] = [a["content"] for a, _ in page.all("meta") if "http-equiv" in a]
    assert policy.startswith("default-src 'none'")
    assert len(text) < 3_000_000


def test_captions_of_strangers_are_text(page: Page) -> None:
    captions = page.texts("figcaption")
    for odd in troubled.CAPTIONS[:4]:
        assert any(odd in caption for caption in captions), odd
    assert not [a for _, a, _ in page.found for key in a if key.startswith("on")]
    assert all("alt" in a for a, _ in page.all("img"))


def test_the_head_has_the_figures_of_status(page: Page, folder: Path) -> None:
    run, config = find_run(folder / "out" / ".d2m")
    found = summarise(run, config)
    figures = dict(zip(page.texts("dt"), page.texts("dd"), strict=True))
    for name in ("shards", "done", "failed", "running", "pending", "rows"):
        assert figures[name] == str(getattr(found, name))
    assert figures["rejected samples"] == f"2 ({2 / (found.rows + 2):.2%})"
    assert figures["models"] == "image-stats, text-stats"
    assert figures["output"] == str(folder / "out")
    assert page.texts("h1") == [f"Run {run.root}"]
    assert "The run ended with failed shards." in page.texts("main")[0]


def test_failures_come_first_and_every_section_has_a_link(page: Page) -> None:
    titles = page.texts("h2")
    assert titles[0] == "Rejections and failures"
    assert [t for a, t in page.all("a") if a["href"].startswith("#")] == titles
    ids = [a["id"] for a, _ in page.all("section")]
    assert [a["href"] for a, _ in page.all("a")] == [f"#{i}" for i in ids]
    faults = page.section("Rejections and failures")
    assert faults.index("1 shard failed: TruncatedShard") < faults.index("Samples rejected")


def test_the_page_says_what_ran(page: Page) -> None:
    figures = dict(zip(page.texts("dt"), page.texts("dd"), strict=True))
    assert figures["ran on"] == "CPU (3 tasks)"
    assert "(CPU), " in "".join(page.texts("title"))


def test_each_score_says_what_a_threshold_keeps(page: Page, folder: Path) -> None:
    curves = [a["aria-label"] for a, _ in page.all("svg") if a["aria-label"].startswith("Share")]
    names = ("image-brightness", "image-contrast", "text-words", "text-uppercase-ratio")
    assert curves == [f"Share of rows at or above each value of {name}" for name in names]
    values = np.array(list(_column(folder, "image-brightness").values()))
    told = re.search(r"rows at or above: ([\d.]+) keeps (\d+) %", page.section("Values"))
    assert told
    assert int(told[2]) == round(100 * float((values >= float(told[1])).mean()))


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """Of a run of one shard, which is done."""
    folder = tmp_path_factory.mktemp("single")
    members = {n: d for i in range(3) for n, d in sample(f"k{i}", i).items()}
    write_tar(folder / "a.tar", {**members, "z.jpg": b"no picture", "z.txt": b"z", "z.json": b"{}"})
    config = write_config(
        folder / "c.yml",
        STATS,
        input_tars=str(folder / "a.tar"),
        output_metadata_dir=str(folder / "out"),
        max_rejected_fraction=0.9,
    )
    assert submit(config).returncode == 0
    return _page(folder / "out" / ".d2m", folder / "report.html")


def test_one_of_a_thing_is_singular(single: Page) -> None:
    text = " ".join(single.texts("main") + single.texts("title"))
    assert not re.search(r"(?<![\d.,])1 [a-z ]*(tasks|attempts|shards|rows|samples|hosts)\b", text)
    assert "1 task, 1 attempt: 1 finished." in single.section("Tasks")
    assert "From 1 finished shard: 3 rows." in single.section("Values")
    assert "No failed shard is left." in single.section("Rejections and failures")
    assert "All shards are done." in single.texts("main")[0]


def test_a_task_s_speed_beside_the_mean_is_explained(single: Page) -> None:
    """Of one task, the two figures differ by the time in which it starts."""
    assert "samples a second, mean" in single.texts("dt")
    assert "; the mean at the top is over the time at shards alone." in single.section("Tasks")


def test_each_task_has_a_lane_and_each_attempt_a_bar(page: Page) -> None:
    endings = Counter(a["class"].split()[1] for a, _ in page.all("rect", "attempt"))
    assert endings == {"red": 1, "grey": 1, "amber": 2, "green": 1}
    lanes = [a["aria-label"] for a, _ in page.all("svg") if "Attempts" in a["aria-label"]]
    assert lanes == [
        "Attempts of task 000-0: stopped, failed",
        "Attempts of task 000-1: lost, finished",
        "Attempts of task 000-2: failed",
    ]
    section = page.section("Tasks")
    assert section.startswith("Tasks3 tasks, 5 attempts: 1 finished; 2 finished, with failed")
    assert len(page.all("path", "failed")) == 2


def test_bars_stand_within_the_drawing_and_one_after_the_other(page: Page) -> None:
    bars = [(float(a["x"]), float(a["width"])) for a, _ in page.all("rect", "attempt")]
    assert bars[0][0] == 0
    assert all(x >= 0 and x + width <= 1000.2 for x, width in bars)
    assert max(x + width for x, width in bars) == pytest.approx(1000, abs=0.2)


def test_histograms_count_every_row(page: Page, folder: Path) -> None:
    drawn = [a["aria-label"] for a, _ in page.all("svg") if "Histogram" in a["aria-label"]]
    names = ("image-brightness", "image-contrast", "text-words", "text-uppercase-ratio", "caption")
    assert drawn == [f"Histogram of {name}" for name in names]
    titles = [t for t in page.texts("title") if re.search(r": [\d,]+$", t)]
    counted = sum(int(t.rpartition(": ")[2].replace(",", "")) for t in titles)
    rows = sum(r.rows for r in _records(folder))
    assert counted == rows * len(names)
    assert f"From all 6 finished shards: {rows:,} rows." in page.section("Values")


def test_quartiles_are_those_of_the_outputs(page: Page, folder: Path) -> None:
    values = np.array(list(_column(folder, "image-brightness").values()))
    low, first, middle, third, high = (f"{v:.3g}" for v in np.percentile(values, range(0, 101, 25)))
    told = f"{low} to {high}, median {middle}, middle half {first} to {third}"
    assert told in page.section("Values")
    assert "characters: 16 in all" in page.section("Values")  # the hashes


def test_stages_are_the_sums_of_the_records(page: Page, folder: Path) -> None:
    records = _records(folder)
    cells = page.texts("td")
    start = cells.index("all")
    sums = [sum(r.seconds.get(s, 0.0) for r in records) for s in STAGES]
    assert [float(c) for c in cells[start + 3 : start + 8]] == pytest.approx(sums, abs=0.051)
    assert cells[start + 2] == str(sum(r.rows for r in records))


def test_rejections_and_failures_say_where(page: Page, folder: Path) -> None:
    told = page.section("Rejections and failures")
    assert "the image cannot be decoded" in told
    assert "y in odd" in told
    assert "x\\xff in odd" in told  # a byte that is no UTF-8, as the record has it
    for failure in summarise(*find_run(folder / "out" / ".d2m")).failures:
        assert failure.kind in told
        assert failure.error in told
        assert failure.log in told


def test_the_slowest_shards_are(page: Page, folder: Path) -> None:
    done = [r for r in _records(folder) if r.state == "done"]
    order = sorted(done, key=lambda r: r.started - r.finished)
    section = page.section("Shards and hosts")
    places = [section.index(f"{r.shard}{r.host}{r.task}") for r in order]
    assert places == sorted(places)


def _figures(page: Page) -> list[tuple[str, str, str]]:
    """Value, shard and key of each sample of the sheet."""
    told = page.texts("figcaption")
    values, codes = page.texts("b"), [re.search(r"(m?\d+) in (\S+)$", t) for t in told]
    return [(v, c[2], c[1]) for v, c in zip(values, codes, strict=True) if c]


def test_the_sheet_has_the_ends_and_the_middle_of_the_score(page: Page, folder: Path) -> None:
    values = sorted(_column(folder, "image-brightness").values())
    shown = [f"{v:.3g}" for v in (*values[:3], *values[-3:])]
    found = [v for v, _, _ in _figures(page)]
    assert found[:3] + found[-3:] == shown
    assert f"{np.median(values):.2g}" == f"{float(found[4]):.2g}"
    ends = [t for t in page.texts("h3") if t in ("The lowest", "The middle", "The highest")]
    assert ends == ["The lowest", "The middle", "The highest"]


def test_pictures_and_captions_are_the_sample_s(page: Page, folder: Path) -> None:
    brightness, captions = _column(folder, "image-brightness"), _column(folder, "caption")
    pictures = [a["src"] for a, _ in page.all("img")]
    figures = _figures(page)
    assert len(figures) == len(pictures) == 9
    shown = page.texts("figcaption")
    for (_, stem, key), url, text in zip(figures, pictures, shown, strict=True):
        image = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
        gray = np.asarray(image.convert("L")).mean() / 255
        assert gray == pytest.approx(brightness[stem, key], abs=0.02)
        assert (captions[stem, key] or "(no caption)")[:400] in text


def test_any_column_may_sort_the_sheet(folder: Path, tmp_path: Path) -> None:
    page = _page(folder / "out" / ".d2m", tmp_path / "r.html", score="text-words", each=2)
    values = sorted(_column(folder, "text-words").values())
    found = [int(v) for v, _, _ in _figures(page)]
    assert (found[:2], found[-2:]) == (values[:2], values[-2:])


def test_a_score_that_is_none_is_a_usage_error(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no column 'nope' to sort by; valid are: image-bright"):
        _page(folder / "out" / ".d2m", tmp_path / "r.html", score="nope")
    assert not (tmp_path / "r.html").exists()


def test_a_sample_that_cannot_be_had_is_said_so(copy: RunDir, tmp_path: Path) -> None:
    table = pq.read_table(copy.shards)
    rows = [{**r, "url": f"{tmp_path}/gone/{r['stem']}.tar"} for r in table.to_pylist()]
    pq.write_table(table.from_pylist(rows, schema=table.schema), copy.shards)
    page = _page(copy.root, tmp_path / "r.html")
    assert page.all("img") == []
    words = page.texts("div", "no-picture")
    assert len(words) == 9
    assert all("No picture: the tar cannot be read: " in w and "/gone/" in w for w in words)


def test_an_output_that_cannot_be_read_is_said_so(copy: RunDir, tmp_path: Path) -> None:
    (copy.root.parent / "00002.parquet").write_bytes(b"PAR1 not a parquet PAR1")
    page = _page(copy.root, tmp_path / "r.html")
    assert "1 shard could not be read; the first, 00002: " in page.section("Values")
    assert "From 5 of 6 finished shards" in page.section("Values")


def test_lines_that_are_there_twice_count_once(copy: RunDir, tmp_path: Path, page: Page) -> None:
    for path in copy.records.iterdir():
        path.write_bytes(2 * path.read_bytes())
    twice = _page(copy.root, tmp_path / "r.html")
    for title in ("Where the time went", "Shards and hosts"):
        assert twice.section(title) == page.section(title)
    assert twice.texts("td").count("y in odd") == 1
    assert len(twice.all("path", "failed")) == 2


def test_records_of_older_versions_have_no_stages(copy: RunDir, tmp_path: Path) -> None:
    for path in copy.records.iterdir():
        lines = [json.loads(line) for line in path.read_bytes().splitlines()]
        kept = [{k: v for k, v in line.items() if k != "seconds"} for line in lines]
        path.write_text("".join(json.dumps(line) + "\n" for line in kept))
    page = _page(copy.root, tmp_path / "r.html")
    assert "No record tells of the stages' times" in page.section("Where the time went")


def test_a_run_at_work_says_so(copy: RunDir, tmp_path: Path) -> None:
    lease = Lease(copy.lease("cut"))
    assert lease.claim()
    page = _page(copy.root, tmp_path / "r.html")
    lease.release()
    assert "The run is still running" in page.texts("main")[0]


def test_a_run_that_has_not_begun_has_a_page(tmp_path: Path) -> None:
    troubled.tars(tmp_path / "tars", samples=1)
    config = write_config(
        tmp_path / "c.yml",
        STATS,
        input_tars=str(tmp_path / "tars" / "0*.tar"),
        output_metadata_dir=str(tmp_path / "out"),
    )
    workload = inspect(configs.load(config), str(config))
    with submitting(workload):
        decision = decide(workload)
        commit(decision, [decision.pending])
    page = _page(workload.run.root, tmp_path / "r.html")
    assert page.section("Progress") == "ProgressNo task has begun."
    assert page.section("Values") == "ValuesNo shard is done yet."
    figures = dict(zip(page.texts("dt"), page.texts("dd"), strict=True))
    assert (figures["shards"], figures["pending"], figures["rows"]) == ("5", "5", "0")


def _task(index: int) -> tuple[dict[str, Any], Record]:
    """What a task that did one shard said, and its record; a few are unlike the others."""
    times = {"started": 1000.0, "updated": 1500.0 if index == 1234 else 1001.0 + index % 50}
    name, host = f"001-{index}-0", f"n{index % 40}"
    told = {"task": name, "host": host, "device": "cuda:0", "shards": 1, "done": 1, "failed": 0}
    told |= {"rows": 5, "shard": "", "state": "stopped" if index == 77 else "finished", **times}
    seconds = {"compute": 2.0}
    record = Record(f"s{index}", "done", 5, started=1000.0, finished=times["updated"], task=name)
    record.host, record.seconds = host, seconds
    return told, record


def test_a_run_of_thousands_of_tasks_shows_the_most_troubled(tmp_path: Path, copy: RunDir) -> None:
    tasks = [_task(i) for i in range(3000)]
    merged = "".join(json.dumps(told) + "\n" for told, _ in tasks)
    (copy.progress / "merged-0.jsonl").write_text(merged)
    (copy.records / "merged-0.jsonl").write_bytes(b"".join(encode(r) for _, r in tasks))
    page = _page(copy.root, tmp_path / "r.html")
    labels = [a["aria-label"] for a, _ in page.all("svg") if "Attempts" in a["aria-label"]]
    assert len(labels) == 40
    assert "Attempts of task 001-77: stopped" in labels
    assert "Attempts of task 001-1234: finished" in labels  # the slowest
    assert "3,003 tasks, 3,005 attempts" in page.section("Tasks")
    assert "Shown are 40: those with the most trouble" in page.section("Tasks")
    assert "000-1" in page.section("Where the time went")
    assert "And 21 faster hosts." in page.section("Shards and hosts")
    assert "GPU (3,000 tasks), CPU (3 tasks)" in page.section("What is computed")
    assert (tmp_path / "r.html").stat().st_size < 1_000_000


def test_the_file_is_replaced_as_a_whole_or_not_at_all(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "r.html"
    path.write_text("before")
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", _no_space)
        with pytest.raises(D2MError, match=r"r.html cannot be written: .*No space left.*by -o"):
            _page(folder / "out" / ".d2m", path)
    assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]


def _no_space(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_the_command_writes_the_page_and_says_where(folder: Path, tmp_path: Path) -> None:
    asked = ("report", folder / "c.yml", "-o", "new/page.html", "--samples", 1)
    missing = d2m(*asked, cwd=tmp_path)
    assert missing.returncode == 2
    assert f"there is no folder {tmp_path}/new; make it" in missing.stderr
    (tmp_path / "new").mkdir()
    said = d2m(*asked, cwd=tmp_path)
    assert (said.returncode, said.stdout, said.stderr) == (0, "wrote new/page.html\n", "")
    assert len(Page((tmp_path / "new" / "page.html").read_text("utf-8")).all("figure")) == 3
    wrong = d2m("report", folder / "out", cwd=tmp_path)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "there is no run in" in wrong.stderr
