"""Names to models, columns and features: the families', a config's own, and a custom file's on top.

Nothing here imports torch: the login node checks a config with the same tables that a task runs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache, partial
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from d2m_hpc.models import weights
from d2m_hpc.models.entries import (
    Listed,
    family_of,
    known_families,
    name_of,
    presets,
    require_packages,
)
from d2m_hpc.models.family import Family, ModelSpec, Output, ParameterError, Post, Use
from d2m_hpc.models.inputs import NAMED, Form, ImageInput, Input, OwnInput, named_text
from d2m_hpc.models.types import is_column_type
from d2m_hpc.storage.texts import BRIEF, nearest, safe

DATACOMP_KEYS: Mapping[str, str] = {
    "oai-clip-vit-b32-score": "clip_b32_similarity_score",
    "oai-clip-vit-l14-score": "clip_l14_similarity_score",
    "face-boxes": "face_bboxes",
    "dedup-isc-ft-v107-score": "dedup",
    "oai-clip-vit-b32-image": "b32_img",
    "oai-clip-vit-b32-text": "b32_txt",
    "oai-clip-vit-l14-image": "l14_img",
    "oai-clip-vit-l14-text": "l14_txt",
}
"""The names that DataComp's tools read, with `use_datacomp_keys`."""
EMPTY = Path("/dev/null")
"""In place of a weights folder into which nothing is fetched."""
Made = TypeVar("Made")
Mistakes = list[tuple[str, str]]
"""Parameters, and what is wrong with each."""
NAME = re.compile(r"\w[\w.+-]{0,99}")
"""Names of models and outputs, of which columns, features and arrays in an npz have theirs."""
NAME_RULE = "letters, digits, `_`, and behind the first also `.`, `+`, `-`; 100 at most"
LOOKUPS = (
    "model_lookup",
    "preprocessor_lookup",
    "postprocess_parquet_lookup",
    "postprocess_feature_lookup",
)


def _require_name(what: str, name: str) -> None:
    if not NAME.fullmatch(name):
        raise ParameterError("", f"the {what} {safe(name, BRIEF)!r}: valid: {NAME_RULE}")


class Problem(NamedTuple):
    """What is wrong with a model of a config.

    Attributes:
        model: its name.
        loc: the keys below `models` that lead to the mistake.
        what: empty where another mistake causes it, which is told.
    """

    model: str
    loc: tuple[str | int, ...]
    what: str


def _asked(family: Family, method: str, *given: Any) -> list[Any]:
    """What a method of a family gives, in a list.

    Raises:
        ParameterError: a parameter has a value that cannot be used; a checkpoint's own files say
            what the family does not expect; or another package's family fails.
    """
    kind = type(family)
    try:
        return [*(getattr(family, method)(*given) or ())]
    except ParameterError:
        raise
    except (Exception, SystemExit) as error:
        why = error if isinstance(error, ValueError) else repr(error)
        if kind not in known_families().values():
            what = f"{kind.__module__}:{kind.__name__}.{method} fails: {error!r}"
            raise ParameterError("kind", what) from error
        what = "pictures or texts cannot be prepared" if method == "inputs" else "files are unfit"
        raise ParameterError(
            family.paths[0] if family.paths else "", f"its {what}: {why}"
        ) from error


class Chosen(NamedTuple):
    """A model and its outputs, by their full names.

    Attributes:
        loc: the keys below a config's `models` that lead to the model.
    """

    name: str
    family: Family
    outputs: Mapping[str, Output]
    loc: tuple[str | int, ...] = ()

    @classmethod
    def of(
        cls,
        name: str,
        family: Family,
        folder: Path,
        loc: tuple[str | int, ...] = (),
        asked: Collection[str] = (),
        texts: Collection[str] = (),
    ) -> Chosen:
        """
        Args:
            asked: full names of outputs that a config asks for, also of other models.
            texts: names of further texts, each of which has outputs of its own.

        Raises:
            ParameterError: a parameter has a value that cannot be used.
        """
        prefix = family.prefixes.get(name, name)
        own = [n.removeprefix(f"{prefix}-") for n in asked if n.startswith(f"{prefix}-")]
        of_texts = tuple(f"{text}-" for text in texts)
        bare = (n.partition("-")[2] if n.startswith(of_texts) else n for n in own)
        use = Use(name, folder, frozenset(bare) if texts else frozenset(own))
        outputs: dict[str, Output] = {}
        given = _asked(family, "outputs", use)
        for output in given:
            if not isinstance(output, Output):
                raise _given(family, "outputs", output, "an Output")
            if output.type and not is_column_type(output.type):
                raise _given(family, "outputs", output.type, "a type such as float32 or string")
            _require_name("output", output.name)
        if texts:
            inputs = _inputs(family, replace(use, wanted=frozenset(o.name for o in given)))
            texts = texts if any(raw == "text" for raw, _ in inputs) else ()
        for output in given:
            for text in ("", *texts) if output.of_text else ("",):
                full = "-".join(filter(None, (prefix, text, output.name)))
                if full in outputs:
                    raise ParameterError("", f"it gives twice the output {output.name!r}")
                outputs[full] = replace(output, text=text)
        return cls(name, family, outputs, loc)

    def posts(self, columns: bool) -> dict[str, Post]:
        """The columns, or the features."""
        named = self.outputs.items()
        return {n: o.post(self.name) for n, o in named if bool(o.type) == columns}

    def spec(
        self,
        folder: Path,
        asked: Collection[str],
        posts: Mapping[str, Post],
        listed: Collection[str] = (),
        broken: Collection[str] = (),
    ) -> ModelSpec:
        """
        Args:
            asked: full names of outputs; where none is this model's, the model gives all.
            posts: how the features of other models are read.
            listed: the models of the config.
            broken: those of them whose outputs are not known, for a mistake that is told.

        Raises:
            ParameterError: it reads an output that no model gives.
        """
        named, reads = self.outputs.items(), tuple(self.family.reads())
        for name in (n for n in reads if not posts.get(n, Post()).model):
            if name.startswith(tuple(f"{model}-" for model in broken)):
                raise ParameterError()
            near = [n for n, post in posts.items() if post.model in listed]
            what = f"no model gives the feature {name!r}{nearest(name, near or posts)}"
            given = self.family.model_dump().items()
            raise ParameterError(next((p for p, value in given if value == name), ""), what)
        wanted = [o for n, o in named if n in asked] or [o for _, o in named if not o.text]
        use = Use(self.name, folder, frozenset(o.name for o in wanted))
        texts = tuple(dict.fromkeys(o.text for o in wanted if o.of_text)) or ("",)
        inputs = _of_texts(_inputs(self.family, use), texts)
        needed = _asked(self.family, "checkpoints", use)
        return ModelSpec(
            self.name,
            raw_inputs=tuple(raw for raw, _ in inputs),
            preprocessors=tuple(form for _, form in inputs),
            dependencies=tuple(dict.fromkeys(posts[n].model for n in reads)),
            to_device=self.family.to_device,
            on_host=self.family.on_host,
            checkpoints=tuple(c for c in needed if not isinstance(c, Path)),
            files=tuple(str(c) for c in needed if isinstance(c, Path)),
            reads=reads,
            family=self.family,
            use=use,
            texts=texts,
        )


def _inputs(family: Family, use: Use) -> list[Input]:
    found = _asked(family, "inputs", use)
    pairs = [(i.raw, i) if isinstance(i, ImageInput | OwnInput) else i for i in found]
    for pair in pairs:
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[1], Form)):
            raise _given(family, "inputs", pair, "an ImageInput, an OwnInput or a pair of names")
    return pairs


def _of_texts(inputs: Iterable[Input], texts: Sequence[str]) -> list[Input]:
    """The inputs, that of the text once for each of the texts."""
    raws: dict[str, list[str]] = {"text": [*map(named_text, texts)]}
    return [(named, form) for raw, form in inputs for named in raws.get(raw, [raw])]


def _given(family: Family, method: str, found: Any, valid: str) -> ParameterError:
    """The mistake that a family's method gives something of another kind."""
    kind = type(family)
    what = f"{kind.__module__}:{kind.__name__}.{method} gives {safe(repr(found), BRIEF)}"
    return ParameterError("kind", f"{what}; valid is {valid}")


def _posts(chosen: Iterable[Chosen], columns: bool) -> dict[str, Post]:
    return {name: post for c in chosen for name, post in c.posts(columns).items()}


def _by_files(make: Callable[[Path], Made], folder: Path) -> tuple[Made, ParameterError | None]:
    """Call a function with the weights folder, or with an empty one where a mistake is in its
    files: so `d2m weights` can mend damaged ones.

    Returns:
        what the function made, and the mistake.
    """
    try:
        return make(folder), None
    except ParameterError as error:
        return make(EMPTY), error


def _usable(named: Mapping[str, Family], folder: Path) -> Iterator[Chosen]:
    """Without those that an installed library is too old for; a config that lists one is told."""
    for name, family in named.items():
        for place in (folder, EMPTY):
            use = Use(name, place, frozenset())
            with suppress(Exception):  # whatever the files lead to
                family.inputs(use), family.checkpoints(use)
                yield Chosen.of(name, family, place)
                break


@cache
def builtin() -> Registry:
    """The names of the presets. Made when asked: `status` and its like load no family.

    Example:
        >>> builtin().post("oai-clip-vit-l14-score").type
        'float32'
    """
    folder = weights.default_dir()
    chosen = [*_usable(presets(), folder)]
    columns, features = _posts(chosen, columns=True), _posts(chosen, columns=False)
    made = ((c.name, partial(c.spec, asked=(), posts=features)) for c in chosen)
    models = {name: _by_files(make, folder)[0] for name, make in made}
    return Registry(models, columns, features)


@dataclass(frozen=True)
class Registry:
    """All names that a config may use; by default, the built-in ones."""

    models: Mapping[str, ModelSpec] = field(default_factory=lambda: builtin().models)
    columns: Mapping[str, Post] = field(default_factory=lambda: builtin().columns)
    features: Mapping[str, Post] = field(default_factory=lambda: builtin().features)
    preprocessors: frozenset[str] = frozenset(NAMED)
    own: frozenset[str] = frozenset()
    """The names that a custom file gives, of all kinds; they go before built-in ones."""
    damaged: Mapping[str, Mistakes] = field(default_factory=dict)
    """What is wrong with the files of models that are taken as if they were not fetched yet."""

    def post(self, name: str) -> Post:
        """How a column or feature is made; one that reads no model where there is none."""
        return self.features.get(name) or self.columns.get(name) or Post()

    def specs(self, names: Iterable[str]) -> dict[str, ModelSpec]:
        """Of the models that are known."""
        return {name: self.models[name] for name in names if name in self.models}

    def with_models(
        self,
        entries: Sequence[Listed],
        asked: Collection[str],
        folder: Path,
        texts: Collection[str] = (),
    ) -> tuple[Registry, list[Problem]]:
        """Add the models of a config.

        Args:
            entries: the config's `models`.
            asked: its columns and features; a model gives those and no others, where it can.
            folder: the weights folder.
            texts: names of the config's further texts.

        Returns:
            the registry, without those models with which something is wrong; and what is.
        """
        chosen, problems, damaged = self._chosen(entries, asked, folder, texts)
        # Presets anew: what is in the weights folder may tell more of their outputs by now.
        columns, features = (
            {**old, **{n: p for n, p in _posts(chosen, kind).items() if n not in self.own}}
            for old, kind in ((self.columns, True), (self.features, False))
        )
        read = (name for c in chosen for name in c.family.reads())
        listed = self.specs(map(name_of, entries)).values()
        taken = {d for spec in listed if spec.family is None for d in spec.dependencies}
        whole = (n for c in chosen if c.name in taken for n, o in c.outputs.items() if not o.text)
        asked = {*asked, *read, *whole}
        names = [*map(name_of, entries)]
        models = {
            n: spec for n, spec in self.models.items() if n not in {p.model for p in problems}
        }
        broken = {*names} - {*models, *(c.name for c in chosen)}
        for c in chosen:
            try:
                make = partial(c.spec, asked=asked, posts=features, listed=names, broken=broken)
                models[c.name], wrong = _by_files(make, folder)
                damaged |= {c.name: wrong.mistakes} if wrong else {}
            except ParameterError as error:
                problems += _problems(c.name, c.loc, error)
        made = Registry(models, columns, features, self.preprocessors, self.own, damaged)
        return made, problems

    def unfit(self, entries: Iterable[Listed]) -> list[Problem]:
        """What does not fit in the checkpoints of a config's models, which it has been given.

        Args:
            entries: the config's `models`.
        """
        problems: list[Problem] = []
        for i, entry in enumerate(entries):
            spec = self.models.get(name := name_of(entry))
            if mistakes := self.damaged.get(name):
                problems += _problems(name, _loc(i, entry), ParameterError(*mistakes))
            elif spec and spec.family and spec.use:
                try:
                    shapes = [self.post(n).shape for n in spec.reads]
                    _asked(spec.family, "check", spec.use, shapes)
                except ParameterError as error:
                    problems += _problems(name, _loc(i, entry), error)
        return problems

    def _chosen(
        self,
        entries: Sequence[Listed],
        asked: Collection[str],
        folder: Path,
        texts: Collection[str],
    ) -> tuple[list[Chosen], list[Problem], dict[str, Mistakes]]:
        damaged: dict[str, Mistakes] = {}
        chosen: list[Chosen] = []
        problems: list[Problem] = []
        given_by: dict[str, str] = {}
        for i, entry in enumerate(entries):
            name = name_of(entry)
            loc = _loc(i, entry)
            try:
                if not isinstance(entry, str):
                    _require_name("name", name)
                    self._require_new(name)
                    family = family_of(entry)
                elif name in presets() and name not in self.own:
                    family = presets()[name]
                else:
                    continue
                require_packages(family)
                make = partial(Chosen.of, name, family, loc=loc, asked=asked, texts=texts)
                one, wrong = _by_files(make, folder)
                damaged |= {name: wrong.mistakes} if wrong else {}
                for output in sorted(one.outputs):
                    # A name that is listed twice is told by whoever checks the list.
                    if (other := given_by.setdefault(output, name)) != name:
                        what = f"{output!r} is an output of {other!r} too; rename one of the models"
                        raise ParameterError("", what)
                chosen.append(one)
            except ParameterError as error:
                problems += _problems(name, loc, error)
        return chosen, problems, damaged

    def _require_new(self, name: str) -> None:
        whose = "the custom file's" if name in self.own else "a built-in model's"
        if name in self.models:
            raise ParameterError("", f"{name!r} is {whose} name; choose another")


def _loc(i: int, entry: Listed) -> tuple[str | int, ...]:
    """The keys below a config's `models` that lead to its item `i`."""
    return (i,) if isinstance(entry, str) else (i, name_of(entry))


def _problems(name: str, loc: tuple[str | int, ...], error: ParameterError) -> list[Problem]:
    found = error.mistakes or [("", "")]
    return [Problem(name, (*loc, *([p] if p and len(loc) > 1 else [])), what) for p, what in found]


def in_order(specs: Mapping[str, ModelSpec]) -> list[str]:
    """The models' names so that each stands after its dependencies.

    Raises:
        graphlib.CycleError: the dependencies form a circle.
    """
    order = TopologicalSorter({s.name: s.dependencies for s in specs.values()}).static_order()
    return [name for name in order if name in specs]
