"""Patterns to shards with names of their own, and shards to chunks."""

from __future__ import annotations

import bz2
import glob
import gzip
import json
import lzma
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kit import STATS, d2m, write_config, write_tar
from kit import write_shards as write_shards_of_samples

from d2m_hpc.config import Config, load
from d2m_hpc.errors import ConfigError, D2MError
from d2m_hpc.plan import braces, patterns
from d2m_hpc.plan.balance import chunk
from d2m_hpc.plan.naming import name_shards
from d2m_hpc.plan.patterns import Expansion, expand, plan_shards
from d2m_hpc.plan.workload import inspect
from d2m_hpc.run.records import Shard
from d2m_hpc.run.shards import read_shards, write_shards


def touch(folder: Path, *names: str) -> list[str]:
    """Files as long as their names; returns their paths."""
    paths = [folder / name for name in names]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * len(path.name))
    return [str(p) for p in paths]


def names(expansion: Expansion) -> list[str]:
    return [os.path.basename(url) for url in expansion.sizes]


def zstd(data: bytes) -> bytes:
    return pa.compress(data, "zstd", asbytes=True)  # type: ignore[no-any-return]


@pytest.fixture
def memory() -> Iterator[Any]:
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    yield fs
    fs.store.clear()


# --- local patterns ---


def test_a_range_of_braces_keeps_its_zeros_and_its_order(tmp_path: Path) -> None:
    paths = touch(tmp_path, *(f"{i:05d}.tar" for i in range(8, 12)))
    found = expand([f"{tmp_path}/{{00008..00011}}.tar"])
    assert found == Expansion(sizes=dict.fromkeys(paths, 9))


def test_braces_nest(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.tar", "a/2.tar", "b/x.tar")
    found = expand([f"{tmp_path}/{{a/{{1..2}},b/x}}.tar"])
    assert names(found) == ["1.tar", "2.tar", "x.tar"]
    assert not found.missing
    assert not found.mistakes


@pytest.mark.parametrize("pattern", ["*.tar", "0000?.tar", "0000[0-2].tar", "{*,nothing}.tar"])
def test_globs_come_sorted_and_with_sizes(tmp_path: Path, pattern: str) -> None:
    touch(tmp_path, "00002.tar", "00000.tar", "00001.tar", "00000_stats.json")
    found = expand([f"{tmp_path}/{pattern}"])
    there = {n: s for n, s in zip(names(found), found.sizes.values(), strict=True) if s}
    assert list(there.items()) == [(f"0000{i}.tar", 9) for i in range(3)]


def test_two_stars_search_all_folders_below(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.tar", "a/b/2.tar", "3.tar")
    assert sorted(names(expand([f"{tmp_path}/**/*.tar"]))) == ["1.tar", "2.tar", "3.tar"]


def test_a_glob_names_no_folders(tmp_path: Path) -> None:
    paths = touch(tmp_path, "1.tar", "sub/2.tar")
    (tmp_path / "folder.tar").mkdir()
    assert expand([f"{tmp_path}/*"]) == Expansion(sizes={paths[0]: 5})


@pytest.mark.parametrize(
    "pattern",
    [
        "*",
        "*.tar",
        ".*.tar",
        "**",
        "**/*.tar",
        "**/.*.tar",
        "s*/*.tar",
        "sub/**",
        "[!s]*",
        "sub*/2.tar",
        "*/*/*.tar",
        "**/s*/**/*.tar",
        "link*",
        "none*/*.tar",
    ],
)
def test_a_glob_names_what_pythons_does_but_for_folders(tmp_path: Path, pattern: str) -> None:
    there = "1.tar .2.tar sub/2.tar sub/.3.tar sub/deep/4.tar sub-b/5.tar .hidden/6.tar [x].tar"
    touch(tmp_path, *there.split())
    (tmp_path / "folder.tar").mkdir()
    (tmp_path / "link.tar").symlink_to(tmp_path / "1.tar")
    (tmp_path / "link-to-nothing.tar").symlink_to(tmp_path / "nothing")
    (tmp_path / "link-to-sub").symlink_to(tmp_path / "sub")
    expected = sorted(set(glob.glob(f"{tmp_path}/{pattern}", recursive=True)))
    if pattern.startswith("**"):  # through the link it has the tars of `sub` once more
        expected = [path for path in expected if "/link-to-sub/" not in path]
    assert list(expand([f"{tmp_path}/{pattern}"]).sizes) == [
        path for path in expected if not os.path.isdir(path)
    ]


def test_a_file_that_goes_while_its_folder_is_listed_is_missing_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, "0.tar", "1.tar")
    real = os.scandir

    class Listing:
        def __init__(self, folder: str) -> None:
            with real(folder) as entries:
                self.entries = list(entries)
            (tmp_path / "0.tar").unlink(missing_ok=True)

        def __enter__(self) -> Any:
            return iter(self.entries)

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(os, "scandir", Listing)
    found = expand([f"{tmp_path}/*.tar"])
    assert list(found.sizes.values()) == [None, 5]
    assert found.missing == [f"{tmp_path}/0.tar"]


def test_a_folder_that_cannot_be_listed_is_a_mistake_and_not_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, "a/0.tar", "b/1.tar")
    real = os.scandir

    def denied(folder: Any) -> Any:
        if str(folder).endswith("b/"):
            raise PermissionError(13, "Permission denied", folder)
        return real(folder)

    monkeypatch.setattr(os, "scandir", denied)
    [mistake] = expand([f"{tmp_path}/*/*.tar"]).mistakes
    assert "PermissionError" in mistake
    assert f"{tmp_path}/b/" in mistake


def test_only_what_matches_is_asked_for_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stat is a question to a server that thousands of others ask."""
    touch(tmp_path, "0.tar", "0_stats.json", "0.parquet")
    asked = []
    real = patterns._size
    monkeypatch.setattr(patterns, "_size", lambda e, sized: asked.append(e.name) or real(e, sized))
    assert len(expand([f"{tmp_path}/*.tar"]).sizes) == 1
    assert asked == ["0.tar"]


@pytest.mark.parametrize("pattern", ["*.tar", "{0..4}.tar"])
def test_sizes_are_left_out_where_they_are_not_wanted(tmp_path: Path, pattern: str) -> None:
    """What is no file is seen all the same."""
    paths = touch(tmp_path, "0.tar", "1.tar", "2.tar")
    (tmp_path / "3.tar").symlink_to("nowhere")
    missing = [f"{tmp_path}/3.tar", *[f"{tmp_path}/4.tar"] * ("{" in pattern)]
    found = expand([f"{tmp_path}/{pattern}"], sized=False)
    assert found == Expansion(dict.fromkeys([*paths, *missing]), missing=missing)


def test_a_list_keeps_its_order_and_counts_what_is_named_again(tmp_path: Path) -> None:
    a, b, c = touch(tmp_path, "a.tar", "b.tar", "c.tar")
    found = expand([c, f"{tmp_path}/*.tar", a])
    assert list(found.sizes) == [c, a, b]
    assert found.duplicates == 2


def test_relative_paths_and_home_become_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, "d/a.tar")
    monkeypatch.chdir(tmp_path / "d")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expand(["a.tar", "./a.tar", "~/d/a.tar", "../d/a.tar"]) == Expansion(
        sizes={str(tmp_path / "d/a.tar"): 5}, duplicates=3
    )


def test_files_of_a_range_that_are_not_there_are_listed_and_still_planned(tmp_path: Path) -> None:
    touch(tmp_path, "0.tar", "2.tar")
    found = expand([f"{tmp_path}/{{0..3}}.tar"])
    assert found.missing == [f"{tmp_path}/1.tar", f"{tmp_path}/3.tar"]
    assert list(found.sizes.values()) == [5, None, 5, None]
    assert not found.mistakes


@pytest.mark.parametrize("pattern", ["no/*.tar", "no/{0..2}.tar", "no.tar", "folder", "[", "", "{"])
def test_a_pattern_that_matches_nothing_is_a_mistake_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    touch(tmp_path, "a.tar")
    found = expand([pattern, "a.tar"])
    more = "; `inputs` in place of `input_tars` takes pictures" * (pattern == "folder")
    assert found.mistakes == [f"input_tars: found no tar for {pattern!r}; check the path{more}"]
    with pytest.raises(ConfigError, match=r"my.yml: 1 mistake") as raised:
        inspect(asking(pattern, "a.tar"), "my.yml")
    assert repr(pattern) in str(raised.value)


def test_good_patterns_pass_the_inspection(tmp_path: Path) -> None:
    [tar] = touch(tmp_path, "a.tar")
    assert inspect(asking(tar), "my.yml").sizes == {tar: 5}


def asking(*patterns: str) -> Config:
    return Config(models=["text-stats"], input_tars=[*patterns], output_metadata_dir="out")


@pytest.mark.parametrize(
    "name",
    [
        "{0..2}.tar",
        "a{b.tar",
        "[0-9].tar",
        "what?*.tar",
        "two words.tar",
        'it\'s "quoted".tar',
        "döner-日本.tar",
        "a#b%20c.tar",
        "$HOME.tar",
        "back\\slash.tar",
    ],
)
def test_a_file_of_that_very_name_comes_before_any_expansion(tmp_path: Path, name: str) -> None:
    (path,) = touch(tmp_path, name)
    found = expand([path])
    assert list(found.sizes) == [path]
    assert not found.missing
    assert name_shards([path]) == [name.removesuffix(".tar")]


def test_a_glob_finds_names_that_look_like_patterns(tmp_path: Path) -> None:
    paths = touch(tmp_path, "[0-9].tar", "{0..2}.tar")
    assert list(expand([f"{tmp_path}/*.tar"]).sizes) == paths


@pytest.mark.parametrize("name", ["run*", "a?b", "[ab]", "x[!y]z"])
def test_this_folder_is_no_pattern(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = touch(tmp_path / name, "sub/1.tar", "sub/deep/2.tar")
    for other in ("run1", "axb", "a", "xaz"):
        touch(tmp_path / other, "sub/1.tar", "sub/deep/2.tar")
    monkeypatch.chdir(tmp_path / name)
    assert list(expand(["sub/*.tar"]).sizes) == own[:1]
    assert list(expand([f"../{name}/sub/1.tar", "sub"]).sizes) == own[:1]
    assert list(expand(["su[b]/**/?.tar"]).sizes) == own
    assert list(expand(["{sub,sub/deep}/?.tar"]).sizes) == own


@pytest.mark.parametrize(
    "pattern", ["~/t/*.tar", "$DATA/t/*.tar", "${DATA}/t/{1,2}.tar", "$DATA/t"]
)
def test_values_of_variables_are_no_patterns_where_they_are_folders(
    pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = touch(tmp_path / "v[12]", "t/1.tar", "t/2.tar")
    touch(tmp_path / "v1", "t/1.tar", "t/2.tar", "t/3.tar")
    for name in ("DATA", "HOME"):
        monkeypatch.setenv(name, str(tmp_path / "v[12]"))
    path = write_config(tmp_path / "c.yml", STATS, input_tars=pattern, output_metadata_dir="o")
    assert list(expand(load(path).input_tars).sizes) == own
    monkeypatch.setenv("DATA", str(tmp_path / "v[1]"))  # no folder: a pattern
    if pattern == "$DATA/t/*.tar":
        assert names(expand(load(path).input_tars)) == ["1.tar", "2.tar", "3.tar"]


def test_a_missing_tar_of_braces_is_told_below_such_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path / "v[12]", "1.tar")
    monkeypatch.setenv("DATA", str(tmp_path / "v[12]"))
    path = write_config(
        tmp_path / "c.yml", STATS, input_tars="$DATA/{1..2}.tar", output_metadata_dir="o"
    )
    assert expand(load(path).input_tars).missing == [str(tmp_path / "v[12]/2.tar")]


def test_two_stars_follow_links_out_of_the_tree_alone(tmp_path: Path) -> None:
    """A link to a folder above, or beside its own, has tars that are there already."""
    paths = touch(tmp_path, "t/1.tar", "t/a/2.tar", "t/b/3.tar", "other/4.tar")
    for link, target in (
        ("t/a/up", ".."),
        ("t/self", "."),
        ("t/b/to", "../a"),
        ("t/o", "../other"),
    ):
        (tmp_path / link).symlink_to(target)
    there = [str(tmp_path / "t/o/4.tar")]
    for pattern in ("t/**/*.tar", "t/**/**/*.tar", "**/t/**/?.tar"):
        found = expand([f"{tmp_path}/{pattern}"])
        assert list(found.sizes) == sorted([*paths[:3], *there]), pattern
        assert not found.mistakes


def test_two_stars_name_the_tars_of_a_folder_once(tmp_path: Path) -> None:
    """By its own path where there is one in the tree, else by the first of the links to it."""
    paths = touch(tmp_path, "t/b/1.tar", "t/b/c/2.tar", "else/3.tar", "else/d/4.tar")
    links = {"a": "b", "z": "b/c", "n": "../else", "m": "../else/d", "o": "n"}
    for link, target in links.items():
        (tmp_path / "t" / link).symlink_to(target)
    found = expand([f"{tmp_path}/t/**/*.tar"])
    assert [path.removeprefix(f"{tmp_path}/t/") for path in found.sizes] == [
        *("b/1.tar", "b/c/2.tar"),
        *("m/4.tar", "n/3.tar"),
    ]
    assert list(expand([f"{tmp_path}/t/a/**/*.tar"]).sizes) == [
        path.replace("/b/", "/a/") for path in paths[:2]
    ]


def test_a_link_to_itself_is_missing_and_spoils_no_other(tmp_path: Path) -> None:
    paths = touch(tmp_path, "1.tar")
    (tmp_path / "loop.tar").symlink_to("loop.tar")
    found = expand([f"{tmp_path}/**/*.tar"])
    assert found.missing == [str(tmp_path / "loop.tar")]
    assert list(found.sizes) == [*paths, *found.missing]
    assert not found.mistakes


@pytest.mark.parametrize("pattern", ["*.tar", "odd.tar", "", "{odd,1}.tar", "**/*.tar"])
@pytest.mark.parametrize("sized", [True, False])
def test_what_is_no_regular_file_is_named_and_not_planned(
    pattern: str, sized: bool, tmp_path: Path
) -> None:
    touch(tmp_path, "1.tar")
    os.mkfifo(tmp_path / "odd.tar")
    found = expand([f"{tmp_path}/{pattern}"], sized)
    assert f"{tmp_path}/odd.tar is a device, a pipe or a socket" in str(found.mistakes[0])
    assert str(tmp_path / "odd.tar") not in found.sizes
    assert not found.missing


def test_an_awkward_folder_is_searched(awkward_path: Path) -> None:
    touch(awkward_path, "0.tar", "1.tar")
    for pattern in ("*.tar", "{0..1}.tar"):
        assert names(expand([f"{awkward_path}/{pattern}"])) == ["0.tar", "1.tar"]


def test_a_name_that_is_not_utf8_is_a_mistake(tmp_path: Path) -> None:
    """Neither the plan's parquet nor the outputs' can hold it."""
    touch(tmp_path, "a.tar")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.tar")).touch()
    found = expand([f"{tmp_path}/*.tar"])
    assert names(found) == ["a.tar"]
    (mistake,) = found.mistakes
    assert mistake == (f"input_tars: the name '{tmp_path}/caf\\xe9.tar' is not UTF-8; rename it")


# --- remote patterns and commands ---


@pytest.mark.parametrize("pattern", ["*.tar", "0?.tar", "0[0-2].tar"])
def test_globs_of_urls_are_listed_with_sizes(memory: Any, pattern: str) -> None:
    for i in range(3):
        memory.pipe(f"/bucket/d/0{i}.tar", bytes(10 + i))
    memory.pipe("/bucket/d/sub.tar/x", b"")
    found = expand([f"memory://bucket/d/{pattern}"])
    assert [u.rsplit("/", 1)[-1] for u in found.sizes] == ["00.tar", "01.tar", "02.tar"]
    assert list(found.sizes.values()) == [10, 11, 12]
    assert not found.mistakes


def test_a_glob_of_urls_that_matches_nothing_is_a_mistake(memory: Any) -> None:
    assert expand(["memory://bucket/*.tar"]).mistakes == [
        "input_tars: found no tar for 'memory://bucket/*.tar'; check the path"
    ]


def test_braces_of_urls_expand_without_asking_the_store() -> None:
    found = expand(["memory://bucket/{a,b}/{00..01}.tar"])
    urls = [f"memory://bucket/{folder}/0{i}.tar" for folder in "ab" for i in range(2)]
    assert found == Expansion(sizes=dict.fromkeys(urls))


@pytest.mark.parametrize("pattern", ["s4://bucket/*.tar", "s4://bucket/{0..1}.tar"])
def test_a_store_that_cannot_be_reached_is_a_mistake(pattern: str) -> None:
    (mistake,) = expand([pattern]).mistakes
    assert mistake.startswith(f"input_tars: cannot list {pattern!r}: ValueError: ")
    assert "s4" in mistake


def test_file_urls_are_the_local_files(awkward_path: Path) -> None:
    (path,) = touch(awkward_path, "a.tar")
    found = expand([f"file://{awkward_path}/*.tar", str(path)])
    assert found.sizes == {str(path): 5}
    assert found.duplicates == 1


def test_braces_in_commands_expand_and_globs_do_not(tmp_path: Path) -> None:
    touch(tmp_path, "0.tar")
    found = expand([f"pipe:cat {tmp_path}/{{0..1}}.tar | head -c 5?*[a]"])
    assert found.sizes == {f"pipe:cat {tmp_path}/{i}.tar | head -c 5?*[a]": None for i in range(2)}
    assert not found.mistakes


# --- folders, and what is no tar ---


def test_a_folder_means_the_tars_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "a/1.tar", "a/0.tgz", "a/0_stats.json", "a/b/2.tar", "c/3.TAR", "a/x.parquet")
    monkeypatch.chdir(tmp_path)
    assert names(expand(["a"])) == ["0.tgz", "1.tar"]
    assert names(expand([f"{tmp_path}/a/"])) == ["0.tgz", "1.tar"]
    assert names(expand(["{a,c}"])) == ["0.tgz", "1.tar", "3.TAR"]
    assert names(expand(["file://" + str(tmp_path / "c")])) == ["3.TAR"]


def test_a_folder_of_a_store_means_the_tars_in_it(memory: Any) -> None:
    for name in ("d/1.tar", "d/0.tar.xz", "d/0.json", "d/sub/2.tar"):
        memory.pipe(f"/bucket/{name}", b"12345")
    for folder in ("memory://bucket/d", "memory://bucket/d/"):
        assert names(expand([folder])) == ["0.tar.xz", "1.tar"]


def test_files_that_are_no_tars_are_told_with_what_they_are(tmp_path: Path) -> None:
    """As img2dataset leaves them beside its tars."""
    touch(tmp_path, *(f"{i:05d}.tar" for i in range(6)))
    for i in range(6):
        (tmp_path / f"{i:05d}.parquet").write_bytes(b"PAR1" + bytes(50))
        (tmp_path / f"{i:05d}_stats.json").write_text('{"count": 1}')
    [mistake] = expand([f"{tmp_path}/*"]).mistakes
    assert mistake.startswith(f"input_tars: '{tmp_path}/*' names 12 files that are no tars: ")
    assert f"6 with .parquet ({tmp_path}/00000.parquet: it is a parquet file)" in mistake
    assert f"6 with .json ({tmp_path}/00000_stats.json: it is JSON" in mistake
    assert mistake.endswith(f"valid is for example '{tmp_path}/*.tar'")
    [named] = expand([f"{tmp_path}/00003.parquet"]).mistakes
    assert "1 with .parquet" in named
    assert "for example" not in named


def test_tars_may_have_names_of_any_kind(tmp_path: Path) -> None:
    for i in range(5):
        write_tar(tmp_path / f"part-{i:04d}", {"a.txt": b"1"})
        write_tar(tmp_path / f"shard.{i}", {"a.txt": b"1"})
    write_tar(tmp_path / "packed.gz", {"a.txt": b"1"}, mode="w:gz")
    found = expand([f"{tmp_path}/*"])
    assert (len(found.sizes), found.mistakes) == (11, [])


@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress, bz2.compress, zstd])
def test_compressed_files_are_looked_into(pack: Callable[[bytes], bytes], tmp_path: Path) -> None:
    write_tar(
        tmp_path / "plain.tar", {f"{i}.txt": random.Random(i).randbytes(999) for i in range(9)}
    )
    (tmp_path / "packed").write_bytes(pack((tmp_path / "plain.tar").read_bytes()))
    captions = json.dumps([{"caption": f"picture {i}"} for i in range(20_000)]).encode()
    (tmp_path / "captions.json.x").write_bytes(pack(captions))
    (tmp_path / "cut.y").write_bytes(pack(captions)[:20])
    [mistake] = expand([f"{tmp_path}/*"]).mistakes
    assert "names 1 files that are no tars: 1 with .json.x" in mistake
    assert re.search(r"compressed with (gzip|xz|bzip2|zstd), it is JSON", mistake)


def test_what_is_no_tar_on_a_store_is_told(memory: Any) -> None:
    memory.pipe("/bucket/d/0.tar", b"0")
    memory.pipe("/bucket/d/0.html", b"<!DOCTYPE html><html>")
    [mistake] = expand(["memory://bucket/d/*"]).mistakes
    assert "1 with .html (memory:///bucket/d/0.html: it is an HTML page" in mistake


def test_a_wrong_glob_is_told_with_its_line_and_nothing_is_planned(tmp_path: Path) -> None:
    write_shards_of_samples(tmp_path / "wds", 2, samples=2)
    (tmp_path / "wds" / "00000.parquet").write_bytes(b"PAR1")
    values = {**STATS, "input_tars": ["wds/*"], "output_metadata_dir": "out"}
    config = write_config(tmp_path / "c.yml", values)
    for arguments in (("--dry-run",), ("--no-preflight",), ()):
        ended = d2m("submit", config, "--local", *arguments, cwd=tmp_path)
        assert ended.returncode == 2, ended.stderr
        assert "1 with .parquet" in ended.stderr
        assert "| - wds/*" in ended.stderr
    assert not (tmp_path / "out").exists()
    ended = d2m("submit", config, "--local", "--set", "input_tars=wds", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert {p.stem for p in (tmp_path / "out").glob("*.parquet")} == {"00000", "00001"}


# --- braces ---


@pytest.mark.parametrize(
    "pattern",
    [
        "/x/{0..99999}::/y/{0..99999}.tar",
        "/x/{00000000..20000000}.tar",
        "{0..999}{0..999}{0..999}",
        "a{{0..9999},{a..z}}{0..99999}",
        "{0..1" + "0" * 4000 + "}",
        "{a,b}" * 5000,
        "s3://bucket/{0..99999999}.tar",
        "pipe:cat {0..99999999}.tar",
        "{" * 45 + "a,b" + "}" * 45,
        "{0..99999}" + "x" * 100_000,
    ],
)
def test_a_product_of_braces_is_counted_before_it_is_expanded(pattern: str) -> None:
    found = expand([pattern])
    [mistake] = found.mistakes
    assert not found.sizes
    assert "stand for" in mistake or "nested more than" in mistake
    assert ("entries of a list" in mistake) == ("::" in pattern)
    assert len(mistake) < 500


def test_all_patterns_together_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(braces, "MOST", 15)
    assert len(expand(["/a/{0..9}.tar", "/b/{0..4}.tar"]).sizes) == 15
    assert "valid are 5 at most" in expand(["/a/{0..9}.tar", "/b/{0..9}.tar"]).mistakes[1]


@given(st.text(alphabet="{},.-09az", max_size=24))
def test_braces_are_counted_as_they_are_expanded(pattern: str) -> None:
    try:
        count = braces.require_few(pattern, 10_000)
    except D2MError:
        return
    assert count == len(list(braces.expand(pattern)))


# --- shards ---

URLS = st.lists(
    st.sampled_from([f"/{a}/{b}.tar" for a in "xyz" for b in ("0", "1", "x_0")]), unique=True
)


@given(URLS, st.integers(0, 12))
def test_planning_again_changes_no_shard_and_drops_none(urls: list[str], cut: int) -> None:
    first = plan_shards(dict.fromkeys(urls[:cut], 1))
    second = plan_shards(dict.fromkeys(urls[1:], 2), first)
    assert [s[:2] for s in second[: len(first)]] == [s[:2] for s in first]
    assert {s.url for s in second} == {*urls[:cut], *urls[1:]}
    assert plan_shards(dict.fromkeys(urls[1:], 2), second) == second
    assert len({s.stem for s in second}) == len(second)


def test_a_shard_that_matches_no_pattern_now_keeps_its_size_and_place() -> None:
    known = [Shard("0", "/x/0.tar", 7), Shard("1", "/x/1.tar", 8)]
    sizes = {"/x/2.tar": 9, "/x/1.tar": 10}
    assert plan_shards(sizes, known) == [
        Shard("0", "/x/0.tar", 7),
        Shard("1", "/x/1.tar", 10),
        Shard("2", "/x/2.tar", 9),
    ]


def test_only_new_tars_whose_sizes_are_not_known_are_asked(tmp_path: Path) -> None:
    old, new, told = touch(tmp_path, "old.tar", "new.tar", "told.tar")
    sizes = {old: None, new: None, told: 3, "s3://b/a.tar": None, f"{tmp_path}/gone.tar": None}
    planned = plan_shards(sizes, [Shard("old", old, 1)])
    assert [s.size for s in planned] == [1, 7, 3, None, None]


# --- the plan on disk ---


@pytest.mark.parametrize("folder", [".d2m", "date=2026", "döner & 'x' \"y\""])
def test_shards_are_read_back_as_they_were_written(tmp_path: Path, folder: str) -> None:
    shards = [
        Shard("0", "/x/0.tar", 7),
        Shard("ü {a,b}", "pipe:cat 'ü {a,b}'\n", None),
        Shard("2", "s3://b/2.tar", 2**40),
    ]
    path = tmp_path / folder / "shards.parquet"
    write_shards(path, shards)
    assert read_shards(path) == shards
    write_shards(path, [])
    assert read_shards(path) == []
    assert [p.name for p in path.parent.iterdir()] == ["shards.parquet"]


def test_a_plan_is_written_without_pandas(tmp_path: Path) -> None:
    """Which takes a second to import, where it is installed."""
    code = (
        "import sys; from pathlib import Path; from d2m_hpc.run import shards as plan;"
        "shards = [plan.Shard('ü', 's3://b/ü.tar', None), plan.Shard('b', '/b.tar', 7)];"
        "path = Path(sys.argv[1]);"
        "plan.write_shards(path, shards);"
        "assert plan.read_shards(path) == shards and plan.read_stems(path) == ['ü', 'b'];"
        "assert 'pandas' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "s.parquet")], check=True)


def test_a_run_without_a_plan_has_no_shards(tmp_path: Path) -> None:
    assert read_shards(tmp_path / "shards.parquet") == []


@given(st.integers(0, 40), st.integers(1, 50))
def test_chunks_partition_the_shards_in_order(count: int, per_task: int) -> None:
    shards = [Shard(str(i), f"/{i}.tar") for i in range(count)]
    chunks = chunk(shards, per_task)
    assert [s for c in chunks for s in c] == shards
    assert all(len(c) == per_task for c in chunks[:-1])
    assert all(0 < len(c) <= per_task for c in chunks)
