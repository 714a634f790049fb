"""Count and describe rejections and notices: samples that cannot be used, members of no sample."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence

from d2m_hpc.run.records import Rejection
from d2m_hpc.storage.texts import safe
from d2m_hpc.worker.read.names import EXTENSIONS, Members

KIND = {extension: kind for kind, known in EXTENSIONS.items() for extension in known}
SHOWN = 3
"""Names that are shown of many."""
NAME = 40
"""Characters of each name."""

_RESERVED = re.compile("__[^/]*__($|/)")
_FOLDERS = (
    r"__MACOSX|@eaDir|PaxHeaders?(\.\d+)?|lost\+found"
    r"|\.(AppleDouble|Trashes|Spotlight-V100|fseventsd|ipynb_checkpoints|git)"
)
_FILES = (
    r"\._[^/]*|\.(DS_Store|localized|directory|gitattributes|gitignore|gitkeep|nfs[0-9a-f]+)"
    r"|(?i:(eh)?thumbs\.db|desktop\.ini)|pax_global_header|@LongLink|@PaxHeader|_SUCCESS"
    r"|(?i:readme|licen[cs]e)(\.(?i:md|txt|rst|html?|pdf))?"
    r"|(COPYING|CHANGELOG|CHANGES|AUTHORS|NOTICE|CITATION|MANIFEST)(\.(md|txt|rst|cff))?"
    r"|(?i:(md5|sha\d+|crc32|check)sums?(\.(md5|sha\d+|txt))?)"
    r"|[^/]*\.(?i:md5|sha(1|224|256|384|512)|(md5|sha(1|256|512))sums?|crc(32c?)?|sfv|asc|sig|par2)"
    r"|[^/]*~|\.[^/]*\.sw[a-p]"
)
_HIDDEN = re.compile(r"((?:.*/)?\.)([^/]*)", re.DOTALL)
_FOREIGN = re.compile(rf"(.*/)?(({_FOLDERS})/.*|({_FILES}))", re.DOTALL)

UNREAD = "foreign members are not read: {}"
RESERVED = "members with a reserved name (__...__) are not read: {}"
LINKS = "links or special files are not read: {}"
UNUSED = "members are not used, as their sample has another of the kind: {}"
PARTS = "further members of samples are not used: {}"

LINK = "a link or a special file"
MERGED = "merged into another sample: its name holds a dot before the extension"
NAMELESS = "a member without an extension"
HIDDEN = "a name that begins with a dot has no key before its first dot; rename it"
SKIPPED = "skipped: webdataset reserves names that begin with __...__"
MOST_PARTS = 16
"""Kinds of further members that a data set's samples may have; more kinds are samples of their
own."""

APART = "members of a sample are not next to one another ({}); pack again with `tar --sort=name`"
DOTTED = "a key ends at its name's first dot ({}); rename so that only the extension has one"
LINKED = "members are links ({}); pack again with `tar --dereference --hard-dereference`"
LINKED_FILES = "files are links ({}); copy what they lead to in their place, as `cp -L` does"


def is_foreign(name: str) -> bool:
    """Whether a member belongs to an operating system or a tool, or describes the archive."""
    return _FOREIGN.fullmatch(name) is not None


def is_reserved(name: str) -> bool:
    """Whether webdataset skips a member as its own note."""
    if "/" not in name and name.startswith("__") and name.endswith("__"):
        return True
    return _RESERVED.match(name) is not None


def kind_of(extension: str) -> str:
    """A member's kind by its name after the last dot; empty for an unknown one."""
    return KIND.get(extension.rpartition(".")[2].lower(), "")


def lacks(members: Collection[str], needed: Members) -> bool:
    """Whether a sample with these extensions has no member of a needed kind."""
    return any(not any(e in members for e in names) for names in needed.values())


class Notes:
    """Counts members by the note on them, and keeps the first names."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._names: dict[str, list[str]] = {}

    def add(self, what: str, name: str) -> None:
        """Count a member for a note: a sentence with braces for the names."""
        self._counts[what] += 1
        if self._counts[what] <= SHOWN:
            self._names.setdefault(what, []).append(safe(name, NAME))

    def count(self, what: str) -> int:
        return self._counts[what]

    def texts(self) -> list[str]:
        return [what.format(self._some(what, SHOWN)) for what in self._counts]

    def foremost(self, at_least: float = 0) -> str:
        """The note on most members, with one name; empty below `at_least` members."""
        most = self._counts.most_common(1)
        return next((w.format(self._some(w, 1)) for w, count in most if count >= at_least), "")

    def _some(self, what: str, number: int) -> str:
        names = self._names[what][:number]
        others = self._counts[what] - len(names)
        return ", ".join(names) + (f" and {others} more" if others else "")


class Ledger:
    """Accounts for a tar's members outside of samples, and for unused ones.

    Attributes:
        strays: members that should be samples and are none, one for each would-be sample.
        notes: on members that are not missed.
        causes: why samples lack members, as far as the tar tells.

    Args:
        needed: the members that make a sample a row.
        linked: the note on links that samples lack.
    """

    def __init__(self, needed: Members, linked: str = LINKED) -> None:
        self.strays: list[Rejection] = []
        self.notes, self.causes = Notes(), Notes()
        self._needed, self._linked = needed, linked
        self._uses = Counter(name for names in needed.values() for name in names)
        self._reserved = ""
        self._hidden: tuple[str, set[str]] = ("", set())
        self._links: dict[str, list[tuple[str, str]]] = {}
        self._parts: dict[str, list[str]] = {}

    def stray(self, name: str, reason: str) -> None:
        self.strays.append(Rejection(name, reason))

    def takes(self, name: str, key: str | None, extension: str | None, is_file: bool) -> bool:
        """Account for a member that does not continue a sample; False if it begins one."""
        if is_foreign(name):
            self.notes.add(UNREAD, name)
        elif is_reserved(name):
            self._reserve(name, key, extension or "")
        elif key is None:
            self._nameless(name)
        elif not is_file:
            self._links.setdefault(key, []).append(((extension or "").lower(), name))
        else:
            return False
        return True

    def _nameless(self, name: str) -> None:
        """Account for a member without a key; members of one would-be sample count once."""
        dotted = _HIDDEN.fullmatch(name)
        if not dotted or not kind_of(dotted[2]):
            self.stray(name, NAMELESS)
            return
        stem, _, extension = dotted[2].lstrip(".").partition(".")
        # A name of just an extension belongs to the sample without a name.
        key = name.removesuffix(f".{extension}") if extension else dotted[1]
        extension = (extension or stem).lower()
        if key != self._hidden[0] or extension in self._hidden[1]:
            self._hidden = (key, set())
            self.stray(name, HIDDEN)
        self._hidden[1].add(extension)

    def _reserve(self, name: str, key: str | None, extension: str) -> None:
        if key is None or kind_of(extension) not in ("image", "text"):
            self.notes.add(RESERVED, name)
        elif key != self._reserved:  # it looks like a sample
            self._reserved = key
            self.stray(name, SKIPPED)

    def settle(self, key: str, members: Collection[str], again: bool) -> list[str]:
        """Account for a complete sample; return its links' extensions if it lacks members for them.

        Args:
            members: the sample's extensions.
            again: other keys stood between it and an earlier sample of its key.
        """
        if again and lacks(members, self._needed):
            self.causes.add(APART, key)
        if len(members) > len(self._needed) or any("." in e for e in members):
            self._settle_spare(key, members)
        return self._settle_links(key, members) if self._links else []

    def _settle_links(self, key: str, members: Collection[str]) -> list[str]:
        links = self._links.pop(key, [])
        if links and lacks(members, self._needed):
            self.causes.add(self._linked, links[0][1])
            return [extension for extension, _ in links]
        for _, name in links:
            self.notes.add(LINKS, name)
        return []

    def _settle_spare(self, key: str, members: Collection[str]) -> None:
        """Account for a sample's members beyond one of a kind."""
        merged: list[str] = []
        own: dict[str, list[str]] = {}
        for kind, names in self._needed.items():
            plain = [e for e in names if e in members]
            dotted = [e for e in members if "." in e and e not in self._uses and kind_of(e) == kind]
            for extension in plain[1:]:
                if self._uses[extension] == 1:  # another text may be there
                    self.notes.add(UNUSED, f"{key}.{extension}")
            if dotted and not plain:  # the first one stands for the sample
                self.causes.add(DOTTED, f"{key}.{dotted[0]}")
                merged = max(merged, dotted[1:], key=len)
            elif dotted:
                for extension in dotted:
                    own.setdefault(_part(extension), []).append(extension)
        for extension in merged:
            self._merge(f"{key}.{extension}")
        for part, extensions in own.items():
            if part not in map(_part, merged):
                self._settle_part(key, part, extensions)

    def _settle_part(self, key: str, part: str, extensions: Sequence[str]) -> None:
        name = f"{key}.{extensions[0]}"
        if 1 < len(self._needed) == len({*map(kind_of, extensions)}):
            self._merge(name)  # it has all that makes a row
        else:
            self._parts.setdefault(part, []).append(name)

    def _merge(self, name: str) -> None:
        self.stray(name, MERGED)
        self.causes.add(DOTTED, name)

    def finish(self, count: int) -> None:
        """Account for whatever only a whole tar tells, given its number of samples."""
        for links in self._links.values():
            self.stray(links[0][1], LINK)
            self.causes.add(self._linked, links[0][1])
        series = Counter(map(_form, self._parts))
        for part, names in self._parts.items():
            # Most samples of a data set may have a further part: `a.seg.png` beside each `a.jpg`.
            # But few samples with many of `a.1.jpg`, `a.2.jpg` may as well be frames of films.
            number = series[_form(part)]
            is_series = 1 < number >= count and kind_of(names[0]) == "image"
            if len(self._parts) <= MOST_PARTS and 2 * len(names) >= count and not is_series:
                for name in names:
                    self.notes.add(PARTS, name)
            else:
                for name in names:
                    self._merge(name)


def _part(extension: str) -> str:
    return extension.rpartition(".")[0]


def _form(part: str) -> str:
    """A further part's name without its number."""
    return re.sub(r"\d+", "0", part)
