"""The parts of `d2m report`, each alone."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from jinja2 import UndefinedError
from kit import jpeg, sample, write_tar
from PIL import Image, UnidentifiedImageError

from d2m_hpc.config import Config
from d2m_hpc.errors import ConfigError
from d2m_hpc.run.manifest import Outcome
from d2m_hpc.run.outputs import OutputDir
from d2m_hpc.run.records import Shard
from d2m_hpc.watch.page import charts, columns, environment, printed, sheet, timing
from d2m_hpc.watch.page.timing import cumulative, rate

finite = st.floats(-1e12, 1e12, allow_nan=False)


def render(template: str, **names: object) -> str:
    return environment().from_string(template).render(**names)


class TestPrinted:
    def test_what_is_put_in_is_escaped_once(self) -> None:
        bold = "{% macro bold(x) %}<b>{{ x }}</b>{% endmacro %}"
        inner = "<b>&lt;i&gt; &amp; &#34;&#39;</b>"
        assert render(bold + "{{ bold(x) }}", x="<i> & \"'") == inner
        made = render(bold + '<p title="{{ t }}">{{ bold(x) }}</p>', x="<i> & \"'", t='"<')
        assert made == f'<p title="&#34;&lt;">{inner}</p>'

    def test_no_text_keeps_html_from_being_written(self) -> None:
        odd = "a\x00\x1b[31m\ud83d\udcffb \u202e \U0001f415"
        assert render("{{ x }}", x=odd) == "a\ufffd\ufffd[31m\ufffd\ufffdb \u202e \U0001f415"
        assert render("{{ x }}", x=odd).encode()

    def test_what_is_joined_or_formatted_is_masked_too(self) -> None:
        url = "https://me:pw@host/a?sig=x"
        for made in ("x", "[x, x]|join(', ')", "'%s'|format(x)", "'to ' ~ x", "{'a': x}['a']"):
            told = render("{{ " + made + " }}", x=url)
            assert "https://***@host/a?sig=***" in told, made
            assert "pw" not in told, made

    def test_a_picture_is_whole_and_what_only_begins_as_one_is_masked(self) -> None:
        picture = "data:image/jpeg;base64,/9j/sig+token/key=="
        assert printed(picture) == picture
        assert "pw" not in str(printed("data:image/jpeg;base64,AA https://me:pw@host/"))

    def test_numbers_have_separators(self) -> None:
        assert render("{{ a }} {{ b }} {{ c }}", a=1234567, b=1234.56, c="1234") == (
            "1,234,567 1,234.6 1234"
        )

    def test_a_name_that_is_none_is_an_error(self) -> None:
        with pytest.raises(UndefinedError, match="'x' is undefined"):
            render("{{ x }}")


class TestCharts:
    @given(finite, finite)
    def test_steps_are_round_few_and_within(self, one: float, other: float) -> None:
        low, high = sorted((one, other))
        assume(high - low > 1e-9 * max(abs(low), abs(high)))
        marks = charts.steps(low, high)
        slack = (high - low) * 1e-6
        assert 1 <= len(marks) <= 6
        assert all(low - slack <= m <= high + slack for m in marks)

    def test_steps_of_a_range(self) -> None:
        assert charts.steps(0, 8.7) == [0, 2, 4, 6, 8]
        assert charts.steps(0.12, 0.19) == pytest.approx([0.12, 0.14, 0.16, 0.18])

    @pytest.mark.parametrize(
        ("seconds", "unit", "last"),
        [
            (100, "seconds", "100"),
            (1800, "minutes", "30"),
            (9 * 3600, "hours", "8"),
            (10 * 86400, "days", "10"),
        ],
    )
    def test_time_is_told_in_the_unit_that_suits_it(
        self, seconds: float, unit: str, last: str
    ) -> None:
        axis = charts.time_axis(seconds, "then")
        assert axis.title == f"{unit} since then"
        assert axis.ticks[-1][1] == last
        assert axis.share(seconds) == 1.0

    def test_counts_have_whole_ticks(self) -> None:
        x, at = charts.plain_axis(0, 1, "x"), np.array([0.0, 1.0])
        drawn = charts.lines([charts.Curve("done", "green", at, at)], x, "shards", "x")
        assert [words for _, words in drawn.y.ticks] == ["0", "1"]
        drawn = charts.lines([charts.Curve("rate", "blue", at, at * 0.9)], x, "rows/s", "x")
        assert [words for _, words in drawn.y.ticks] == ["0", "0.2", "0.4", "0.6", "0.8"]

    def test_a_skewed_histogram_counts_in_powers_of_ten(self) -> None:
        values = np.concatenate([np.zeros(10_000), np.linspace(0, 1, 40)])
        drawn = charts.histogram(values, "value", "x")
        assert "each line ten times the one below" in drawn.y.title
        assert [words for _, words in drawn.y.ticks] == ["1", "10", "100", "1,000", "10,000"]
        even = charts.histogram(np.linspace(0, 1, 400), "value", "x")
        assert "each line ten times" not in even.y.title

    @given(st.lists(finite, min_size=2, max_size=50) | st.lists(finite, min_size=400))
    def test_a_histogram_counts_every_value_in_its_bar(self, values: list[float]) -> None:
        drawn = charts.histogram(np.array(values), "value", "x")
        counts = [int(b.words.rpartition(": ")[2].replace(",", "")) for b in drawn.bars]
        assert counts == [b.count for b in drawn.bars]
        assert sum(counts) == len(values)
        edges = [(float(drawn.x.right(b.low)), float(b.width(drawn.x))) for b in drawn.bars]
        assert all(x >= 0 and x + width <= 1001 for x, width in edges)

    def test_a_few_far_values_do_not_stretch_the_axis_and_are_counted(self) -> None:
        values = np.concatenate([np.linspace(10, 20, 9990), [-1e9] * 4, [1e6] * 6])
        drawn = charts.histogram(values, "value", "x")
        assert 9 < drawn.x.low < 10.1
        assert 19.9 < drawn.x.high < 21
        low, high = np.sort(values)[[49, 9950]]
        first, last = drawn.bars[0], drawn.bars[-1]
        assert first.words == f"below {low:.3g}: {(values < low).sum():,}"
        assert last.words == f"above {high:.3g}: {(values > high).sum():,}"
        assert [b.is_rest for b in (first, *drawn.bars[1:-1], last)].count(True) == 2
        assert (first.is_rest, last.is_rest) == (True, True)
        assert 40 < first.count < 55
        assert all(10 <= v <= 20 for v, _ in drawn.x.ticks)

    def test_a_threshold_keeps_the_rows_at_or_above_it(self) -> None:
        values = np.arange(100.0)
        histogram = charts.histogram(values, "value", "x")
        kept = charts.survival(values, 200, histogram.x, "x")  # as many rows have no value
        assert dict(kept.x.ticks) == {0: "50 %", 20: "40 %", 40: "30 %", 60: "20 %", 80: "10 %"}
        assert kept.y.title == "rows at or above: 40 keeps 30 %"
        assert kept.curves[0].y[0] == 0.5
        assert all(" keeps " in b.words for b in kept.bars)


class TestHistory:
    def test_times_that_have_come(self) -> None:
        at = np.array([0.0, 1.0, 2.5, 9.0])
        assert cumulative([3.0, 1.0, 2.0], at).tolist() == [0, 1, 2, 3]

    def test_rows_a_second_are_spread_over_the_time_that_they_took(self) -> None:
        started, finished = np.array([0.0, 1.0]), np.array([4.0, 3.0])
        pace = rate(started, finished, np.array([8.0, 20.0]), np.arange(6.0))
        assert pace == pytest.approx([2, 12, 12, 2, 0])

    def test_no_rows_are_lost_of_shards_that_took_no_time(self) -> None:
        generator = np.random.default_rng(0)
        started = generator.uniform(0, 100, 1000)
        finished = started + generator.choice([0.0, 3.0, 30.0], 1000)
        rows = generator.integers(0, 1000, 1000).astype(float)
        edges = np.linspace(0, 131, 61)
        pace = rate(started, finished, rows, edges)
        assert (pace * np.diff(edges)).sum() == pytest.approx(rows.sum())


KINDS: dict[str, tuple[pa.Array, str, list[float]]] = {
    "float": (pa.array([0.5, None, float("nan")], pa.float32()), "number", [0.5]),
    "huge": (pa.array([1e308, -1e200, 3.0]), "number", [3.0]),
    "integer": (pa.array([1, -2, 2**40]), "number", [1, -2, 2**40]),
    "boxes": (
        pa.array([[], [[0.0] * 4] * 3, None], pa.list_(pa.list_(pa.float32()))),
        "list",
        [0, 3],
    ),
    "text": (pa.array(["", "\U0001f415ab", None]), "text", [0, 3]),
    "truth": (pa.array([True, False, True]), "truth", []),
    "hash": (pa.array([1, 2**63, 3], pa.uint64()), "other", []),
    "object": (pa.array([{"a": 1}, None, {"a": 2}]), "other", []),
}


class TestColumns:
    def _write(self, folder: Path, stem: str, **values: Any) -> None:
        count = len(next(iter(values.values())))
        table = pa.table({"key": [str(i) for i in range(count)], **values})
        pq.write_table(table, folder / f"{stem}.parquet")

    @pytest.mark.parametrize("name", KINDS)
    def test_values_of_a_type(self, name: str, tmp_path: Path) -> None:
        array, kind, expected = KINDS[name]
        self._write(tmp_path, "a", x=array)
        [column] = columns.sample(OutputDir(str(tmp_path)), ["a"]).columns
        assert (column.name, column.kind, column.values.tolist()) == ("x", kind, expected)
        assert (column.rows, column.missing) == (3 - array.null_count, array.null_count)

    def test_few_texts_that_come_again_are_categories(self, tmp_path: Path) -> None:
        self._write(tmp_path, "a", x=["en"] * 50 + ["de"] * 3, y=[str(i) for i in range(53)])
        self._write(tmp_path, "b", x=["en"] * 5 + [None] * 3, y=["z"] * 8)
        x, y = columns.sample(OutputDir(str(tmp_path)), ["a", "b"]).columns
        assert (x.is_category, x.categories, x.missing) == (True, {"en": 55, "de": 3}, 3)
        assert (y.is_category, len(y.values)) == (False, 61)

    def test_a_column_without_values_in_one_shard_is_one_column(self, tmp_path: Path) -> None:
        for stem, held in (
            ("a", pa.array([1.5, 2.5])),
            ("b", pa.array([None, None], pa.string())),
        ):
            self._write(tmp_path, stem, x=held)
        [x] = columns.sample(OutputDir(str(tmp_path)), ["a", "b"]).columns
        assert (x.kind, x.rows, x.missing) == ("number", 2, 2)

    def test_a_sample_reads_no_more_than_it_says(self, tmp_path: Path) -> None:
        stems = [f"{i:03d}" for i in range(20)]
        for stem in stems:
            self._write(tmp_path, stem, x=[float(stem)])
        found = columns.sample(OutputDir(str(tmp_path)), stems, most=5)
        assert (len(found.shards), found.of) == (5, 20)
        assert sorted(found.columns[0].values) == sorted(float(s) for s in found.shards)
        assert columns.sample(OutputDir(str(tmp_path)), stems, most=5).shards == found.shards


def _image(data: bytes, max_pixels: int = 10**6) -> Image.Image:
    url = sheet.thumbnail(data, max_pixels)
    assert url.startswith("data:image/jpeg;base64,")
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


def _saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


class TestValues:
    @pytest.mark.parametrize(
        ("numbers", "told"),
        [
            ([3.0, 3.0], "value: 3 in all 2 rows"),
            ([1.0, 1.0 + 1e-15], "1 to 1, median 1, middle half 1 to 1"),
            ([0.0, 5e-324], "0 to 4.94e-324"),
            ([1e308, float("inf"), 3.0], "value: 3 in all 1 row, 2 not finite or over 1e+100"),
        ],
    )
    def test_odd_numbers_of_strangers_have_a_card(self, numbers: list[float], told: str) -> None:
        column = columns.Column("x", "number", "double")
        column.add(pa.chunked_array([numbers]))
        assert told in columns.card(column).told

    def test_what_is_beyond_the_axis_is_counted_in_words(self) -> None:
        column = columns.Column("x", "number", "double")
        column.add(pa.chunked_array([np.concatenate([np.linspace(0, 1, 998), [1e6, -1e6]])]))
        made = columns.card(column)
        told = "Beyond the axis, in grey: 4 below 0.00301 and 4 above 0.997."
        assert made.told.endswith(told)
        assert [len(c.bars) > 0 for c in made.charts] == [True, True]

    def test_only_numbers_have_thresholds(self) -> None:
        column = columns.Column("x", "text", "string")
        column.add(pa.chunked_array([[str(10**i) for i in range(9)]]))
        assert [c.label for c in columns.card(column).charts] == ["Histogram of x"]


class TestHosts:
    def _outcome(self, host: str, seconds: float) -> Outcome:
        values = {"started": 1000.0, "finished": 1000.0 + seconds, "rows": 100, "host": host}
        return Outcome.of(values)

    def test_a_host_that_takes_far_longer_than_the_median_is_slow(self) -> None:
        times = {"a": 10.0, "b": 12.0, "c": 11.0, "d": 40.0}
        found = timing.hosts(self._outcome(h, s) for h, s in times.items())
        assert [(h.name, h.is_slow) for h in found] == [
            ("d", True),
            ("b", False),
            ("c", False),
            ("a", False),
        ]
        assert (found[0].seconds, found[0].speed) == (40.0, 2.5)

    def test_two_hosts_have_no_median(self) -> None:
        found = timing.hosts([self._outcome("a", 1.0), self._outcome("b", 100.0)])
        assert not any(h.is_slow for h in found)


class TestSheet:
    def test_a_thumbnail_is_small_and_not_turned_by_its_exif(self) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6  # orientation: turn by 90 degrees
        wide = Image.new("RGB", (800, 400), "red")
        assert _image(_saved(wide, "JPEG", exif=exif)).size == (sheet.SIDE, sheet.SIDE // 2)

    @pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "I;16", "1"])
    def test_pictures_of_all_modes_become_jpegs(self, mode: str) -> None:
        assert _image(_saved(Image.new(mode, (30, 20)), "PNG")).mode == "RGB"

    def test_a_picture_over_the_limit_is_not_decoded(self) -> None:
        with pytest.raises(ValueError, match="40x30 pixels, over max_image_pixels"):
            sheet.thumbnail(jpeg(size=(40, 30)), max_pixels=1199)

    def test_postscript_is_not_run(self) -> None:
        with pytest.raises(UnidentifiedImageError, match=r"^its format is not known$"):
            sheet.thumbnail(_saved(Image.new("RGB", (9, 9)), "EPS"), 10**6)

    def test_the_default_score_is_the_first_number_asked_for(self) -> None:
        made = [
            columns.Column("face-boxes", "list", "list", rows=1),
            columns.Column("b", "number", "float", rows=1),
            columns.Column("a", "number", "float", rows=1),
        ]
        assert sheet.choose_score(made, None, ["face-boxes", "a", "b"]) == "a"
        assert sheet.choose_score(made, "face-boxes", ["a"]) == "face-boxes"
        assert sheet.choose_score([], None, ["a"]) == ""
        with pytest.raises(ConfigError, match="none, as no shard is done"):
            sheet.choose_score([], "a", ["a"])

    def _made(
        self,
        folder: Path,
        url: str,
        size: int | None = None,
        more: Sequence[Shard] = (),
        **values: Any,
    ) -> sheet.Sheet:
        keys = [f"k{i}" for i in range(6)]
        table = pa.table({"key": keys, "score": [0.1 * i for i in range(6)]})
        pq.write_table(table, folder / "a.parquet")
        output = OutputDir(str(folder))
        given = {"models": ["m"], "input_tars": ["unused"], "output_metadata_dir": str(folder)}
        config = Config(**{**given, "max_image_pixels": 10**6, **values})
        return sheet.make(output, [Shard("a", url, size), *more], "score", 1, config)

    def _tar(self, folder: Path) -> Path:
        members = {n: d for i in range(6) for n, d in sample(f"k{i}", i).items()}
        return write_tar(folder / "a.tar", members)

    @pytest.mark.parametrize("before", ["", "file://", "pipe:cat "])
    def test_tars_are_read_wherever_they_are(self, before: str, tmp_path: Path) -> None:
        made = self._made(tmp_path, f"{before}{self._tar(tmp_path)}")
        samples = [s for end in sheet.ENDS for s in made.ends[end]]
        assert [(s.key, s.caption) for s in samples] == [
            (f"k{i}", f"caption {i}") for i in (0, 2, 5)
        ]
        assert all(s.picture and not s.fault for s in samples)

    def test_captions_come_from_where_the_models_take_them(self, tmp_path: Path) -> None:
        made = self._made(tmp_path, str(self._tar(tmp_path)), text_from="json:uid")
        assert [s.caption for end in sheet.ENDS for s in made.ends[end]] == [
            f"{i:032x}" for i in (0, 2, 5)
        ]

    def test_large_remote_tars_are_left_alone(self, tmp_path: Path) -> None:
        made = self._made(tmp_path, "s3://no/such.tar", size=sheet.REMOTE_BYTES + 1)
        assert (made.shards, made.notes) == (
            0,
            ["The tars are remote, and of more than 512 MiB: none was read."],
        )

    def test_what_stands_before_a_cut_is_shown(self, tmp_path: Path) -> None:
        path = self._tar(tmp_path)
        path.write_bytes(path.read_bytes().partition(b"k4.jpg")[0])
        made = self._made(tmp_path, str(path))
        assert made.ends["lowest"][0].picture
        assert made.ends["highest"][0].fault == "is not in the tar any more"

    def test_no_sample_is_shown_twice(self) -> None:
        rows = [sheet.Picked("a", str(i), float(i)) for i in range(5)]
        ends = sheet._pick(rows, each=8)
        assert [[s.key for s in ends[e]] for e in sheet.ENDS] == [["0"], ["2"], ["4"]]

    def test_shards_that_have_no_such_column_yet_are_left_out(self, tmp_path: Path) -> None:
        tar = self._tar(tmp_path)
        pq.write_table(pa.table({"key": ["x"]}), tmp_path / "b.parquet")
        made = self._made(tmp_path, str(tar), more=[Shard("b", str(tar))])
        assert {s.stem for samples in made.ends.values() for s in samples} == {"a"}

    def test_a_shard_that_is_gone_meanwhile_is_said_so(self, tmp_path: Path) -> None:
        tar = self._tar(tmp_path)
        made = self._made(tmp_path, str(tar), more=[Shard("gone", str(tar))])
        assert [n.partition(":")[0] for n in made.notes] == ["gone could not be read"]
        assert all(made.ends.values())
