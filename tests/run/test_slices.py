"""Folders cut into shards: every key in one shard, whatever comes or goes between submits."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2m_hpc.run.slices import Slice, _slices, key_of, planned
from d2m_hpc.storage.urls import is_folder, is_local, is_pipe, is_remote

KEYS = st.sets(st.text("ab0#%/.é", min_size=1, max_size=4), max_size=12)


@given(st.lists(KEYS, min_size=1, max_size=4), st.integers(1, 4))
def test_every_key_is_in_one_shard_and_planned_shards_stay(
    submits: list[set[str]], most: int
) -> None:
    earlier: list[Slice] = []
    for keys in submits:
        made = [*_slices("f", sorted(keys), most, earlier)]
        known = {s.url: s for s in (*earlier, *made)}
        found = Counter(k for s in known.values() for k in keys if s.first <= k <= s.last)
        assert found == Counter(dict.fromkeys(keys, 1))
        assert all(any(s.first <= k <= s.last for k in keys) for s in made)
        new = [s for s in made if s not in earlier]
        assert len({s.part for s in known.values()}) == len(known)
        assert all(sum(s.first <= k <= s.last for k in keys) <= most for s in new)
        earlier = [*known.values()]


@given(
    st.text(min_size=1), st.sampled_from(["", "00012"]), st.text(min_size=1), st.binary(min_size=1)
)
def test_a_url_holds_any_names(folder: str, part: str, first: str, raw: bytes) -> None:
    last = os.fsdecode(raw)
    try:
        made = Slice(folder, part, first, last)
        url = made.url
    except UnicodeEncodeError:  # a surrogate that no name has
        return
    assert url.isascii()
    assert Slice.of(url) == made
    assert is_folder(url)
    assert not any(is_other(url) for is_other in (is_local, is_remote, is_pipe))


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("a.jpg", ("a", "jpg")),
        ("a.JPG", ("a", "jpg")),
        ("2020.01.jpg", ("2020.01", "jpg")),
        ("a.seg.png", ("a", "seg.png")),
        ("a.b.seg.png", ("a.b", "seg.png")),
        ("a", ("a", "")),
        ("a.", ("a", "")),
        (".a.jpg", ("", "")),
    ],
)
def test_a_key_ends_where_a_known_extension_begins(name: str, split: tuple[str, str]) -> None:
    assert key_of(name, {"jpg", "png", "seg.png"}) == split


def test_a_slice_lists_the_files_of_its_keys(tmp_path: Path) -> None:
    for name in ("a.jpg", "a!b.jpg", "a.b.jpg", "b.jpg", "c.jpg", "0.jpg"):
        (tmp_path / name).touch()
    (tmp_path / "a.d").mkdir()
    files = Slice(str(tmp_path), "", "a", "a!b").files()
    assert {f.name for f in files} >= {"a.jpg", "a!b.jpg"}
    assert {f.name for f in files}.isdisjoint({"b.jpg", "c.jpg", "0.jpg", "a.d"})


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        planned(str(tmp_path / "none"), {"jpg"}, {"jpg"}, 10, [])
