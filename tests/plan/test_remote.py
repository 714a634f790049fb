"""URLs to tars, and how little is asked for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import fsspec
import pytest

from d2m_hpc.plan.remote import MISSING, WORTH_LISTING, expand


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A store with `memory://b/d/00.tar` and on; `memory.asked` counts the listings by folder."""
    fs = fsspec.filesystem("memory")
    for i in range(10):
        fs.pipe(f"/b/d/0{i}.tar", bytes(i))
    listing, asked = type(fs).ls, Counter[str]()

    def ls(self: Any, path: str, **options: Any) -> Any:
        asked[path] += 1
        return listing(self, path, **options)

    monkeypatch.setattr(type(fs), "ls", ls)
    monkeypatch.setattr(type(fs), "asked", asked, raising=False)
    yield fs
    fs.rm("/b", recursive=True)


def named(count: int, folder: str = "d") -> list[str]:
    return [f"memory://b/{folder}/{i:02d}.tar" for i in range(count)]


def test_many_names_in_a_folder_are_one_listing(memory: Any) -> None:
    assert [size for _, size in expand(named(10))] == list(range(10))
    assert memory.asked == {"/b/d": 1}


def test_each_folder_is_listed_once_whatever_the_order(memory: Any) -> None:
    memory.pipe("/b/e/00.tar", b"12345")
    both = [url for pair in zip(named(9), named(9, "e"), strict=True) for url in pair]
    sizes = dict(expand(both))
    assert list(sizes) == both
    assert sizes["memory://b/e/00.tar"] == 5
    assert sizes["memory://b/e/01.tar"] == MISSING
    assert memory.asked == {"/b/d": 1, "/b/e": 1}


def test_few_names_in_a_folder_are_not(memory: Any) -> None:
    few = named(WORTH_LISTING - 1)
    assert list(expand(few)) == [(url, None) for url in few]
    assert not memory.asked


def test_web_servers_are_not_asked() -> None:
    urls = [f"https://no.such.host.invalid/d/{i}.tar?key=*" for i in range(20)]
    assert list(expand(urls)) == [(url, None) for url in urls]


def test_globs_and_names_stay_in_their_order(memory: Any) -> None:
    memory.pipe("/b/g/z.tar", b"1")
    urls = ["memory://b/g/*.tar", *named(8)]
    first, *others = (url for url, _ in expand(urls))
    assert first.endswith("b/g/z.tar")
    assert others == named(8)
