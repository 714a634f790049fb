"""Run a user's custom file, written for this program or for dataset2metadata."""

from __future__ import annotations

import dis
import importlib.util
import inspect
import os
import sys
import traceback
import types
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from os import PathLike
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from d2m_hpc.errors import ConfigError
from d2m_hpc.models import postprocessors
from d2m_hpc.models.checkpoint import Weights
from d2m_hpc.models.code import MODULE, Modules, Sources
from d2m_hpc.models.family import ModelSpec, Output, Post
from d2m_hpc.models.inputs import NAMED, ImageInput
from d2m_hpc.models.preprocessors import PREPROCESSORS, Options, Picture, Preprocessor
from d2m_hpc.models.published import Checkpoint, HubRepo
from d2m_hpc.models.registry import LOOKUPS, Registry, builtin
from d2m_hpc.models.types import is_column_type
from d2m_hpc.stopping import is_asked

SEED = "dataset2metadata"
STATIC_FIELDS = ("raw_inputs", "preprocessors", "dependencies")

Tables = dict[str, dict[str, Any]]
"""The four lookups of a custom file by their names."""


def install_seed_names() -> None:
    """Let imports from dataset2metadata find ours, unless that package is installed."""
    if SEED in sys.modules or importlib.util.find_spec(SEED) is not None:
        return
    package = types.ModuleType(SEED)
    package.__path__ = []
    sys.modules[SEED] = package
    for name, module in (("postprocessors", postprocessors), ("preprocessors", _preprocessors())):
        setattr(package, name, module)
        sys.modules[f"{SEED}.{name}"] = module


def _preprocessors() -> ModuleType:
    """The seed's preprocessors by their names there: a PIL image or a text to a float tensor."""
    module = types.ModuleType(f"{SEED}.preprocessors")
    names = {
        "oai_clip_image": "clip-aug",
        "oai_clip_text": "clip-tokens",
        "faces_scrfd": "faces-aug",
        "dedup": "dedup-aug",
        "identity": "identity",
    }
    for name, ours in names.items():
        setattr(module, name, partial(_apply, PREPROCESSORS[ours]))
    return module


def _apply(preprocessor: Preprocessor, value: Any) -> Any:
    raw = Picture(value) if isinstance(value, Image.Image) else value
    prepared = preprocessor.prepare(raw, Options(exact=True))
    if isinstance(prepared, tuple):
        return tuple(part[0] for part in preprocessor.finish(tuple(map(_batch, prepared))))
    if isinstance(prepared, np.ndarray):
        return preprocessor.finish(_batch(prepared))[0]
    return prepared


def _batch(sample: NDArray[Any]) -> Tensor:
    """A batch of one."""
    return torch.from_numpy(np.stack([sample]))


def load(path: Path, frozen: Sources | None = None) -> ModuleType:
    """Import a custom file; modules that lie beside it can be imported by it.

    Args:
        frozen: run these sources, and no others that lie there.

    Raises:
        ConfigError: it is not there or fails while it is imported; the cause is chained.
    """
    return run(Modules(path.absolute(), frozen or {}, frozen=frozen is not None))


def run(modules: Modules) -> ModuleType:
    """Import a custom file by its finder, which learns its modules.

    Raises:
        ConfigError: it is not there or fails while it is imported; the cause is chained.
    """
    install_seed_names()
    path = modules.file
    if path.suffix != ".py":
        raise ConfigError(str(path), ["custom_pypath: not a Python file; its name must end in .py"])
    modules.install()
    try:
        spec = modules.main()
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        assert spec.loader is not None
        spec.loader.exec_module(module)
        if not modules.frozen:
            modules.look_ahead()
    except BaseException as error:
        if is_asked(error):
            raise
        mistake = f"custom_pypath: importing it failed: {described(error)}"
        raise ConfigError(str(path), [mistake]) from error
    return module


def described(error: BaseException) -> str:
    """An error's type and message, and the last line of a custom file that it came through."""
    lines = [
        f" ({Path(frame.f_code.co_filename).name}, line {number})"
        for frame, number in traceback.walk_tb(error.__traceback__)
        if str(frame.f_globals.get("__name__")).startswith(MODULE)
    ]
    words = ""
    with suppress(Exception):  # the error is of a custom file, too
        words = str(error)
    return type(error).__name__ + (f": {words}" if words else "") + (lines[-1] if lines else "")


def lookups(module: ModuleType) -> Tables:
    """The four tables of a custom file; one that is missing is empty.

    Raises:
        ConfigError: one holds what is neither a class nor a function.
    """
    tables = {name: getattr(module, name, {}) for name in LOOKUPS}
    mistakes = [
        f"{table}: found {type(entries).__name__}; valid is a dict of names to what they mean"
        for table, entries in tables.items()
        if not isinstance(entries, Mapping)
    ] or [
        f"{table}: {name!r} is {value!r}; valid is a class or function itself, not called"
        for table, entries in tables.items()
        for name, value in entries.items()
        if not callable(value) or (table == "model_lookup" and isinstance(value, nn.Module))
    ]
    if mistakes:
        raise ConfigError(str(module.__file__), mistakes)
    return {
        table: {str(name): value for name, value in entries.items()}
        for table, entries in tables.items()
    }


def output_types(module: ModuleType) -> dict[str, Any]:
    """What a custom file's `output_types` declares: columns' types and features' shapes of a row.

    Raises:
        ConfigError: one is neither.
    """
    declared = getattr(module, "output_types", {})
    if odd := _odd_types("output_types", declared):
        raise ConfigError(str(module.__file__), odd)
    return dict(declared)


def _odd_types(key: str, declared: Any) -> list[str]:
    """What a mapping of names to types or shapes holds besides."""
    return [
        f"{key}: found {name!r}: {kind!r}; valid are a column's type such as 'float32' or "
        "'list<string>', and a feature's shape such as [512]"
        for name, kind in (declared.items() if isinstance(declared, Mapping) else [("", declared)])
        if not (is_column_type(kind) if isinstance(kind, str) else _is_shape(kind))
    ]


def _is_shape(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(n, int) and n > 0 for n in value)


def registry(tables: Tables, types: Mapping[str, Any] = {}) -> Registry:
    """The built-in names and those of a custom file that was run.

    Args:
        types: what `output_types` gives.

    Raises:
        ConfigError: a class has a field of another kind than names.
    """
    models, made, columns, features = (tables[name] for name in LOOKUPS)
    outputs = [post for name, model in models.items() for post in _outputs(name, model)]
    typed = {n: p for n, p in outputs if p.type} | {
        n: Post(source(p), type=types.get(n, "")) for n, p in columns.items()
    }
    shaped = {n: p for n, p in outputs if not p.type} | {
        n: Post(source(p), shape=tuple(types.get(n, ()))) for n, p in features.items()
    }
    known = builtin()
    return Registry(
        models={**known.models, **{name: spec_of(name, model) for name, model in models.items()}},
        columns={**known.columns, **typed},
        features={**known.features, **shaped},
        preprocessors=frozenset(NAMED.keys() | made.keys()),
        own=frozenset({*models, *made, *typed, *shaped}),
    )


def _outputs(model: str, made: Any) -> list[tuple[str, Post]]:
    """The columns and features that a custom class declares in `outputs`, by their full names.

    Raises:
        ConfigError: one has neither a type nor a shape.
    """
    declared = getattr(made, "outputs", {})
    odd = _odd_types("outputs", declared)
    if odd:
        raise ConfigError(origin(made), odd)
    named = {n: (v, ()) if isinstance(v, str) else ("", tuple(v)) for n, v in declared.items()}
    return [
        (f"{model}-{name}", Output(name, kind, shape).post(model))
        for name, (kind, shape) in named.items()
    ]


def spec_of(name: str, model: Any) -> ModelSpec:
    """The static fields of a custom model class; those left out have the seed's defaults.

    Raises:
        ConfigError: one holds something other than names, or `checkpoints` other than paths.
    """
    given: dict[str, Any] = {f: _names(getattr(model, f, ())) for f in STATIC_FIELDS}
    given["preprocessors"] = tuple(_form(model, form) for form in given["preprocessors"])
    declared = _names(getattr(model, "checkpoints", ()))
    published = tuple(c for c in declared if isinstance(c, Checkpoint | HubRepo))
    files = [c for c in declared if c not in published]
    odd = [
        f for f, names in given.items() if not all(isinstance(n, str | ImageInput) for n in names)
    ]
    mistakes = [f"{f}: found {getattr(model, f)!r}; valid is a list of names" for f in odd]
    if not all(isinstance(file, str | PathLike) for file in files):
        what = "valid is a list of paths and of HubRepo"
        mistakes.append(f"checkpoints: found {model.checkpoints!r}; {what}")
    elif not odd:
        inputs = [*given["raw_inputs"], *given["dependencies"]]
        mistakes += _misfits(model, inputs, takes_weights(model, published))
    if mistakes:
        raise ConfigError(origin(model), mistakes)
    paths = tuple(os.fspath(file) for file in files)
    to_device = bool(getattr(model, "to_device", True))
    return ModelSpec(name, **given, to_device=to_device, files=paths, checkpoints=published)


def takes_weights(made: Any, published: Collection[Any]) -> bool:
    """Whether a custom class is given the weights folder: its `__init__` has an argument of that
    name, without a default or beside `checkpoints` that are published."""
    with suppress(TypeError, ValueError):  # of a class that is written in C
        found = inspect.signature(made).parameters.get("weights")
        return found is not None and (bool(published) or found.default is found.empty)
    return False


def _misfits(made: Any, inputs: Sequence[str], has_weights: bool) -> Iterator[str]:
    """How a custom class cannot be made, or its objects not be called."""
    beside = {"weights": None} if has_weights else {}
    yield from _misfit("__init__", made, ["device"], beside)
    if isinstance(inspect.getattr_static(made, "forward", None), FunctionType):
        yield from _misfit("forward", partial(made.forward, None), inputs, {})


def _misfit(
    name: str, called: Any, given: Sequence[str], named: Mapping[str, Any]
) -> Iterator[str]:
    with suppress(TypeError, ValueError):  # of a class that is written in C
        signature = inspect.signature(called)
        try:
            signature.bind(*given, **named)
        except TypeError as error:
            what = f"{name}{signature} is given {', '.join([*given, *named]) or 'nothing'}: {error}"
            whole = "; it takes each raw input, then each dependency"
            yield what + (whole if name == "forward" else "")


_IMAGES: TypeAdapter[ImageInput] = TypeAdapter(ImageInput)


def _form(model: Any, given: Any) -> Any:
    """An image input that a class describes, as a mapping; anything else as it is.

    Raises:
        ConfigError: it is none.
    """
    if not isinstance(given, Mapping):
        return given
    try:
        return _IMAGES.validate_python(dict(given))
    except ValidationError as error:
        told = error.errors(include_url=False, include_context=False)
        mistakes = [
            ": ".join(
                ["preprocessors", *map(str, e["loc"][:1]), f"found {e['input']!r}; {e['msg']}"]
            )
            for e in told
        ]
        raise ConfigError(origin(model), list(dict.fromkeys(mistakes))) from None


def _names(value: Any) -> tuple[Any, ...]:
    """`("image")` is what a one-element tuple looks like to most who write one."""
    is_many = value is None or (
        isinstance(value, Iterable) and not isinstance(value, str | Mapping)
    )
    return tuple(value or ()) if is_many else (value,)


def origin(made: Any) -> str:
    """A custom class by its name and file, for messages."""
    name = getattr(made, "__qualname__", type(made).__name__)
    return f"{name} in {made.__module__.removeprefix(MODULE)}.py"


def source(post: Any) -> str:
    """The one model whose outputs a postprocessor reads; empty where it may read any.

    A `partial` names it, and of a function its code tells, if its argument serves for nothing but
    `cache["model"]`.
    """
    if named := getattr(post, "keywords", {}).get("model", ""):
        return str(named)
    code = getattr(post, "__code__", None)
    if code is None or code.co_argcount != 1 or code.co_varnames[0] in code.co_cellvars:
        return ""
    steps, argument, read = [*dis.get_instructions(code)], code.co_varnames[0], set()
    for i, step in enumerate(steps):
        several = step.argval if isinstance(step.argval, tuple) else (step.argval,)
        if step.opcode in dis.haslocal and argument in several:
            if step.opname not in ("LOAD_FAST", "LOAD_FAST_BORROW"):
                return ""
            read.add(_subscript(steps[i + 1 : i + 3]))
    return read.pop() if len(read) == 1 else ""


def _subscript(steps: list[dis.Instruction]) -> str:
    """The text in `["text"]`, if these two instructions are that; else nothing."""
    if len(steps) < 2 or steps[0].opname != "LOAD_CONST" or not isinstance(steps[0].argval, str):
        return ""
    access = steps[1]
    is_read = access.opname == "BINARY_SUBSCR" or access.argrepr == "[]"
    return steps[0].argval if is_read else ""


def build(spec: ModelSpec, made: Any, device: int | str, weights: Weights) -> nn.Module:
    """A model of a custom class.

    Args:
        weights: for an `__init__` that takes them.

    Raises:
        TypeError: it cannot be called with the inputs that the class names.
    """
    wanted = takes_weights(made, spec.checkpoints)
    model: nn.Module = made(device, weights=weights) if wanted else made(device)
    if not callable(model):
        raise TypeError("its objects cannot be called; derive the class from torch.nn.Module")
    given = [raw for raw, _ in spec.inputs] + list(spec.dependencies)
    for what in _misfit("forward", getattr(model, "forward", model), given, {}):
        raise TypeError(what)
    return model
