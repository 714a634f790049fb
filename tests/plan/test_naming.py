"""Every shard has a name of its own, which it keeps."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2m_hpc.plan.naming import location, name_shards


def named(urls: list[str], known: dict[str, str] | None = None) -> dict[str, str]:
    """url to stem, where `known` have theirs."""
    known = known or {}
    new = [url for url in urls if url not in known]
    return {**known, **dict(zip(new, name_shards(new, known.values()), strict=True))}


@pytest.mark.parametrize(
    ("url", "stem"),
    [
        ("https://host/a.tar?token=[x]*", "a"),
        ("/d/00000.tar", "00000"),
        ("/d/00000.tar.gz", "00000"),
        ("/d/00000.TGZ", "00000"),
        ("/d/00000.tar.xz", "00000"),
        ("/d/00000.tar.bz2", "00000"),
        ("s3://bucket/d/00000.tar.zst", "00000"),
        ("/d/a.b.tar", "a.b"),
        ("/d/noextension", "noextension"),
        ("s3://bucket/d/00000.tar", "00000"),
        ("s3://bucket/d/a#1?.tar", "a#1?"),
        ("memory://00000.tar", "00000"),
        ("https://host/d/00000.tar?sig=/x.tar", "00000"),
        ("https://host/d/00000.tar#part", "00000"),
        ("pipe:aws s3 cp s3://bucket/d/00000.tar -", "00000"),
        ("pipe:cat '/d/two words.tar' | pv", "two words"),
        ("pipe:zcat </d/00000.tar.gz", "00000"),
        ("pipe:cat <00000.tar", "00000"),
        ("pipe:cat 00000.tar|pv", "00000"),
        ("pipe:get --file=00000.tar", "00000"),
        ("pipe:tar c d >&2; cat # 'open /d/00000.tar", "00000"),
    ],
)
def test_the_stem_is_the_tars(url: str, stem: str) -> None:
    assert named([url]) == {url: stem}


def test_commands_that_name_no_tar_get_names_of_their_own() -> None:
    urls = ["pipe:make-data 0", "pipe:make-data 1"]
    stems = name_shards(urls)
    assert len(set(stems)) == 2
    assert all(len(s) == 16 and s.isalnum() for s in stems)
    assert stems == name_shards(urls)


def test_stems_that_collide_get_their_folders_in_front() -> None:
    urls = ["/x/a/0.tar", "/x/b/0.tar", "/x/a/1.tar", "/p/c/2.tar", "/q/c/2.tar"]
    stems = named(urls)
    assert [stems[u] for u in urls] == ["a_0", "b_0", "1", "p_c_2", "q_c_2"]


def test_buckets_tell_urls_apart() -> None:
    urls = ["s3://one/d/0.tar", "s3://two/d/0.tar"]
    assert name_shards(urls) == ["one_d_0", "two_d_0"]


def test_a_password_in_a_url_is_never_part_of_a_name() -> None:
    urls = [f"ftp://me:secret@{host}/0.tar" for host in ("one", "two")]
    assert name_shards(urls) == ["one_0", "two_0"]


def test_a_tar_and_its_compressed_twin_in_one_folder_have_two_names() -> None:
    urls = ["/x/a.tar", "/x/a.tar.gz"]
    stems = name_shards(urls)
    assert len(set(stems)) == 2
    assert all(s.startswith("a_") for s in stems)


def test_known_shards_keep_their_stems() -> None:
    known = {"/x/a/0.tar": "0", "/gone/9.tar": "1"}
    stems = named(["/x/a/0.tar", "/x/b/0.tar", "/x/b/1.tar"], known)
    assert stems == {**known, "/x/b/0.tar": "b_0", "/x/b/1.tar": "b_1"}


@pytest.mark.parametrize("letter", ["x", "ß", "日"])
def test_names_leave_room_for_a_suffix_in_a_file_name(letter: str) -> None:
    long = letter * (250 // len(letter.encode()))
    deep = "/".join(["folder"] * 60)
    urls = [f"/x/{long}.tar", f"/y/{long}.tar", f"/a/{deep}/0.tar", f"/b/{deep}/0.tar"]
    stems = name_shards(urls)
    assert len(set(stems)) == 4
    assert all(len(stem.encode()) <= 220 for stem in stems)


PARTS = st.sampled_from(["a", "b", "a_b", "c"])
URLS = st.lists(
    st.builds(
        lambda start, folders, name, end: "/".join([start, *folders, name]) + end,
        st.sampled_from(["", "s3://a", "s3://b", "pipe:cat /x"]),
        st.lists(PARTS, max_size=3),
        PARTS,
        st.sampled_from([".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.zst", ".tbz", "", ".b.tar"]),
    ),
    unique=True,
    max_size=12,
)


@given(URLS)
def test_names_are_unique_and_fit_for_a_file(urls: list[str]) -> None:
    stems = named(urls)
    assert list(sorted(stems)) == sorted(urls)
    assert len(set(stems.values())) == len(urls)
    assert all(s and "/" not in s for s in stems.values())


@given(URLS, st.randoms(use_true_random=False))
def test_names_do_not_depend_on_the_order_of_the_patterns(urls: list[str], random: Any) -> None:
    shuffled = random.sample(urls, len(urls))
    assert named(urls) == named(shuffled)


@given(URLS, st.integers(0, 12))
def test_known_names_stay_when_urls_are_added(urls: list[str], cut: int) -> None:
    known = named(urls[:cut])
    stems = named(urls, known)
    assert {u: stems[u] for u in known} == known
    assert len(set(stems.values())) == len(urls)


def test_location_of_a_command_that_cannot_be_parsed_is_its_last_tar() -> None:
    assert location("pipe:echo 'open /d/0.tar -") == "/d/0.tar"
