"""Run models in dependency order on one device, one batch ahead of the reader of their outputs."""

from __future__ import annotations

import logging
from collections.abc import (
    Callable,
    Collection,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext, suppress
from copy import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2m_hpc.config import Config
from d2m_hpc.errors import ConfigError, D2MError, OutputError, ShardError
from d2m_hpc.models import custom, precision
from d2m_hpc.models.checkpoint import Weights
from d2m_hpc.models.clip import Clip, OpenAIClip
from d2m_hpc.models.compiled import PAYS_AFTER, compile_for, is_convolutional
from d2m_hpc.models.entries import name_of
from d2m_hpc.models.family import ModelSpec, result_of
from d2m_hpc.models.inputs import Input, as_prepared, kind_of, named_text
from d2m_hpc.models.recorded import CudaGraphs, as_it_is, image_forward
from d2m_hpc.models.registry import in_order
from d2m_hpc.models.transfer import CudaCopies, each
from d2m_hpc.models.weights import weights_dir
from d2m_hpc.stopping import is_asked
from d2m_hpc.worker.batch import Batch, Outputs, count, flags, take
from d2m_hpc.worker.compute.heap import Heap
from d2m_hpc.worker.compute.in_flight import Computed, InFlight, Pending, row_count
from d2m_hpc.worker.compute.resolve import Toolbox
from d2m_hpc.worker.gate import Gate

log = logging.getLogger(__name__)

Finished = dict[tuple[Input, torch.device], Any]
"""Inputs in the models' form, by device."""


def amp_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """The autocast dtype, or None; `auto` is float16 on CUDA and off on the CPU."""
    if amp == "auto":
        return torch.float16 if device.type == "cuda" else None
    return {"float16": torch.float16, "bfloat16": torch.bfloat16, "off": None}[amp]


def _knows_bfloat16() -> bool:
    """Whether this CPU has instructions for it, and not for float32 alone."""
    with suppress(OSError):
        return bool({"avx512_bf16", "amx_bf16"} & {*Path("/proc/cpuinfo").read_text().split()})
    return False


def _lay_out(model: Any) -> None:
    """Convolutions in bfloat16 take channels last as they are, where the CPU computes it: 0.65 of
    the descriptor's time. In float32 the layout stays, as sums in another order move descriptors
    of pictures of one colour."""
    if hasattr(model, "layout") and _knows_bfloat16():
        model.layout = torch.channels_last
        model.image_net.to(memory_format=model.layout)


class Graph:
    """All models of a config; as a context, it keeps autocast's copies of the weights.

    Args:
        device: for the built-in models; custom models get `config.device`, as in the seed program,
            or "cpu".

    Attributes:
        gate: shut while kernels are launched, and while outputs are read.
    """

    def __init__(self, config: Config, toolbox: Toolbox, device: torch.device) -> None:
        self.toolbox = toolbox
        self.device = device
        self._weights = Weights(weights_dir(config.weights_dir))
        self.dtype = amp_dtype(config.amp, device)
        if config.amp == "auto" and device.type == "cpu" and _knows_bfloat16():
            log.info("this CPU computes bfloat16: `amp: bfloat16` takes half of the time or less")
        if device.type == "cuda":
            torch.cuda.set_device(device)  # else each call that names no device opens GPU 0 too
        self._copies = CudaCopies(device)
        self.gate = Gate()
        self._graphs = CudaGraphs(device, config.compile is not False)
        self._batch_size = self._fitting = config.batch_size
        # float32 (`amp: off`, rows that are computed again) means all of its bits, not 10.
        precision.use_full_float32()
        # cuDNN's attention makes a plan for each new shape, 40 to 600 ms long on an H200, and texts
        # come in thousands of shapes. The other kernels take any shape at once.
        torch.backends.cuda.enable_cudnn_sdp(False)
        as_given = config.device if device.type == "cuda" else "cpu"
        self.models = {
            name: self._build(toolbox.specs[name], as_given) for name in in_order(toolbox.specs)
        }
        self._awaited = {d for spec in toolbox.specs.values() for d in spec.dependencies}
        self._of = {result_of(n, t): n for n, spec in toolbox.specs.items() for t in spec.texts}
        # Autocast forgets its cast weights when its outermost context ends. This one casts nothing,
        # and only keeps the weights.
        self._kept = torch.autocast(device.type, enabled=False)
        compiled = [] if config.compile is False else self._compile(config.compile == "auto")
        self._record(compiled)

    def _build(self, spec: ModelSpec, as_given: int | str) -> Any:
        made = None if spec.family else self.toolbox.classes[spec.name]
        try:
            if spec.family and spec.use:
                model = spec.family.build(spec.use, self.device)
                if self.dtype == torch.float16 and isinstance(model, Clip):
                    model.to_half()
                if isinstance(model, OpenAIClip):
                    wanted = spec.use.wanted & {"text", "score"}
                    model.encodes_text = bool(wanted) or self.toolbox.has_own_posts
                if self.dtype == torch.bfloat16 and self.device.type == "cpu":
                    _lay_out(model)
            else:
                model = custom.build(spec, made, as_given, self._weights)
            precision.cast_once(model)
            return model
        except (D2MError, torch.OutOfMemoryError):
            raise
        except BaseException as error:
            if is_asked(error):
                raise
            which = repr(spec.name) if made is None else f"{spec.name!r} ({custom.origin(made)})"
            mistake = f"{which} cannot be built: {custom.described(error)}"
            raise ConfigError("models", [mistake]) from error

    def declared(self, config: Config, raws: Collection[str], own: bool) -> Graph:
        """The same models, less those that take other raw inputs than these, and all that depend
        on them.

        Args:
            own: keep custom models, too, which declare their outputs, and no outputs but these.
        """
        specs = self.toolbox.specs
        kept: set[str] = set()
        for name in in_order(specs):
            spec = specs[name]
            known = spec.family or (own and hasattr(self.toolbox.classes[name], "outputs"))
            if (
                known
                and {*map(kind_of, spec.raw_inputs)} <= {*raws}
                and {*spec.dependencies} <= kept
            ):
                kept.add(name)
        post, made = self.toolbox.registry.post, self.toolbox.tables.values()
        skipped = {name for table in made for name in table} if own else set()
        lists = {
            key: [n for n in getattr(config, key) if post(n).model in kept and n not in skipped]
            for key in ("postprocess_columns", "postprocess_features")
        }
        models = [entry for entry in config.models if name_of(entry) in kept]
        small = copy(self)
        small.toolbox = self.toolbox.only(config.model_copy(update={**lists, "models": models}))
        small.models = {name: model for name, model in self.models.items() if name in kept}
        return small

    def _image_nets(self) -> dict[str, Any]:
        return {n: m.image_net for n, m in self.models.items() if hasattr(m, "image_net")}

    def _compile(self, later: bool) -> list[str]:
        """Compile image nets, whose names are given back.

        Args:
            later: built-in nets that gain much by it, once the task has shown to be a long one.
        """
        nets, rows, run = self._image_nets(), self._batch_size, self._graphs.run
        if later:
            long = self.device.type == "cuda" and self.dtype is not None
            nets = {n: net for n, net in nets.items() if long and self._gains(n, net)}
        elif nets:
            log.info("compiling %s; the first batches of %d take minutes", ", ".join(nets), rows)
        for name, net in nets.items():
            own = run if self.toolbox.specs[name].family else as_it_is
            compile_for(rows, net, after=PAYS_AFTER if later else 0, need=not later, run=own)
        return list(nets)

    def _gains(self, name: str, net: Any) -> bool:
        return self.toolbox.specs[name].family is not None and is_convolutional(net)

    def _record(self, compiled: Collection[str]) -> None:
        """Built-in models, whose code looks at no values; compiled nets are recorded as such."""
        for name, model in self.models.items():
            if not self.toolbox.specs[name].family:
                continue
            if hasattr(model, "recorded"):
                model.recorded = self._graphs.run
            if hasattr(model, "image_net") and name not in compiled:
                net = model.image_net
                net.forward = image_forward(net, self._graphs.run)

    def __enter__(self) -> Graph:
        self._kept.__enter__()  # type: ignore[no-untyped-call]
        self._graphs.start()
        if self.device.type == "cuda":
            # All cores decode: several threads of torch would wait for one another, milliseconds in
            # each call, and this thread has little to compute.
            torch.set_num_threads(1)
        return self

    def __exit__(self, *error: Any) -> None:
        self._graphs.stop()
        self._kept.__exit__(*error)

    def run(
        self,
        batches: Iterable[Batch],
        begun: list[Future[InFlight]] | None = None,
        ahead: Callable[[], None] = lambda: None,
    ) -> Generator[Outputs]:
        """Yield each batch's outputs; while the caller reads them, the next batch is computed.

        A model's error on the next batch may be raised with this one, as a `ShardError`.

        Args:
            begun: a batch before these that was launched, or the error of that; taken from here.
            ahead: called when the device has, or has had, the last batch, to launch what follows.
        """
        heap = Heap()
        try:
            before = begun.pop().result() if begun else None
            for batch in batches:
                launched = self.launch(batch)
                if before is not None:
                    yield before.outputs()
                before = launched
                heap.tidy()
            if before is not None:
                ahead()
                last = before.outputs()
                ahead()
                yield last
        except BaseException:
            self.wait()
            raise

    def wait(self) -> None:
        """Wait for all that was launched, as the memory of what is given up is used again."""
        self._copies.mark()()

    def __call__(self, batch: Batch) -> Outputs:
        """Compute one batch alone."""
        return self.launch(batch).outputs()

    @property
    def returns_early(self) -> bool:
        """Whether the caller goes on while a batch is computed; a CPU computes it at once."""
        return self.device.type == "cuda"

    def launch(self, batch: Batch) -> InFlight:
        """Start computing a batch; raise `ShardError` where a model fails at once."""
        alone = self.gate.shut if self.returns_early else nullcontext
        with alone():
            return InFlight(batch, self.toolbox, self._compute, self.dtype is not None, alone)

    # In `inference_mode`, autocast would cast the weights anew at each use.
    @torch.no_grad()
    def _compute(self, inputs: Mapping[Input, Any], precise: Collection[str]) -> Pending:
        rows = count(next(iter(inputs.values()), []))  # a config of fields alone has no inputs
        while True:
            size = min(rows, self._fitting)
            try:
                parts, sent = [], list[Any]()
                for start in range(0, max(rows, 1), max(size, 1)):
                    some = {i: take(v, slice(start, start + size)) for i, v in inputs.items()}
                    parts.append(self._copies.fetch(self._outputs(some, precise, sent)))
                return Pending(parts, sent, self._copies.mark(), self._on_host)
            except torch.OutOfMemoryError:
                if size < 2 and not self._graphs.has_recorded:
                    raise
            # Outside of `except`, as the error holds what was computed. The rows are launched again
            # with memory that is in use until what was launched before is done.
            self.wait()
            if self._graphs.give_up():
                log.warning("out of memory on %d rows; launches are recorded no more", size)
                continue
            self._fitting = -(-size // 2)
            log.warning("out of memory on %d rows; %d at a time from now on", size, self._fitting)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _outputs(
        self, inputs: Mapping[Input, Any], precise: Collection[str], sent: list[Any]
    ) -> Computed:
        """Run all models on rows that fit into memory; what was copied for them goes to `sent`."""
        rows = count(next(iter(inputs.values()), []))
        # The search for the fastest convolutions pays for full batches only.
        torch.backends.cudnn.benchmark = rows == self._fitting
        finished = self._finished(inputs, sent)
        cache: dict[str, Any] = {}
        flagged: dict[str, tuple[Tensor, ...]] = {}
        for name in self.models:
            for result, output in self._results(name, finished, cache, precise):
                flagged[result] = flags(output)
                cache[result] = self._at_once(name, output) if name in self._awaited else output
        return cache, flagged

    def _results(
        self, name: str, inputs: Finished, cache: dict[str, Any], precise: Collection[str]
    ) -> Iterator[tuple[str, Any]]:
        """Run a model on each of its texts; one with `of_images` encodes its images once."""
        spec, model = self.toolbox.specs[name], self.models[name]
        results = [result_of(name, text) for text in spec.texts]
        dtype = None if {*results} & {*precise} else self.dtype
        if len(results) == 1:
            arguments = self._arguments(name, inputs, cache, spec.inputs)
            yield results[0], self._run(name, arguments, dtype)
            return
        shared = [i for i in spec.inputs if kind_of(i[0]) != "text"]
        call: Any = None
        if hasattr(model, "of_images"):
            seen = self._arguments(name, inputs, cache, shared)
            call, shared = self._run(name, seen, dtype, model.of_images), []
        for text, result in zip(spec.texts, results, strict=True):
            own = [i for i in spec.inputs if i[0] == named_text(text) or i in shared]
            yield result, self._run(name, self._arguments(name, inputs, cache, own), dtype, call)

    def _place(self, spec: ModelSpec, wanted: Input) -> torch.device:
        stays = not spec.to_device or kind_of(wanted[0]) in spec.on_host
        return torch.device("cpu") if stays else self.device

    def _finished(self, inputs: Mapping[Input, Any], sent: list[Any]) -> Finished:
        """Copy every input to its models' devices, once, and finish it there."""
        wanted = {(i, self._place(s, i)) for s in self.toolbox.specs.values() for i in s.inputs}
        made, prepared = self.toolbox.preprocessors, {i: as_prepared(i) for i, _ in wanted}
        there = {prepared[i] for i, place in wanted if place == self.device}
        copied = self._copies.send({i: inputs[i] for i in there})
        sent.append(copied)
        return {
            (i, place): made[i[1]].finish((copied if place == self.device else inputs)[prepared[i]])
            for i, place in wanted
        }

    def _arguments(
        self, name: str, inputs: Finished, cache: dict[str, Any], wanted: Sequence[Input]
    ) -> list[Any]:
        spec = self.toolbox.specs[name]
        own = [inputs[i, self._place(spec, i)] for i in wanted]
        if not spec.reads:
            return own + [cache[d] for d in spec.dependencies]
        read = (self.toolbox.reads[n](cache) for n in spec.reads)
        return own + [each(value, lambda t: t.to(self.device)) for value in read]

    def _at_once(self, name: str, output: Any) -> Any:
        """Wait for the output and run the model's `on_host`, if it has one, before passing it
        on."""
        if not hasattr(self.models[name], "on_host"):
            return output
        fetched = self._copies.fetch(output)
        self._copies.mark()()
        return self._read(name, fetched)

    def _on_host(self, result: str, output: Any) -> Any:
        name = self._of[result]
        return output if name in self._awaited else self._read(name, output)

    def _read(self, name: str, output: Any) -> Any:
        model = self.models[name]
        return self._copies.kept(model.on_host(output) if hasattr(model, "on_host") else output)

    def _run(
        self, name: str, arguments: list[Any], dtype: torch.dtype | None, call: Any = None
    ) -> Any:
        """Run one model on some rows, or `call`, a part of the model."""
        try:
            with self._precision(name), self._autocast(dtype):
                output = (call or self.models[name])(*arguments)
                if output is None:
                    what = "TypeError: its forward returned None; is a `return` missing?"
                    raise OutputError(f"{name!r} raised {what}")
                return _outputs(output, arguments)
        except (torch.OutOfMemoryError, OutputError):
            raise
        except Exception as error:
            raise ShardError(f"{name!r} raised {custom.described(error)}") from error

    @contextmanager
    def _precision(self, name: str) -> Iterator[None]:
        """What a custom file says of float32's precision is for its own models."""
        if self.toolbox.specs[name].family is None or not self.toolbox.classes:
            yield
            return
        with precision.restored():
            precision.use_full_float32()
            yield

    def _autocast(self, dtype: torch.dtype | None) -> Any:
        return torch.autocast(self.device.type, dtype) if dtype else nullcontext()


def _outputs(output: Any, arguments: Sequence[Any]) -> Any:
    """Several outputs in a list as a tuple; a list of rows stays one."""
    if not isinstance(output, list) or not all(isinstance(x, Tensor) for x in output):
        return output
    several = bool(output) and all(row_count(x) == count(arguments[0]) for x in output)
    return tuple(output) if several else output
