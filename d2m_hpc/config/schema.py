"""The keys of a config and their types."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field

from d2m_hpc.config.derive import AnyDerivation
from d2m_hpc.config.section import STRICT, Count, NoSwitch
from d2m_hpc.config.slurm_values import one_line, options, walltime
from d2m_hpc.config.texts import (
    DEFAULT,
    TextSource,
    by_name,
    far_text,
    raw_input,
    source_of,
    texts_by_name,
)
from d2m_hpc.models import types
from d2m_hpc.models.entries import name_of, packages, with_paths

if TYPE_CHECKING:
    from d2m_hpc.models.registry import Problem, Registry


def _as_list(value: object) -> object:
    """Turn `key:` without a value into an empty list."""
    return [] if value is None else value


def _tars_as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _members(value: object) -> object:
    """Turn one name into a list; `.JPG` names the same member as `jpg`."""
    names = _as_list(_tars_as_list(value))
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return names
    names = [name.lower().removeprefix(".") for name in names]
    if not all(names) or any("/" in name for name in names):
        raise ValueError("valid are names after the key's dot, such as jpg or seg.png")
    return names


def _kinds_as_list(value: object) -> object:
    """Turn one kind of node into a list."""
    return _as_list(_tars_as_list(value))


def _fields_as_list(value: Any) -> Any:
    """Turn `{score: float64}` into the text `score: float64`, in a list or in place of one."""
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list):
        return _as_list(value)
    entries: list[Any] = []
    for entry in value:
        if isinstance(entry, Mapping):
            entries += [name if kind is None else f"{name}: {kind}" for name, kind in entry.items()]
        else:
            entries.append(entry)
    return entries


def _off_as_text(value: object) -> object:
    """Turn YAML's false, which other loaders make of a bare `off`, into that text."""
    return "off" if value is False else value


Precision = Literal["auto", "float16", "bfloat16", "off"]
Names = Annotated[list[str], BeforeValidator(_as_list, list[str] | None)]
Fields = Annotated[
    list[str],
    BeforeValidator(
        _fields_as_list, list[str | dict[str, str | None]] | dict[str, str | None] | None
    ),
]
FarText = Annotated[str, AfterValidator(far_text)]
Texts = Annotated[dict[str, str], AfterValidator(texts_by_name)]
MemberNames = Annotated[list[str], BeforeValidator(_members, list[str] | str | None)]
Patterns = Annotated[
    list[str], BeforeValidator(_tars_as_list, list[str] | str), Field(min_length=1)
]
Bytes = Annotated[int, Field(ge=1), NoSwitch]
Seconds = Annotated[float, Field(gt=0, le=1e9), NoSwitch]
Line = Annotated[str, AfterValidator(one_line)]
Amount = Annotated[Line | int | None, NoSwitch]
Kinds = Annotated[list[Line], BeforeValidator(_kinds_as_list, list[Line] | Line | None)]


class Section(BaseModel):
    """A mapping with fixed keys."""

    model_config = STRICT


INPUTS = ("input_tars", "inputs")
"""Keys of which a config has one."""
SOURCES = ("image_key", "text_key", "text_from")
"""Keys that say where a sample's image and text are; runs of versions without these keys go on."""


class Slurm(Section):
    """How array tasks are submitted; each key is also an option of `d2m-submit`."""

    partition: Line | None = None
    """sbatch's `--partition`"""
    account: Line | None = None
    """sbatch's `--account`"""
    qos: Line | None = None
    """sbatch's `--qos`"""
    time: Annotated[str | int | None, BeforeValidator(walltime)] = None
    """walltime of an array element, as sbatch takes it: `4:00:00`, `1-12` (days and hours), or a
    number of minutes"""
    cpus_per_task: Count | None = None
    """cores of a task"""
    mem: Amount = None
    """memory of an array element, as sbatch takes it: `64G`, or a number of MiB"""
    max_time: Annotated[str | int | None, BeforeValidator(walltime)] = None
    """walltime up to which `time` is doubled for shards whose task came to its end"""
    max_mem: Amount = None
    """memory up to which `mem` is doubled for shards whose task was killed for it"""
    gres: Kinds = []
    """devices of an array element, such as `gpu:1`; a list names kinds of nodes, which get an array
    each"""
    constraint: Kinds = []
    """node features, or a list, one entry for each kind of nodes"""
    exclude: Line | None = None
    """nodes to leave out, besides those that `max_node_failures` finds broken"""
    max_parallel: Count | None = None
    """tasks that may run at once, over all arrays of a submission"""
    tasks_per_node: Count = 1
    """tasks in one array element, each with a chunk of its own, and with several GPUs one each"""
    requeue: bool = True
    """`--requeue`, so that Slurm starts preempted tasks again, or `--no-requeue`"""
    setup: Names = []
    """shell lines before a task, such as `module load cuda`; one that fails ends it with code 4"""
    extra: Annotated[dict[str, str | int | float | bool | None], BeforeValidator(options)] = {}
    """any other long option of sbatch, without its dashes, to its value; `true` for one that takes
    none, `false` or null to leave it out"""
    srun: Annotated[dict[str, str | int | float | bool | None], BeforeValidator(options)] = {}
    """options of the srun that starts the tasks of an array element, as `extra` has sbatch's; with
    pyxis, `container-image` here holds for the tasks and not for the batch script"""
    launcher: Names = []
    """words before `python`: `apptainer`, `exec`, `--nv`, `d2m.sif`"""
    rounds: Annotated[dict[str, str | int | float | bool | None], BeforeValidator(options)] = {}
    """options of the small jobs of `--until-done`, as `extra` has them, such as `partition: cpu`"""
    python: Line | None = None
    """Python of the tasks, such as a container's `python3`; by default the one that submits"""


class Config(Section):
    """One workload: which models, over which tars, to which folder."""

    models: Annotated[list[str | dict[str, Any]], Field(min_length=1)]
    """models to run on every sample: built-in ones, those of `custom_pypath`, or families with
    parameters: `siglip: {kind: open_clip, model: ViT-B-16-SigLIP, pretrained: webli}`"""
    postprocess_columns: Names = []
    """outputs that become columns of the parquet"""
    postprocess_features: Names = []
    """outputs that become arrays of the npz"""
    additional_fields: Fields = []
    """keys of the samples' JSON that become columns of the parquet, each with a type if need be:
    `[uid, score: float64]`; `exif.Model` is a key within another; valid are `bool`, `int64`,
    `uint64`, `float64`, `string`, `json` (its text) and `list<...>` and `map<...>` of these"""
    allow_missing_fields: bool = False
    """take fields that no sample of a run's first tar has, as columns of nulls"""
    image_key: MemberNames = []
    """member with a sample's image, or alternatives in order: the name after the key's dot, such as
    `jpg` or `[seg.png, jpg]`; by default jpg, png, jpeg, webp and so on"""
    text_key: MemberNames = []
    """member with a sample's text, or alternatives in order; by default `txt`"""
    text_from: FarText | Texts | None = None
    """take the text from a field of the samples' JSON in place of a member: `json:caption`; or from
    a column of parquets beside the shards: `parquet:again/{stem}.parquet:caption`, with a row for
    each `key`, or `parquet:all.parquet:caption:uid`, for each value of that field. A mapping of
    names to such texts, or to members, [scores further texts](inputs.md#several-texts)"""
    nworkers: Count | None = None
    """decode threads of a task; by default as many as it has cores"""
    batch_size: Count = 512
    """samples in a batch of the models"""
    device: Annotated[int | str, NoSwitch] = 0
    """a CUDA index, `cuda:N` or `cpu`; with `--local`, a machine without CUDA takes the CPU"""
    input_tars: Patterns | None = None
    """one pattern, or a list: paths, URLs, `pipe:` commands; braces, and globs but in commands; a
    folder stands for the tars in it"""
    inputs: Patterns | None = None
    """in place of `input_tars`: folders of pictures, and such patterns of parquets with images or
    of tars"""
    samples_per_shard: Count = 10_000
    """pictures of a folder that make a shard; planned shards stay as they are"""
    captions: str | None = None
    """captions of the pictures in `inputs`: a jsonl, csv or parquet whose column `file_name` has
    their paths from its folder on; all its columns are a sample's JSON"""
    output_metadata_dir: Annotated[str, Field(min_length=1)]
    """folder or URL for a parquet and an npz a tar"""
    custom_pypath: str | None = None
    """Python file with models, preprocessors and postprocessors of your own"""
    reprocess: bool = False
    """compute shards that another config made again, and replace another program's files"""
    use_datacomp_keys: bool = False
    """the names that DataComp's tools read, in place of the models' own, a column `text` (the
    caption), and a `uid` of 32 lower-case hex digits"""
    tars_per_wds: Count | None = None
    """dataset2metadata's name for `shards_per_task`, which wins"""
    logging: bool = False
    """send each task's progress to wandb"""
    warn_and_continue: bool = True
    """reject a sample that cannot be read and go on; `false`: the first one fails its shard"""

    run_dir: str | None = None
    """folder for the run's state, on a filesystem that all nodes share; by default `.d2m` in
    `output_metadata_dir`, or `.d2m/<name>` here where that is a URL"""
    amp: Annotated[Precision, BeforeValidator(_off_as_text, Precision | Literal[False])] = "auto"
    """precision of the models; `auto` is float16 on CUDA and `off`, float32, on the CPU"""
    compile: Literal["auto"] | bool = "auto"
    """compile the image nets for full batches, which takes minutes; `auto` compiles the built-in
    convolutional ones, on CUDA in half precision, once a task has run 100 full batches. What a
    built-in net launches on a GPU for a batch is recorded and launched as one (CUDA graphs);
    `false` launches kernel by kernel"""
    resize: Literal["fast", "exact"] = "fast"
    """`exact` is PIL, bit for bit; `fast` differs in 0.3 % of the pixels, by 2 of 255 at most"""
    decode: Literal["whole", "scaled"] = "whole"
    """`scaled` decodes JPEGs at a half, a quarter or an eighth where their short side keeps 1,024
    pixels: three quarters of the CPU time for 12 megapixels. All models are given the smaller
    picture, and features move by 2e-4 to 3e-3; other pictures are decoded whole"""
    feature_dtype: Literal["float16", "float32"] = "float16"
    """type of the arrays in the npz"""
    shards_per_task: Count | None = None
    """tars that an array task is given; by default 16"""
    task_minutes: Count | None = None
    """minutes of work that an array task is given, in place of `shards_per_task`, by what finished
    shards took; never less than ten times a task's start"""
    max_rejected_fraction: float = Field(0.1, ge=0, le=1)
    """share of a tar's samples that may be rejected before the tar counts as failed"""
    allow_truncated_shards: bool = False
    """take the whole samples of a tar that was cut off, instead of failing the tar"""
    max_image_pixels: Bytes = 178_956_970
    """an image of more pixels, by its header, is rejected. Some formats take more memory to decode:
    their images are rejected where that would be more than 12 bytes for each pixel of this limit,
    and more than 2 GiB. At the default these are WebP of more than 113 million pixels, JPEG 2000 of
    107 and AVIF of 165"""
    max_attempts: Count = 3
    """submits that try a failing tar before it is given up"""
    max_node_failures: Annotated[int, Field(ge=0), NoSwitch] = 3
    """tasks in a row that a node may fail to start before the next submit leaves it out"""
    lease_seconds: Seconds = 120.0
    """seconds without a sign of life after which other tasks take a task's tar over"""
    stall_seconds: Seconds = 1800.0
    """seconds without any progress after which a task ends itself"""
    scratch_bytes: Bytes | None = None
    """bytes that copies of remote or compressed tars may take at once on a node's own disk
    (`$SLURM_TMPDIR`, `$TMPDIR` or `/tmp`); by default half of what is free, shared by the tasks of
    an array element"""
    steal: bool = True
    """a task that is done takes tars that slower tasks have not begun"""
    weights_dir: str | None = None
    """folder of the checkpoints; by default `$D2M_WEIGHTS`, or `~/.cache/d2m_hpc`"""
    allow_unpublished_weights: bool = False
    """accept checkpoints that are not the published files"""
    slurm: Slurm = Slurm()
    """how array tasks are submitted"""
    derive: dict[str, AnyDerivation] = {}
    """columns that [`d2m derive`](derive.md) computes from stored features and columns, by name"""

    @property
    def input_key(self) -> str:
        """The key that names the shards."""
        return "inputs" if self.inputs else "input_tars"

    @property
    def patterns(self) -> list[str]:
        """What names the shards."""
        return self.inputs or self.input_tars or []

    @property
    def texts(self) -> dict[str, TextSource]:
        """Where the texts are, by raw input: `text`, and `text:NAME` for each further one."""
        given = {raw_input(n): source_of(entry) for n, entry in by_name(self.text_from).items()}
        return {"text": TextSource(tuple(self.text_key) or ("txt",)), **given}

    @property
    def text_field(self) -> str:
        """The JSON's field that holds the text; empty where a member or another file does."""
        return self.texts["text"].field

    @property
    def custom_file(self) -> Path | None:
        return Path(os.path.expanduser(self.custom_pypath)) if self.custom_pypath else None

    @property
    def model_names(self) -> list[str]:
        """The names of `models`, which may have parameters."""
        return [name_of(entry) for entry in self.models]

    def registry(self, base: Registry) -> tuple[Registry, list[Problem]]:
        """The names that the config may use, its own models' among them, and what is wrong there.

        Args:
            base: the built-in names, and those of a custom file.
        """
        from d2m_hpc.models import weights

        asked = [*(self.postprocess_columns or ()), *(self.postprocess_features or ())]
        texts = [name for name in by_name(self.text_from) if name != DEFAULT]
        return base.with_models(self.models, asked, weights.weights_dir(self.weights_dir), texts)

    @property
    def carried(self) -> list[str]:
        """The columns that hold the samples' own values, in order, without `key`.

        `key` is the first column of every parquet, whether a config lists it or not.
        """
        text = ["text"] if self.use_datacomp_keys else []
        named = [name for name, _ in self.asked_fields]
        return [name for name in dict.fromkeys([*named, *text]) if name != "key"]

    @property
    def asked_fields(self) -> list[tuple[str, str]]:
        """The additional fields' names and declared types; an empty type is not declared."""
        # A config with mistakes has the entries as in the file.
        entries = _fields_as_list(self.additional_fields)
        return [types.split(entry) for entry in entries if isinstance(entry, str)]

    @property
    def field_types(self) -> dict[str, str]:
        """The types that the config declares, by field."""
        text = {"text": "string"} if self.use_datacomp_keys else {}
        return text | {name: kind for name, kind in self.asked_fields if kind}

    def renamed(self, name: str) -> str:
        """A column's or feature's name in the output files."""
        from d2m_hpc.models.registry import DATACOMP_KEYS

        return DATACOMP_KEYS.get(name, name) if self.use_datacomp_keys else name

    @property
    def columns(self) -> list[str]:
        """A parquet's columns in order, but for derived ones."""
        return ["key", *map(self.renamed, self.postprocess_columns), *self.carried]

    def fingerprint(
        self, hashes: Mapping[str, str], code: Mapping[str, str] = {}
    ) -> dict[str, Any]:
        """The values that decide the output.

        `compile` is left out, like the batch size and the GPU's model: all three change values by
        rounding only, and a run mixes them, as the last batch of each shard is not compiled.

        Args:
            hashes: sha256 of each checkpoint, by its published name.
            code: sha256 of each module of the custom file, by name, the file itself first.
        """
        keys = (
            "models postprocess_columns postprocess_features additional_fields use_datacomp_keys "
            "amp resize feature_dtype max_image_pixels"
        )
        main, *others = [*code] or [""]
        return {
            **{key: getattr(self, key) for key in keys.split()},
            "models": [with_paths(entry, lambda path: path.name) for entry in self.models],
            **({"packages": foreign} if (foreign := packages(self.models)) else {}),
            **{key: value for key in SOURCES if (value := getattr(self, key))},
            **({"decode": self.decode} if self.decode != "whole" else {}),
            "checkpoints": dict(sorted(hashes.items())),
            "custom_file": code.get(main),
            **({"custom_modules": {n: code[n] for n in sorted(others)}} if others else {}),
        }
