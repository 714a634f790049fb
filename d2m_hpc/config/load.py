"""Read a config file and its overrides; report every mistake at once."""

from __future__ import annotations

import logging
import reprlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from d2m_hpc.config.derive import KINDS
from d2m_hpc.config.document import Document
from d2m_hpc.config.mistakes import semantic_mistakes
from d2m_hpc.config.places import Loc, Mistake, dotted
from d2m_hpc.config.schema import INPUTS, Config, Slurm
from d2m_hpc.config.variables import as_pattern, with_variables
from d2m_hpc.errors import ConfigError
from d2m_hpc.storage.texts import nearest
from d2m_hpc.storage.urls import masked

log = logging.getLogger(__name__)

APART = "x-"
"""The prefix of keys for the file's own use: YAML anchors to repeat elsewhere."""
REQUIRED: dict[str, Any] = {"models": [" "], "output_metadata_dir": " "}
"""Valid values of the required keys, to check the other keys without them."""
BLANK: dict[str, Any] = {"models": [], "output_metadata_dir": ""}
"""Values of the required keys in a config that lacks them."""
LARGEST = 10_000_000
"""The most bytes of a config file."""
PLACES = ("output_metadata_dir", "run_dir")
"""The keys that decide where a run lies."""


class _Masked(reprlib.Repr):
    """Short texts, masked before they are cut: the cut may take a secret's name away."""

    def repr_str(self, x: str, level: int) -> str:
        return super().repr_str(masked(x), level)


_short = _Masked()
_short.maxstring = _short.maxother = 120


def load(
    path: Path,
    overrides: Iterable[str] = (),
    options: Mapping[str, Any] = {},
    frozen: bool = False,
) -> Config:
    """Read a config file.

    Args:
        path: the YAML file.
        overrides: `key=value`, with dots for keys of a section; the value is YAML.
        options: values of `slurm:` keys from the command line; None means not given.
        frozen: whether the file is a submission's copy. The submit has checked the copy, maybe by
            a newer version, so unknown keys are logged and left aside.

    Raises:
        ConfigError: with every mistake that was found.
    """
    document = _read(path, frozen)
    source = _Source(document, options)
    for text in overrides:
        source.override(text)
    if frozen:
        source.leave_unknown(path)
    config = _validate(source)
    if not frozen:
        config, unset = with_variables(config)
        source.mistakes += [*unset, *semantic_mistakes(config)]
    if mistakes := [*document.mistakes, *map(source.shown, source.mistakes)]:
        raise ConfigError(str(path), mistakes, _valid(config, document, source))
    return config


def _valid(config: Config, document: Document, source: _Source) -> Config | None:
    """What else of a config with mistakes can be looked at; nothing if its places are wrong."""
    wrong = {m.loc[0] for m in source.mistakes if m.loc}
    if document.mistakes or wrong & {*PLACES, "weights_dir", "custom_pypath"}:
        return None
    return config.model_copy(update={key: [] for key in INPUTS if key in wrong})


def glance(path: Path, frozen: bool = False) -> Config:
    """Read the valid part of a config, to look at its run; the rest has defaults.

    Neither the custom file nor any name in the config is looked up.

    Args:
        frozen: whether the file is a submission's copy, whose variables are expanded already.

    Raises:
        ConfigError: a key that decides where the run lies is wrong.
    """
    document = _read(path, frozen)
    source = _Source(document, {})
    if frozen:
        source.leave_unknown(path)
    config = _validate(source)
    if not frozen:
        config, unset = with_variables(config)
        source.mistakes += unset
    found = [*document.mistakes, *source.mistakes]
    if lost := [m for m in found if not m.loc or m.loc[0] in PLACES]:
        raise ConfigError(str(path), [*map(source.shown, lost)])
    for mistake in found if frozen else ():
        log.warning("note: %s: %s; its default is shown", path, mistake)
    return config


def located(path: str, mistakes: Iterable[str]) -> list[str]:
    """Add the config's lines to mistakes that were found after the config was read."""
    try:
        document = _read(Path(path))
    except ConfigError:
        return [*mistakes]
    return [_with_place(document, m, _read_path) if isinstance(m, Mistake) else m for m in mistakes]


def _with_place(document: Document, mistake: Mistake, read: Callable[[str], str] = str) -> str:
    frame = document.place(mistake.loc, mistake.item, read)
    return f"{mistake}\n{frame}" if frame else mistake


def _read_path(text: str) -> str:
    """The path that a pattern in the file means; the pattern itself if that is not known."""
    with suppress(ValueError):
        return as_pattern(text)
    return text


def _read(path: Path, frozen: bool = False) -> Document:
    """Read a file; raise ConfigError if it holds no mapping of keys, or is a frozen one and cut."""
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST + 1)
        if len(data) > LARGEST:
            raise ConfigError(str(path), [f"is larger than {LARGEST:,} bytes; give a YAML config"])
        text = data.decode().replace("\r\n", "\n").replace("\r", "\n")
        if frozen and text.startswith("---") and not text.endswith(("\n...\n", "\n...")):
            raise ConfigError(str(path), ["is cut: its end mark is missing; submit again"])
        document = Document(text, str(path))
    except FileNotFoundError:
        raise ConfigError(str(path), ["no such file; give the path of a YAML config"]) from None
    except IsADirectoryError:
        what = "is a folder; give a YAML config, such as `d2m init` writes of a folder"
        raise ConfigError(str(path), [what]) from None
    except UnicodeDecodeError as error:
        what = f"cannot be read: byte {error.start} is not UTF-8; save the file as UTF-8"
        raise ConfigError(str(path), [what]) from None
    except (OSError, ValueError) as error:
        raise ConfigError(str(path), [f"cannot be read: {error}"]) from None
    if not isinstance(document.value, dict):
        found = _TOPS.get(type(document.value), "a number")
        top = f"found {found} at the top; valid is a mapping of keys such as `models:`"
        raise ConfigError(str(path), [*document.mistakes] or [top])
    return document


_TOPS = {type(None): "nothing", list: "a list", str: "a text", bool: "true or false"}
"""What stands at the top of a file in place of a mapping, in words."""


class _Source:
    """The values of a config, and where each comes from.

    Attributes:
        values: the values of the file, of `--set` and of the command line's own options.
        origins: the options that values come from, by place.
        left_out: the places of values that are not valid YAML.
    """

    def __init__(self, document: Document, options: Mapping[str, Any]) -> None:
        self.document = document
        self.values = _without_apart(document.value)
        self.left_out = set(document.left_out)
        self.origins: dict[Loc, str] = {}
        self.mistakes: list[Mistake] = []
        section = self.values.get("slurm")
        given = {str(k): v for k, v in options.items() if v is not None}
        if given and (section is None or isinstance(section, dict)):
            self.values["slurm"] = {**(section or {}), **given}
            self.origins |= {("slurm", k): f"--{k.replace('_', '-')}" for k in given}

    def override(self, text: str) -> None:
        """Apply one `key=value`."""
        key, equals, value = text.partition("=")
        loc: Loc = tuple(key.strip().split("."))
        if not equals or not loc[-1]:
            what = "found no `key=value`; valid is for example --set batch_size=64"
            self.mistakes.append(Mistake((), f"--set {text}: {what}"))
            return
        values = self.values
        for parent in loc[:-1]:
            if values.get(str(parent)) is None:
                values[str(parent)] = {}
            values = values[str(parent)]
            if not isinstance(values, dict):
                what = f"`{parent}` is not a section; valid is slurm.<key>"
                self.mistakes.append(Mistake((), f"--set {dotted(loc)}: {what}"))
                return
        made = Document(value)
        for mistake in made.mistakes:
            what = f"found {_short.repr(value)}: {mistake}"
            self.mistakes.append(Mistake((), f"--set {dotted(loc)}: {what}"))
        self.origins[loc] = f"--set {dotted(loc)}"
        if made.mistakes:
            self.left_out.add(loc)
            values.pop(str(loc[-1]), None)
        else:
            values[str(loc[-1])] = made.value

    def leave_unknown(self, path: Path) -> None:
        """Leave unknown keys aside, as a newer version wrote them, and log them."""
        section = self.values.get("slurm")
        unknown = [k for k in self.values if k not in Config.model_fields]
        if isinstance(section, dict):
            unknown += [f"slurm.{k}" for k in section if k not in Slurm.model_fields]
            known = {k: v for k, v in section.items() if k in Slurm.model_fields}
            self.values["slurm"] = known
        self.values = {k: v for k, v in self.values.items() if k in Config.model_fields}
        if unknown:
            log.warning(
                "note: %s has keys that this version does not know, of a newer one: %s; they are "
                "left aside",
                path,
                ", ".join(unknown),
            )

    def shown(self, mistake: Mistake) -> str:
        """A mistake with the option or the line that it comes from."""
        for loc, origin in self.origins.items():
            if mistake.loc[: len(loc)] == loc:
                return f"{mistake}\n  --> {origin}"
        return _with_place(self.document, mistake)


def _without_apart(values: dict[str, Any]) -> dict[str, Any]:
    """Values without the keys for the file's own use; keys of `slurm.extra` are sbatch's."""
    kept = {k: v for k, v in values.items() if not k.startswith(APART)}
    if isinstance(section := kept.get("slurm"), dict):
        kept["slurm"] = {k: v for k, v in section.items() if not k.startswith(APART)}
    return kept


def _validate(source: _Source) -> Config:
    """Make the config of the valid values, and note the mistakes."""
    values = source.values
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=False)
    wrong = {str(e["loc"][0]) for e in errors}
    rest = {k: v for k, v in values.items() if k not in wrong}
    partial = Config.model_validate({**REQUIRED, **rest})
    source.mistakes += _described(errors, values, source.left_out)
    blank = {k: v for k, v in BLANK.items() if k not in rest}
    blank |= {key: [] for key in INPUTS if key in wrong}
    return partial.model_copy(update=blank)


def _described(errors: Iterable[Any], values: Any, left_out: set[Loc]) -> list[Mistake]:
    """Describe pydantic's errors: one mistake for a value that fits none of several types."""
    found: dict[Loc, list[Any]] = {}
    for error in errors:
        given: Loc = error["loc"]
        if given[0] == "derive":  # the third part is the kind
            given = given[:2] + given[3:]
        loc = given if error["type"] == "missing" else _within(values, given)
        if loc not in left_out:
            found.setdefault(loc, []).append(error)
    within = {loc[:i] for loc in found for i in range(1, len(loc))}
    told = {loc: _of_its_type(same, loc in within) for loc, same in found.items()}
    return [_describe(loc, same) for loc, same in told.items() if same]


def _of_its_type(errors: list[Any], is_told: bool) -> list[Any]:
    """Without those of types that a value does not have, where one tells what is wrong with it."""
    rest = [error for error in errors if not error["type"].endswith("_type")]
    is_told |= any(error["type"] == "value_error" for error in rest)
    return rest if is_told else errors


def _within(values: Any, loc: Loc) -> Loc:
    """The part of a place that the values have: pydantic adds the types that it tried."""
    found: Loc = ()
    for part in loc:
        is_key = isinstance(values, dict) and part in values
        if is_key or (isinstance(values, list) and part in range(len(values))):
            found, values = (*found, part), values[part]
    return found


def _describe(loc: Loc, errors: list[Any]) -> Mistake:
    first = errors[0]
    if first["type"] == "extra_forbidden":
        section: type[BaseModel] = Slurm if loc[0] == "slurm" else Config
        if loc[0] == "derive":
            section = next(c for c in KINDS if str(first["loc"][2]) in str(c.model_fields["kind"]))
        return Mistake(loc, f"unknown key{nearest(str(loc[-1]), section.model_fields)}")
    if first["type"] == "missing":
        return Mistake(loc, "found nothing; the key is required")
    if first["type"].startswith("union_tag"):
        kinds = [get_args(c.model_fields["kind"].annotation)[0] for c in KINDS]
        if (kind := first["input"].get("kind")) is None:
            what = f"found nothing; the key is required{nearest('', kinds)}"
        else:
            hint = nearest(kind, kinds) if isinstance(kind, str) else nearest("", kinds)
            what = f"found {_short.repr(kind)}{hint}"
        return Mistake((*loc, "kind"), what)
    messages = (e["msg"].removeprefix("Value error, ") for e in errors)
    valid = dict.fromkeys(
        m.partition(" or object")[0].partition(" or instance")[0] for m in messages
    )
    text = ", or ".join(v[0].lower() + v[1:] for v in valid)
    return Mistake(loc, f"found {_short.repr(first['input'])}; {text}")
