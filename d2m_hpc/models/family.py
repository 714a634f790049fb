"""What a model family declares: parameters, inputs, outputs, checkpoints, and how it is built.

Nothing here imports torch: the login node checks a config with the same declarations that a task
runs. docs/models-adding.md shows how a family is added.
"""

from __future__ import annotations

import json
import os
import re
from codecs import BOM_UTF8
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, WrapValidator

from d2m_hpc.models.inputs import LARGEST_SIDE, Form, ImageInput, Input, OwnInput
from d2m_hpc.models.published import Checkpoint, HubRepo

if TYPE_CHECKING:
    import torch

PACKAGE = "package:"
"""Before the name of a package in which a file or folder lies."""


@dataclass(frozen=True)
class Post:
    """A column or feature: a function of `models.postprocessors` applied to a model's output.

    Attributes:
        model: empty where the code of a custom file may read any.
        type: of a column, in the words of `models.types`; empty where it is not declared.
        shape: of a feature's row, likewise.
        text: the name of the text that the output is of; empty for the sample's own.
    """

    model: str = ""
    function: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    type: str = ""
    shape: tuple[int, ...] = ()
    text: str = ""


@dataclass(frozen=True)
class Output:
    """A column or feature that a model gives; a config names it `<model>-<output>`.

    Attributes:
        type: of a column, in the words of `models.types`; empty for a feature.
        shape: of a feature's row; empty where it is not known before the model is built.
        function, options: of `models.postprocessors`, to read it from the model's result; by
            default the part of the result under this name.
        of_text: where a model takes a text, this output is another for each text.
        text: the name of the further text that the output is of; a family leaves it out.
    """

    name: str
    type: str = ""
    shape: tuple[int, ...] = ()
    function: str = "select"
    options: Mapping[str, Any] = field(default_factory=dict)
    of_text: bool = True
    text: str = ""

    def post(self, model: str) -> Post:
        read, options = {"index": self.name} if self.function == "select" else {}, self.options
        return Post(model, self.function, {**read, **options}, self.type, self.shape, self.text)


def result_of(model: str, text: str) -> str:
    """The name of a model's result on one of the texts."""
    return f"{model}:{text}" if text else model


def at_hand(given: str) -> Path | None:
    """The absolute path that a parameter is, where it is one, and no name on a hub.

    A path begins so (`/`, `~`, `.`), or names something that is there and is not a plain word.
    `package:NAME/PATH` is a file or folder that an installed Python package ships.

    Example:
        >>> at_hand("/weights/net.pt"), at_hand("laion2b_s34b_b79k")
        (PosixPath('/weights/net.pt'), None)
    """
    if given.startswith(PACKAGE):
        name, _, rest = given.removeprefix(PACKAGE).partition("/")
        folder = shipped_by(name)
        return folder / rest if folder and ".." not in rest.split("/") else None
    path = Path(os.path.expanduser(given))
    if given.startswith(("/", "~", "./", "../")) or (re.search(r"[/.]", given) and path.exists()):
        return Path(os.path.abspath(path))
    return None


def here(given: str) -> str:
    """What to say of a name that is taken for no path, though something here has it."""
    is_meant = given and not at_hand(given) and Path(given).exists()
    return f"; if {os.path.abspath(given)} is meant, write './{given}'" if is_meant else ""


NO_REVISION = "is of a repository of the hub, and no such one is named; leave it out"


def file_at_hand(parameter: str, given: str) -> Path | None:
    """Like `at_hand`, of a parameter that is no folder.

    Raises:
        ParameterError: it is one.
    """
    if (path := at_hand(given)) and path.is_dir():
        raise ParameterError(parameter, f"{path} is a folder; valid is the path of a file")
    return path


def shipped_by(package: str) -> Path | None:
    """The folder of an installed package, which is not imported."""
    spec = find_spec(package) if package.isidentifier() else None
    folders = spec.submodule_search_locations if spec else None
    return Path(folders[0]) if folders else None


def published(parameter: str, given: str, sha256: str = "") -> Checkpoint | Path:
    """The file that a parameter names, by its path or by its URL.

    Example:
        >>> published("checkpoint", "https://example.org/nets/head.pth").name
        'example.org/nets/head.pth'

    Args:
        sha256: of the file behind the URL, where it is known.

    Raises:
        ParameterError: it is neither, or the URL names no file, or holds a password or a query:
            these would be in the file's name, or two files would have one name.
    """
    if given.startswith(("http://", "https://")):
        place = given.partition("://")[2]
        if re.search(r"[?#]|^[^/]*@", place):
            what = "a URL with a password, `?` or `#` names no published file; fetch it by hand"
            raise ParameterError(parameter, f"{what}, and give its path")
        if "/" not in place or {"", ".", ".."} & {*place.split("/")}:
            what = f"found {given!r}, which names no file; valid is https://<host>/<path>/<file>"
            raise ParameterError(parameter, what)
        return Checkpoint(place, given, sha256)
    if path := file_at_hand(parameter, given):
        return path
    what = f"found {given!r}, which is not there; valid is the path of a file, or an http(s) URL"
    raise ParameterError(parameter, what)


def read_json(path: Path) -> Any:
    """The content of a checkpoint's JSON file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds no JSON, or more brackets within each other than can be parsed; or it
            begins with a byte order mark, which the libraries refuse that read it too.
    """
    content = path.read_bytes()
    if content.startswith(BOM_UTF8):
        raise ValueError("it begins with a byte order mark; save it as UTF-8 without one")
    try:
        return json.loads(content)
    except RecursionError as error:
        raise ValueError(str(error)) from None


def located(file: Checkpoint | Path, folder: Path) -> Path:
    """Where a file of `published` lies.

    Args:
        folder: the weights folder.
    """
    return file if isinstance(file, Path) else folder / file.name


@dataclass(frozen=True)
class Use:
    """How a config uses a family.

    Attributes:
        name: the model's name in the config.
        folder: the weights folder.
        wanted: the outputs that are asked for, by their own names; a model need not compute others.
            In `outputs`, they are not checked yet.
    """

    name: str
    folder: Path
    wanted: frozenset[str]


@dataclass(frozen=True)
class Between:
    """The range of a parameter, for `Annotated`; memory and time follow from many of them.

    Example:
        size: Annotated[int, Between(32, 4096)] = 224
    """

    low: float
    high: float

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        return WrapValidator(self._checked).__get_pydantic_core_schema__(source, handler)

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> Any:
        return {**handler(schema), "minimum": self.low, "maximum": self.high}

    def _checked(self, given: Any, convert: Callable[[Any], Any]) -> Any:
        if isinstance(given, bool):  # which counts as 1 or 0
            raise ValueError(f"valid is {self.low} to {self.high}")
        value = convert(given)
        if not self.low <= value <= self.high:
            raise ValueError(f"valid is {self.low} to {self.high}")
        return value


def _as_sha256(given: str) -> str:
    if given and not re.fullmatch("[0-9a-f]{64}", given := given.lower()):
        raise ValueError("valid are the 64 hexadecimal digits of a sha256")
    return given


Sha256 = Annotated[str, AfterValidator(_as_sha256)]
Side = Annotated[int, Between(1, LARGEST_SIDE)]
Tokens = Annotated[int, Between(3, 131_072)]
"""Of a text; two of them may be a tokenizer's own, around the text."""
Shade = Annotated[float, Between(-1000, 1000)]
Colour = tuple[Shade, Shade, Shade]
"""Mean or std of pixels, by channel."""


class ParameterError(ValueError):
    """Parameters have values that the family cannot use.

    Example:
        >>> ParameterError("size", "found 0; valid is 1 or more").mistakes
        [('size', 'found 0; valid is 1 or more')]

    Args:
        mistakes: a parameter and what is wrong with it; or several such pairs. The parameter is
            empty where the mistake is in none of them. Nothing where another mistake is the cause.
    """

    def __init__(self, *mistakes: Any) -> None:
        is_one = len(mistakes) == 2 and isinstance(mistakes[0], str)
        self.mistakes: list[tuple[str, str]] = [mistakes] if is_one else [*mistakes]
        super().__init__("; ".join(what for _, what in self.mistakes))


class Family(BaseModel):
    """A kind of model; its fields are the parameters, and the text below a field describes it.

    The first line of a family's docstring says what it computes.

    Attributes:
        kind: the name in a config.
        presets: parameters of well-known models, by the plain names under which a config may list
            them.
        prefixes: what the names of a preset's outputs begin with, where it is not the preset's.
        paths: parameters that may be paths of files or folders at hand.
        packages: modules that must be installed, each with what to install.
        built_by: `module:class` of the model, which `build` calls.
        to_device: move the inputs to the model's device.
        on_host: raw inputs that stay on the host even so; the model sends their parts.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    kind: ClassVar[str]
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    prefixes: ClassVar[Mapping[str, str]] = {}
    paths: ClassVar[tuple[str, ...]] = ()
    packages: ClassVar[Mapping[str, str]] = {}
    built_by: ClassVar[str] = ""
    to_device: ClassVar[bool] = True
    on_host: ClassVar[tuple[str, ...]] = ()

    def inputs(self, use: Use) -> Sequence[ImageInput | OwnInput | Input]:
        """What `forward` is given, in this order; `("text", "identity")` is the text itself."""
        return ()

    def reads(self) -> Sequence[str]:
        """Features of other models, by their full names, that follow as further inputs."""
        return ()

    def outputs(self, use: Use) -> Sequence[Output]:
        """All that the model can give.

        Raises:
            ParameterError: a parameter has a value for which that cannot be told.
        """
        raise NotImplementedError

    def checkpoints(self, use: Use) -> Sequence[Checkpoint | HubRepo | Path]:
        """What building reads: published files, repositories, and files or folders at hand."""
        return ()

    def check(self, use: Use, reads: Sequence[tuple[int, ...]]) -> None:
        """Compare what the checkpoint's files tell, as far as no torch is needed, with the
        parameters; leave out files that are not there.

        Args:
            reads: the shapes of a row of what `reads` names; empty where one is not known.

        Raises:
            ParameterError: they do not fit.
        """

    def licence(self) -> str:
        """Of the checkpoint, as its publisher names it; empty where that is not known."""
        return ""

    def build(self, use: Use, device: torch.device) -> Callable[..., Any]:
        """The model: called with a batch of each input, it gives what `outputs` are read from.

        By default `built_by`, called with the device, the weights and the parameters. A module that
        imports torch is imported here, not at the top of the family's own.

        A model of an image and a text may have a method `of_images`: given a batch of the images,
        it returns a function from texts to the result. So each image is encoded once for all texts.

        Raises:
            WeightsError: a checkpoint cannot be used.
        """
        from d2m_hpc.models.checkpoint import Weights

        module, name = self.built_by.split(":")
        made: Callable[..., Callable[..., Any]] = getattr(import_module(module), name)
        return made(device, Weights(use.folder), **self.model_dump())


@dataclass(frozen=True)
class ModelSpec:
    """What the graph and the loader must know of a model before it is built.

    Attributes:
        raw_inputs, preprocessors: pairwise, the inputs of `forward`.
        dependencies: models whose outputs follow as further inputs of `forward`.
        to_device: move the inputs to the model's device.
        on_host: raw inputs that stay on the host even so; the model sends their parts.
        checkpoints: the published files and repositories that it needs.
        files: paths of the files and folders that it needs besides.
        reads: full names of the outputs that are given in place of the dependencies' results.
        family, use: of a model that is none of a custom file.
        texts: the names of the texts that a family's model is called with, one by one; that of the
            sample's own text is empty. `raw_inputs` has all of them.
    """

    name: str
    raw_inputs: tuple[str, ...] = ()
    preprocessors: tuple[Form, ...] = ()
    dependencies: tuple[str, ...] = ()
    to_device: bool = True
    on_host: tuple[str, ...] = ()
    checkpoints: tuple[Checkpoint | HubRepo, ...] = ()
    files: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    family: Family | None = None
    use: Use | None = None
    texts: tuple[str, ...] = ("",)

    @property
    def inputs(self) -> tuple[Input, ...]:
        """The distinct (raw input, preprocessor) pairs, in the order of `forward`."""
        return tuple(zip(self.raw_inputs, self.preprocessors, strict=True))
