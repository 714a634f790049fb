"""Each member of a tar is a sample's, or counted as one that should be, or noted."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable

import pytest

from d2m_hpc.run.records import Rejection
from d2m_hpc.worker.read.members import (
    HIDDEN,
    LINK,
    MERGED,
    NAMELESS,
    SHOWN,
    SKIPPED,
    Notes,
    is_foreign,
)
from d2m_hpc.worker.read.names import EXTENSIONS
from d2m_hpc.worker.read.shard import Index
from d2m_hpc.worker.read.tar import ReadAhead

ALL = ("image", "text", "json")


def index_of(names: Iterable[str], needed: Iterable[str] = ALL, links: Iterable[str] = ()) -> Index:
    """An index that has been iterated over."""
    linked = set(links)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            if name in linked:
                info.type, info.linkname = tarfile.LNKTYPE, "elsewhere"
            tar.addfile(info)
    members = {kind: EXTENSIONS[kind] for kind in needed}
    index = Index(ReadAhead(buffer), len(buffer.getvalue()), members)
    for _ in index:
        pass
    assert index.cut == ""
    return index


def triples(*keys: str) -> list[str]:
    return [f"{key}.{e}" for key in keys for e in ("jpg", "json", "txt")]


# --- samples in one group ---


@pytest.mark.parametrize("needed", [("image",), ("image", "text"), ALL])
def test_names_that_differ_after_their_first_dot_count_each(needed: tuple[str, ...]) -> None:
    """The first stands for the sample, which is rejected for what it lacks."""
    index = index_of(triples(*(f"clip.{i:05d}" for i in range(250))), needed)
    assert index.count == 1
    assert [s.reason for s in index.strays] == [MERGED] * 249
    assert index.strays[0].key == "clip.00001.jpg"
    cause = index.ledger.causes.foremost()
    assert "first dot" in cause
    assert len(cause) < 150


def test_a_whole_sample_does_not_swallow_others_of_its_key() -> None:
    names = [n for k in ("cat", "cat.2", "cat.3", "dog", "dog.2") for n in triples(k)]
    index = index_of(names)
    assert index.count == 2
    assert [s.key for s in index.strays] == ["cat.2.jpg", "cat.3.jpg", "dog.2.jpg"]


def test_many_pictures_beside_a_whole_sample_count_each() -> None:
    frames = [f"film.{i}.jpg" for i in range(40)]
    index = index_of(["film.jpg", *frames], ["image"])
    assert [s.key for s in index.strays] == frames


def test_what_most_samples_have_besides_is_a_note() -> None:
    names = [f"{i}.{e}" for i in range(9) for e in ("jpg", "depth.png", "seg.png", "txt", "json")]
    index = index_of(names)
    assert (index.count, index.strays) == (9, [])
    (note,) = index.ledger.notes.texts()
    assert note.startswith("further members of samples are not used: 0.depth.png, 1.depth.png, ")
    assert note.endswith("and 15 more")


@pytest.mark.parametrize(("films", "frames"), [(1, 2), (1, 10), (2, 7), (3, 16)])
def test_a_series_of_pictures_beside_few_samples_counts(films: int, frames: int) -> None:
    """As many samples as that tell nothing of a form that a data set has."""
    series = [f"{i}.{frame:03d}.png" for i in range(films) for frame in range(frames)]
    index = index_of(sorted([*triples(*map(str, range(films))), *series]))
    assert index.count == films
    assert sorted((s.key, s.reason) for s in index.strays) == [(n, MERGED) for n in sorted(series)]
    assert "first dot" in index.ledger.causes.foremost()


def test_views_and_captions_that_all_samples_have_are_a_note() -> None:
    views = [f"{i}.view{n}.jpg" for i in range(9) for n in range(3)]
    captions = [f"{i}.{n}.txt" for i in range(2) for n in range(5)]
    for members, count in ((views, 9), (captions, 2), (["0.seg.png", "0.depth.png"], 1)):
        index = index_of(sorted([*triples(*map(str, range(count))), *members]))
        assert (index.count, index.strays) == (count, [])
        assert len(index.ledger.notes.texts()) == 1


def test_an_odd_picture_of_a_few_samples_counts() -> None:
    index = index_of([*triples("a", "b", "c"), "c.old.jpg"])
    assert [(s.key, s.reason) for s in index.strays] == [("c.old.jpg", MERGED)]


def test_one_sample_under_a_dotted_name_counts_once() -> None:
    index = index_of(["1.image.jpg", "1.caption.txt", "1.json", "2.image.jpg", "2.json"])
    assert (index.count, index.strays) == (2, [])
    assert "rename" in index.ledger.causes.foremost()


def test_a_second_picture_of_a_sample_is_noted() -> None:
    index = index_of(["a.jpg", "a.png", "a.txt", "a.json"])
    assert index.strays == []
    assert index.ledger.notes.texts() == [
        "members are not used, as their sample has another of the kind: a.png"
    ]


def test_other_members_of_a_sample_are_nobodys_business() -> None:
    names = ["a.jpg", "a.txt", "a.json", "a.cls", "a.npy", "a.mp3", "a.jpg.md5"]
    index = index_of(names)
    assert (index.strays, index.ledger.notes.texts()) == ([], [])
    assert index.ledger.causes.foremost() == ""


# --- members that are apart ---


def test_members_that_are_not_adjacent_get_the_advice() -> None:
    names = [f"{i}.{e}" for e in ("jpg", "json", "txt") for i in range(30)]
    index = index_of(names)
    assert index.count == 90
    assert "`tar --sort=name`" in index.ledger.causes.foremost()


def test_a_tar_that_holds_everything_twice_has_nothing_apart() -> None:
    index = index_of([*triples("a", "b"), *triples("a", "b")])
    assert (index.count, index.ledger.causes.foremost()) == (4, "")


# --- links ---


def test_links_that_are_not_needed_are_notes() -> None:
    index = index_of([*triples("a"), "a.png", *triples("b")], links=["a.png"])
    assert (index.count, index.strays) == (2, [])
    assert index.ledger.notes.texts() == ["links or special files are not read: a.png"]


def test_a_sample_of_links_alone_is_one_stray() -> None:
    index = index_of([*triples("b"), *triples("a"), *triples("c")], links=triples("a"))
    assert index.count == 2
    assert [(s.key, s.reason) for s in index.strays] == [("a.jpg", LINK)]


def test_a_link_between_the_members_of_a_sample_does_not_part_them() -> None:
    index = index_of(["a.jpg", "b.jpg", "a.txt", "a.json"], links=["b.jpg"])
    assert index.count == 1


# --- foreign members ---

FOREIGN = [
    *("._000.jpg", "d/._000.jpg", "__MACOSX/d/000.jpg", ".DS_Store", "a/b/.DS_Store", "Thumbs.db"),
    *(
        "THUMBS.DB",
        "d/desktop.ini",
        "README",
        "README.md",
        "d/readme.txt",
        "LICENSE",
        "License.txt",
    ),
    *("PaxHeaders.4711/000.jpg", "./PaxHeaders/000.txt", "pax_global_header", "@LongLink"),
    *("000.md5", "all.sha256", "SHA256SUMS", "md5sum.txt", "checksums.sha512", "a.crc32", "a.sfv"),
    *("@eaDir/000.jpg", ".ipynb_checkpoints/x.txt", ".gitattributes", "d/.nfs00000c", "a.jpg~"),
]


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_members_are_noted_and_part_no_sample(name: str) -> None:
    index = index_of(["k.jpg", name, "k.json", "k.txt", *triples("l")])
    assert (index.count, index.strays) == (2, [])
    assert index.ledger.notes.texts() == [f"foreign members are not read: {name}"]


@pytest.mark.parametrize(
    "name",
    [
        *("000.jpg", "d/000.json", "readme_1.txt", "a._b.jpg", "MACOSX/1.jpg", "license1.jpg"),
        *("notice.txt", "md5.jpg", "Thumbs.dbx", "README.jpg", "x/README/000.jpg", "desktop.jpg"),
    ],
)
def test_samples_are_not_foreign(name: str) -> None:
    assert not is_foreign(name)


def test_a_sample_may_be_named_as_a_readme_is() -> None:
    index = index_of(triples("readme", "license"))
    assert (index.count, index.strays, index.ledger.notes.texts()) == (2, [], [])


def test_samples_under_a_reserved_name_count_each() -> None:
    index = index_of([*triples(*(f"__data__/{i}" for i in range(9))), "__meta__", "__x__/y.json"])
    assert index.count == 0
    assert [s.reason for s in index.strays] == [SKIPPED] * 9
    assert index.ledger.notes.texts()[-1].endswith(
        "not read: __data__/0.json, __data__/1.json, __data__/2.json and 8 more"
    )


@pytest.mark.parametrize("stem", [".b", "..b", "./.b", "v1.0/...b", "", "./"])
def test_a_sample_whose_name_begins_with_a_dot_counts_once(stem: str) -> None:
    index = index_of([*triples("a"), *triples(stem), *triples("c")])
    assert index.count == 2
    assert index.strays == [Rejection(f"{stem}.jpg", HIDDEN)]


def test_samples_under_dotted_names_count_each() -> None:
    index = index_of([*triples(".a", ".b", ".b"), *triples("a"), *triples(".a")])
    assert index.count == 1
    assert [s.key for s in index.strays] == [".a.jpg", ".b.jpg", ".b.jpg", ".a.jpg"]


@pytest.mark.parametrize("name", ["plain", "d/plain", ".hidden", ".profile.d"])
def test_what_has_neither_key_nor_known_extension_says_so(name: str) -> None:
    assert index_of([name]).strays == [Rejection(name, NAMELESS)]


def test_notes_are_short_however_many_and_odd_the_names() -> None:
    notes = Notes()
    for i in range(100_000):
        notes.add("gone: {}", f"{i}\x1b\n\u2028\udcff" + "x" * 1000)
    (text,) = notes.texts()
    assert len(text) < 300
    assert text.isprintable()
    assert text.endswith(f" and {100_000 - SHOWN} more")
