"""Write a first config for some shards: the models that fit them, their samples' fields."""

from __future__ import annotations

import glob
import io
import json
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from itertools import islice, repeat
from pathlib import Path
from typing import Any, BinaryIO, cast

import yaml

from d2m_hpc.config import Config, load
from d2m_hpc.config.places import Mistake
from d2m_hpc.errors import ConfigError
from d2m_hpc.models import weights
from d2m_hpc.models.family import ModelSpec
from d2m_hpc.models.inputs import PICTURES
from d2m_hpc.models.registry import builtin
from d2m_hpc.plan import patterns
from d2m_hpc.plan.naming import is_shard
from d2m_hpc.run import values
from d2m_hpc.run.slices import Tree, planned
from d2m_hpc.storage import asked_for, stores
from d2m_hpc.storage.texts import counted, safe
from d2m_hpc.storage.urls import is_folder, is_local, is_pipe

TARS, SAMPLES = 3, 100
"""How many tars are looked into, and samples of each."""
START = 16 << 20
"""Bytes of a tar on a store, or of a compressed one, that are looked at."""
USUAL = (
    *("oai-clip-vit-l14", "nsfw-image-oai-clip-vit-l-14", "oai-clip-vit-b32", "nsfw-detoxify"),
    *("faces-scrfd10g", "opennsfw", "language-lid176", "image-stats", "text-stats"),
)
"""Models for a first config; each stands behind those that it reads."""
CAPTIONS = ("caption", "text", "alt_text", "alt", "title")
"""Fields that hold a sample's text where no member does."""
OF_TOOLS = ("key", "status", "error_message")
"""Fields that say nothing of a sample: its name, and how its download went."""
FEW = 0.05
"""The share of samples that may be rejected without a word: half of what a shard may by default, as
other shards may have more."""
PARQUETS = ".parquet"
CAPTIONED = [
    f"{n}.{kind}" for n in ("metadata", "captions") for kind in ("jsonl", "csv", "parquet")
]
"""Names of a captions file in a folder of pictures; `datasets` writes the first ones."""
REJECTING = """\
# without the models and fields that need these (and `captions`, if it is there), they do.
max_rejected_fraction: 1.0 # as a shard in which more are rejected fails"""
IMAGE = "image"
"""What stands for the pictures of a parquet among members."""


@dataclass
class Sight:
    """The samples at the beginning of some tars.

    Attributes:
        tars: the number of all shards.
        looked_into: of how many shards samples were looked at.
        samples: how many were looked at.
        members: in how many samples there is a member of each kind, such as `jpg`.
        fields: the values of each field of their JSON that are not null.
        first: the fields in the first tar; a run takes no others without being told.
        key: the config's key for the patterns.
        patterns: the patterns of these shards; those of a folder of parquets name them.
        captions: the captions file of a folder of pictures; mostly empty.
        each: of each sample, the kinds of its members, and its texts such as `json:caption`.
    """

    tars: int
    key: str
    patterns: list[str]
    looked_into: int = 0
    samples: int = 0
    members: Counter[str] = field(default_factory=Counter)
    fields: dict[str, list[object]] = field(default_factory=dict)
    first: frozenset[str] = frozenset()
    captions: str = ""
    each: list[frozenset[str]] = field(default_factory=list)

    @property
    def image(self) -> bool:
        return any(self.members[kind] for kind in (*PICTURES, IMAGE))

    @property
    def image_key(self) -> str:
        """A kind of member with pictures that has to be named in the config; mostly empty."""
        odd = [k for k in self.members if k.rpartition(".")[2] in PICTURES]
        return "" if self.image or not odd else max(odd, key=lambda kind: self.members[kind])

    @property
    def caption(self) -> str:
        """The field to take the text from; empty where members have it, or where there is none."""
        names = [name for name in CAPTIONS if any(isinstance(v, str) for v in self._of(name))]
        return "" if 2 * self.members["txt"] >= self.samples or not names else names[0]

    def _of(self, name: str) -> list[object]:
        return self.fields.get(name, [])

    @property
    def inputs(self) -> set[str]:
        """The inputs of models that the samples have."""
        image = {"image"} if self.image or self.image_key else set()
        return image | ({"text"} if self.members["txt"] or self.caption else set())

    def missing(self) -> tuple[str, float]:
        """What samples lack of what a config of all models and fields needs, and their share."""
        text = f"json:{self.caption}" if self.caption else "txt"
        needed = {"image": {self.image_key} if self.image_key else {*PICTURES, IMAGE}}
        needed = {name: kinds for name, kinds in needed.items() if name in self.inputs}
        needed |= {"text": {text}} if "text" in self.inputs else {}
        needed |= {"JSON": {"json"}} if self.fields else {}
        lacked = [n for n, kinds in needed.items() if any(kinds.isdisjoint(e) for e in self.each)]
        whole = sum(not any(kinds.isdisjoint(e) for kinds in needed.values()) for e in self.each)
        return " or ".join(lacked), 1 - whole / self.samples

    @property
    def looked_at(self) -> str:
        """How many samples were looked at, and in how many shards."""
        shards = counted(self.tars, "shard")
        return f"{counted(self.samples, 'sample')} in {self.looked_into:,} of {shards}"

    @property
    def warning(self) -> str:
        """What is said of samples that will be rejected; empty where these are few."""
        what, share = self.missing()
        if share <= FEW:
            return ""
        return f"{share:.0%} of these samples lack {what}, and become no rows"

    def add(self, members: dict[str, bytes]) -> None:
        self.samples += 1
        self.members.update(members.keys())
        kinds = {*members}
        with suppress(ValueError, RecursionError):
            found = json.loads(members.get("json", b""))
            for name, value in found.items() if isinstance(found, dict) else ():
                values = self.fields.setdefault(name, [])
                if value is not None:
                    values.append(value)
                if isinstance(value, str):
                    kinds.add(f"json:{name}")
        self.each.append(frozenset(kinds))


def write(file: Path, inputs: Sequence[str], output: str) -> Sight:
    """Look at inputs, and write a config for them that can be read; raise as `look` does."""
    sight = look([str(Path(n).absolute()) if is_local(n) else n for n in inputs])
    asked_for.write(file, [config(output, sight, weights.default_dir()).encode()])
    load(file)
    return sight


def look(inputs: Sequence[str]) -> Sight:
    """Look into the first samples of the shards that patterns name.

    A folder stands for the tars in it; without any, for the pictures in it and below; without
    these, for its parquets; without these, for the tars or parquets below.

    Raises:
        ConfigError: a pattern names no shard, or no sample can be read.
    """
    found, sight = _expanded(inputs)
    what = f"no sample in {next(iter(found.sizes))}"
    for url in islice((u for u in found.sizes if u not in found.missing), TARS):
        try:
            before = sight.samples
            for members in islice(_shard(url, sight), SAMPLES):
                sight.add(members)
            sight.looked_into += sight.samples > before
            sight.first = sight.first or frozenset(sight.fields)
        except Exception as error:  # each store, and each damaged tar, raises errors of its own
            what = f"{url}, which cannot be read: {error}"
    if not sight.inputs:
        what = ", ".join(sight.members) or what
        raise ConfigError("init", [f"found {what}; valid are samples with images or texts"])
    return sight


def _expanded(inputs: Sequence[str]) -> tuple[patterns.Expansion, Sight]:
    """The shards of the first kind that is there; nothing of them has been looked at.

    Raises:
        ConfigError: there is no shard, or one that no run takes.
    """
    first: list[Mistake] = []
    for key, named, tree in _kinds(inputs):
        found = patterns.expand(named, True, key, tree)
        if not found.mistakes:
            captions = _captions(inputs) if tree else ""
            return found, Sight(len(found.sizes), key, named, captions=captions)
        first = first or found.mistakes
        if unfit := [str(m) for m in found.mistakes if m.item is None]:  # of a file, no pattern
            raise ConfigError("init", unfit)
    folders = [*filter(os.path.isdir, inputs)]
    none = [f"found no tar, picture or parquet in {f!r} or below; check the path" for f in folders]
    raise ConfigError("init", none or [*map(str, first)])


def _kinds(inputs: Sequence[str]) -> Iterator[tuple[str, list[str], Callable[[str], Tree] | None]]:
    """What inputs may stand for: the config's key, its patterns, and how folders are planned."""
    yield "input_tars", [*inputs], None
    yield "inputs", [*inputs], _pictures
    folders = [glob.escape(n) if os.path.isdir(n) else n for n in inputs]
    below = [("inputs", f"*{PARQUETS}")]
    if all(map(os.path.isdir, inputs)):  # a store may have no end
        below += [("input_tars", "**/*.tar"), ("input_tars", "**/*.tar.*")]
        below += [("inputs", f"**/*{PARQUETS}")]
    for key, of in below:
        yield key, [n if is_shard(n, key) else f"{n.rstrip('/')}/{of}" for n in folders], None


def _pictures(folder: str) -> Tree:
    """The pictures of a folder as a config with no more keys than its inputs plans them."""
    from d2m_hpc.worker.read.names import EXTENSIONS  # no torch, but of the worker

    known = {name for names in EXTENSIONS.values() for name in names}
    most: int = Config.model_fields["samples_per_shard"].default
    return planned(folder, PICTURES, known, most, ())


def _captions(folders: Sequence[str]) -> str:
    """The captions file of a folder of pictures, if there is one."""
    there = (os.path.join(folder, name) for folder in folders[:1] for name in CAPTIONED)
    return next(filter(os.path.isfile, there), "")


def _shard(url: str, sight: Sight) -> Iterator[dict[str, bytes]]:
    """The members of each sample of a shard: those of JSON with their bytes."""
    if not is_folder(url):
        with _opened(url) as file:
            yield from _samples(file)
        return
    from d2m_hpc.worker.read.folder import PictureFolder  # no torch, but of the worker

    keys = {"inputs": sight.patterns, "captions": sight.captions or None}
    keys |= {"models": ["image-stats"], "output_metadata_dir": "unused"}
    with closing(PictureFolder(url, Config.model_validate(keys))) as reader:
        for sample in reader.index():
            members = dict.fromkeys(sample.members, b"")
            if (json_file := sample.members.get("json")) and json_file[1] < START:
                members["json"] = reader.read(*json_file)
            yield members


def _opened(url: str) -> BinaryIO:
    """A tar, or the beginning of one that is on a store or compressed."""
    # None of these loads torch, but a login node imports modules of the worker only if needed.
    from d2m_hpc.worker.read.compressed import HEAD, codec_of

    if is_pipe(url):
        raise ConfigError("init", [f"{url} is a command; name a tar that it brings"])
    if is_local(url):
        file: BinaryIO = open(url, "rb")  # noqa: SIM115
        codec = codec_of(file.read(HEAD))
        file.seek(0)
    elif url.endswith(PARQUETS):
        fs, path = stores.filesystem(url)
        return fs.open(path, "rb")  # type: ignore[no-any-return]
    else:
        head = stores.peek(url, START)
        file, codec = io.BytesIO(head), codec_of(head)
    if codec is None:
        return file
    plain = b""
    with file, codec.open(file) as stream, suppress(EOFError):
        while len(plain) < START and (more := stream.read(1 << 16)):
            plain += more
    return io.BytesIO(plain)


def _samples(file: BinaryIO) -> Iterator[dict[str, bytes]]:
    """The members of each whole sample: those of JSON with their bytes."""
    from d2m_hpc.worker.read.names import split
    from d2m_hpc.worker.read.tar import ReadAhead, TarCut, members

    magic = file.read(4)
    if magic == b"PAR1":
        yield from _rows(file)
        return
    last, sample = "", dict[str, bytes]()
    with suppress(TarCut):
        for member in members(ReadAhead(file), file.seek(0, io.SEEK_END)):
            key, kind = split(member.name)
            if key is None or member.kind != "file":
                continue
            kind = kind.lower()
            if key != last and sample:
                yield sample
                sample = {}
            last, sample[kind] = key, b""
            if kind == "json" and member.size < START:
                file.seek(member.offset)
                sample[kind] = file.read(member.size)
        if sample:
            yield sample


def _rows(file: BinaryIO) -> Iterator[dict[str, bytes]]:
    """The first samples of a parquet, as if they were members."""
    import pyarrow.parquet as pq

    from d2m_hpc.worker.read.columns import TEXTS, is_bytes, is_text, is_wrapped

    with pq.ParquetFile(file, buffer_size=1 << 20) as parquet:
        types = {field.name: field.type for field in parquet.schema_arrow}
        images = [name for name in types if is_bytes(types[name])]
        wrapped = [name for name in types if is_wrapped(types[name])]
        text = next((name for name in TEXTS if name in types and is_text(types[name])), "")
        names = [name for name in types if name not in (*images, *wrapped)]
        leaf = next(iter([*(f"{name}.bytes" for name in wrapped), *images]), "")
        is_image = _valid(parquet, leaf) if leaf else repeat(False)
        for batch in islice(parquet.iter_batches(SAMPLES, columns=names), 1):
            for row, has_image in zip(batch.to_pylist(), is_image, strict=False):
                there = {IMAGE: b""} if has_image else {}
                there |= {"txt": b""} if text and row[text] is not None else {}
                yield there | {"json": json.dumps(row, default=str).encode()}


def _valid(parquet: Any, leaf: str) -> Iterable[bool]:
    """Whether each of the first values of a column is there; reads them only if some are not."""
    import pyarrow as pa

    metadata = parquet.metadata
    paths = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    found = [group.column(paths.index(leaf)).statistics for group in groups]
    if all(some and some.has_null_count and not some.null_count for some in found):
        return repeat(True)
    values = next(parquet.iter_batches(SAMPLES, columns=[leaf])).column(0)
    inner = values.flatten()[0] if pa.types.is_struct(values.type) else values
    return cast(list[bool], inner.is_valid().to_pylist())


def config(output: str, sight: Sight, folder: Path) -> str:
    """The text of a config.

    Args:
        output: the folder of the outputs.
        folder: the weights folder; models whose weights are missing there are comments.
    """
    known = builtin()
    alone = {n: s for n, s in known.specs(USUAL).items() if sight.inputs >= {*s.raw_inputs}}
    fit = [s for s in alone.values() if all(known.post(n).model in alone for n in s.reads)]
    there = {spec.name for spec in fit if _is_ready(spec, folder)}
    ready = [s.name for s in fit if there >= {s.name, *(known.post(n).model for n in s.reads)}]
    rest = [spec.name for spec in fit if spec.name not in ready]
    columns, features = known.columns.items(), known.features.items()
    more = [name for name, post in (*columns, *features) if post.model in rest]
    kinds = [f"{safe(kind)} in {n / sight.samples:.0%}" for kind, n in sight.members.most_common(8)]
    why = "# these fit, too; list them, and `d2m weights fetch` brings their weights:"
    lines = [
        f"# {counted(sight.tars, 'shard')}. "
        f"Of the first {counted(sight.samples, 'sample')}: {', '.join(kinds)}.",
        "# `d2m head` shows the first samples with their values; docs/config.md has all keys.",
        *_listed(sight.key, sight.patterns),
        *_listed("output_metadata_dir", output),
        *_listed("models", ready),
        *([why, *(f"# - {name}" for name in rest)] if rest else []),
        *_listed("postprocess_columns", [n for n, p in columns if p.model in ready]),
        *_listed("postprocess_features", [n for n, p in features if p.model in ready]),
        *([f"# with those models: {', '.join(more)}"] if more else []),
        *(_listed("captions", sight.captions) if sight.captions else []),
        *(_listed("image_key", sight.image_key) if sight.image_key else []),
        *(_listed("text_from", f"json:{sight.caption}") if sight.caption else []),
        *_fields(sight, {*known.columns}),
        *([f"# {sight.warning};", REJECTING] if sight.warning else []),
        "device: 0 # a GPU; without one, --local takes the CPU",
        "batch_size: 256",
        "# slurm: {partition: gpu, gres: 'gpu:1', time: '4:00:00'} # or as options of d2m-submit",
    ]
    return "\n".join(lines) + "\n"


def _is_ready(spec: ModelSpec, folder: Path) -> bool:
    found = weights.survey_all([spec], folder, quick=True)
    return all(checked.sha256 for item in found for checked in item.files)


def _fields(sight: Sight, taken: Collection[str]) -> list[str]:
    """The fields of the samples; others than of plain values are a comment, as are those with the
    name of a model's column."""
    kinds = {
        name: values.inferred(found) if found else ""
        for name, found in sight.fields.items()
        if name not in OF_TOOLS
    }
    named = sight.first - {
        n for n in kinds if ":" in n or not n.isprintable() or n in taken
    }  # `a: b` declares a type
    plain = [name for name, kind in kinds.items() if name in named and kind not in ("", "json")]
    aside = [name for name in kinds if name not in plain]
    lines = _listed("additional_fields", plain)
    return [*lines, *([f"# also in the JSON: {json.dumps(aside)}"] if aside else [])]


def _listed(key: str, value: object) -> list[str]:
    """A key and its value in YAML."""
    text = yaml.safe_dump({key: value}, allow_unicode=True, width=1000, sort_keys=False)
    return text.splitlines()
