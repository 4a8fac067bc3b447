"""Measure the speed of models, ours and timm's: images per second, peak memory, multiply-adds.

This needs only torch and timm, so that it runs on a machine with a GPU and little else. The input
is a `Case`, the result a `Measured` for each case.
"""

import dataclasses
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from zoo.compiled_blocks import compile_blocks
from zoo.deploy import deploy
from zoo.eval.speed.cost import build, cost
from zoo.eval.speed.kernels import Kernel, profile
from zoo.files import checked, checked_fields

COMPILERS: dict[str, str | None] = {
    "compiled": None,
    "graphs": "reduce-overhead",
    "autotuned": "max-autotune",
}
"""Words of a mode that compile -> torch.compile's name of the mode."""

WORDS = ("eager", "deploy", "train", "blocks", *COMPILERS)
PRECISIONS = ("float32", "amp", "bf16")
CHECKED_IMAGES = 8
"""Images of a batch on which a case is compared with eager float32."""


def words(mode: str) -> frozenset[str]:
    """Return the words of a mode, which are joined by `+` as in `deploy+compiled`.

    `eager` is the plain model in eval mode, `deploy` its deploy form (`zoo.deploy`), `train` a
    forward and a backward pass in training mode. `compiled`, `graphs` (CUDA graphs) and
    `autotuned` are ways to compile; with `blocks`, the model is compiled block by block
    (`zoo.compiled_blocks`), and CUDA graphs still record the whole model.

    Raises:
        ValueError: a word is unknown, or words exclude each other.
    """
    chosen = frozenset(mode.split("+"))
    unknown = chosen - set(WORDS)
    if unknown:
        raise ValueError(
            f"A mode has no word {', '.join(sorted(unknown))!r}; there are {', '.join(WORDS)}, "
            "joined by + (deploy+compiled)."
        )
    if "blocks" in chosen and chosen.isdisjoint(COMPILERS):
        raise ValueError(
            f"blocks says how to compile, but the mode {mode!r} does not compile: add one of "
            f"{', '.join(COMPILERS)} (compiled+blocks)."
        )
    for exclusive in ({"deploy", "train"}, set(COMPILERS)):
        both = sorted(chosen & exclusive)
        if len(both) > 1:
            raise ValueError(f"{' and '.join(both)} exclude each other in the mode {mode!r}.")
    return chosen


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model in one mode at one size: one row of a table.

    `model` is a registered name, possibly with options (see `cost.py`), `size` the side of
    the images in pixels, and `mode` as in `words`. `precision` is `float32`, `amp` (autocast to
    bfloat16) or `bf16` (bfloat16 weights; batch norms in training stay in float32).

    Raises:
        ValueError: the mode or the precision is unknown, or a number is below 1.
    """

    model: str
    size: int = 224
    batch: int = 8
    mode: str = "eager"
    precision: str = "float32"
    channels_last: bool = False
    device: str = "cpu"

    def __post_init__(self) -> None:
        words(self.mode)
        if self.precision not in PRECISIONS:
            raise ValueError(
                f"There is no precision {self.precision!r}; there are {', '.join(PRECISIONS)}."
            )
        if self.size < 1 or self.batch < 1:
            raise ValueError(f"size {self.size} and batch {self.batch} must both be at least 1.")

    @property
    def layout(self) -> torch.memory_format:
        """The memory format of weights and images."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    @property
    def setting(self) -> tuple:
        """Everything in the case but the model; peers are compared in the same setting."""
        return tuple(v for k, v in dataclasses.asdict(self).items() if k != "model")

    def describe(self) -> str:
        """Return the case as a short text."""
        form = ", channels last" if self.channels_last else ""
        return f"{self.model} {self.mode} {self.precision}{form} {self.batch}x{self.size}"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The result of a case; `error` is set if there is none."""

    case: Case
    parameters: int = 0
    macs: float = 0.0
    """Multiply-adds of the forward pass of one image, without elementwise ones as in the scan."""
    seconds: list[float] = field(default_factory=list)
    """Seconds of each round, which is one batch."""
    first_seconds: float = 0.0
    """Seconds of the first call, with compilation."""
    peak_bytes: int | None = None
    """Peak memory; `None` on a CPU."""
    relative_error: float | None = None
    """Relative error against eager float32, over all outputs."""
    kernels: list[Kernel] = field(default_factory=list)
    """The most expensive kernels, if requested."""
    error: str | None = None
    """Why the case could not be measured."""

    @property
    def images_per_s(self) -> float:
        """Images per second in the median round; 0 if nothing was measured."""
        return self.case.batch / statistics.median(self.seconds) if self.seconds else 0.0

    @property
    def macs_per_s(self) -> float:
        """Multiply-adds per second of the forward pass."""
        return self.macs * self.images_per_s

    def as_json(self) -> dict[str, Any]:
        """Return a flat dictionary that JSON can hold."""
        fields = dataclasses.asdict(self)
        return {
            **fields.pop("case"),
            "images_per_s": self.images_per_s,
            "macs_per_s": self.macs_per_s,
            **fields,
        }

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> "Measured":
        """Restore the result of `as_json`; unknown fields, as of later versions, are ignored.

        Raises:
            ValueError: a field is missing or has another type.
        """

        def own(kind: type) -> dict[str, Any]:
            names = {f.name for f in dataclasses.fields(kind)}
            return {key: value for key, value in row.items() if key in names}

        case = checked_fields(Case, own(Case), "a row's case")
        stored = checked(row.get("kernels", []), list[dict[str, Any]], "a row's kernels")
        kernels = [checked_fields(Kernel, kernel, "a row's kernel") for kernel in stored]
        return checked_fields(cls, {**own(cls), "case": case, "kernels": kernels}, "a row")


@dataclass(frozen=True)
class Prepared:
    """A case ready to run: `step()` runs a batch forward, in training also backward."""

    case: Case
    module: nn.Module
    model: Callable[[Tensor], Any]
    """`module`, compiled if the case is."""
    images: Tensor

    def autocast(self) -> AbstractContextManager:
        """Return the context manager in which the model is run."""
        if self.case.precision != "amp":
            return nullcontext()
        cached = not isinstance(self.model, Recorded)  # a cached cast would be missing in the graph
        return torch.autocast(self.images.device.type, torch.bfloat16, cache_enabled=cached)

    def step(self) -> None:
        """Run one batch; in training, drop the gradients."""
        if "graphs" in words(self.case.mode):
            torch.compiler.cudagraph_mark_step_begin()
        if "train" not in words(self.case.mode):
            with torch.inference_mode(), self.autocast():
                self.model(self.images)
            return
        with self.autocast():
            outputs = self.model(self.images)
        total(outputs).backward()
        self.module.zero_grad(set_to_none=True)


@dataclass
class Recorded:
    """A model that runs once, is recorded in its second call, and is replayed afterwards.

    The recording is two CUDA graphs, of the kernels of the forward and the backward pass.
    """

    module: nn.Module
    calls: int = 0

    def __call__(self, images: Tensor) -> Any:
        self.calls += 1
        if self.calls == 2 and images.is_cuda:
            # Recording uses another stream than the first call, of which torch would warn.
            torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
            record = torch.cuda.make_graphed_callables
            record(self.module, (images,), allow_unused_input=True)
        return self.module(images)


def total(outputs: Any) -> Tensor:
    """Return the sum of all outputs of a model, as a loss with a gradient for each of them."""
    if isinstance(outputs, Tensor):
        return outputs.float().sum()
    return sum((total(o) for o in outputs), torch.zeros(()))


def prepare(case: Case) -> Prepared:
    """Build the case's model in its mode, with random images."""
    chosen = words(case.mode)
    module = build(case.model, case.size, case.device)
    if "deploy" in chosen:
        module = deploy(module)  # in float32, before any rounding
    dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32
    module = module.train("train" in chosen).to(dtype=dtype)
    if "train" in chosen:
        for norm in (m for m in module.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.float()  # running statistics would not change with 8 bits of mantissa
    module = module.to(memory_format=case.layout)
    model: Callable[[Tensor], Any] = module
    for word in chosen & set(COMPILERS):
        # Each case has its own shapes; with a second size torch.compile must not use dynamic ones.
        if "blocks" not in chosen:
            model = torch.compile(module, dynamic=False, mode=COMPILERS[word])
        elif word == "graphs":
            model = Recorded(compile_blocks(module))
        else:
            model = compile_blocks(module, mode=COMPILERS[word])
    shape = (case.batch, 3, case.size, case.size)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    images = images.to(case.device, dtype, memory_format=case.layout)
    return Prepared(case, module, model, images)


def timed(step: Callable[[], None], device: str, rounds: int) -> list[float]:
    """Return the seconds of each of `rounds` calls, by CUDA events on a GPU, else by the clock."""
    if torch.device(device).type != "cuda":
        times = []
        for _ in range(rounds):
            began = time.perf_counter()
            step()
            times.append(time.perf_counter() - began)
        return times
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    marks[0].record()
    for mark in marks[1:]:
        step()
        mark.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in pairwise(marks)]


@torch.no_grad()
def relative_error(prepared: Prepared) -> float:
    """Return |ours - plain| / |plain|, where plain is the eager model in float32 without TF32."""
    case = prepared.case
    with torch.inference_mode(), prepared.autocast():
        ours = _flat(prepared.model(prepared.images), CHECKED_IMAGES)
    plain = build(case.model, case.size, case.device)
    images = prepared.images[:CHECKED_IMAGES].float()
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        theirs = _flat(plain(images), CHECKED_IMAGES)
    return float((ours - theirs).norm() / theirs.norm())


def _flat(outputs: Any, images: int) -> Tensor:
    if isinstance(outputs, Tensor):
        return outputs[:images].double().flatten()
    return torch.cat([_flat(o, images) for o in outputs])


def measure(
    cases: Sequence[Case],
    *,
    rounds: int = 20,
    warmup: int = 3,
    accuracy: bool = False,
    kernels: int = 0,
    seconds: float = float("inf"),
) -> Iterator[Measured]:
    """Measure one case after another, each alone on its device; for an otherwise idle machine.

    A case that fails has a row with its error.

    Args:
        rounds: Timed calls.
        warmup: Calls before the timed ones; the first compiles.
        accuracy: Also compare inference with eager float32.
        kernels: Number of each case's most expensive kernels to list.
        seconds: Start no case after this time; the remaining ones get a row that says so.
    """
    end = time.monotonic() + seconds
    for case in cases:
        if time.monotonic() > end:
            yield Measured(case=case, error=f"not run: the {seconds:g} s were over")
            continue
        measured = _measure_alone(case, rounds, warmup, accuracy, kernels)
        _free(case)  # after a failure's stack frames, and the tensors in them, are gone
        yield measured


def _measure_alone(case: Case, rounds: int, warmup: int, accuracy: bool, kernels: int) -> Measured:
    on_gpu = torch.device(case.device).type == "cuda"
    try:
        parameters, macs = cost(case.model, case.size)
        prepared = prepare(case)
        first = _start(prepared, warmup)
        times = timed(prepared.step, case.device, rounds)
        peak = torch.cuda.max_memory_allocated() if on_gpu else None
        checked = accuracy and "train" not in words(case.mode)
        error = relative_error(prepared) if checked else None
        found = profile(prepared.step, case.device)[:kernels] if kernels else []
    except Exception as failure:  # of any kind: the other rows are still useful
        return Measured(case=case, error=_describe(failure))
    return Measured(
        case=case,
        parameters=parameters,
        macs=macs,
        seconds=times,
        first_seconds=first,
        peak_bytes=peak,
        relative_error=error,
        kernels=found,
    )


def _start(prepared: Prepared, warmup: int) -> float:
    """Run the warm-up; return the seconds of its first call.

    Peak memory is counted from the second call on: after compiling, but including the recording of
    CUDA graphs, since later calls do not allocate their memory.
    """
    on_gpu = prepared.images.is_cuda
    first = 0.0
    for i in range(max(warmup, 1)):
        began = time.perf_counter()
        prepared.step()
        if on_gpu:
            torch.cuda.synchronize()
        if i == 0:
            first = time.perf_counter() - began
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
    return first


def _free(case: Case) -> None:
    if words(case.mode) & set(COMPILERS):
        torch.compiler.reset()
    gc.collect()
    if torch.device(case.device).type == "cuda":
        torch.cuda.empty_cache()


def _describe(failure: BaseException) -> str:
    return f"{type(failure).__name__}: {' '.join(str(failure).split())[:300]}"


def measure_interleaved(
    cases: Sequence[Case], *, rounds: int = 10, warmup: int = 1, kernels: int = 0
) -> list[Measured]:
    """Measure all cases in turns (A B C A B C ...), so that a drift of the machine affects all.

    All models are in memory at once. Compare the rows round by round, by `ratio`.
    """
    ready: dict[int, Prepared] = {}
    firsts: dict[int, float] = {}
    errors: dict[int, str] = {}
    for i, case in enumerate(cases):
        try:
            prepared = prepare(case)
            firsts[i] = _start(prepared, warmup)
            ready[i] = prepared
        except Exception as failure:  # the other rows are still useful
            errors[i] = _describe(failure)
    times: dict[int, list[float]] = {i: [] for i in ready}
    for _ in range(rounds):
        for i, prepared in ready.items():
            times[i] += timed(prepared.step, prepared.case.device, 1)
    rows = []
    for i, case in enumerate(cases):
        if i in errors:
            rows.append(Measured(case=case, error=errors[i]))
            continue
        parameters, macs = cost(case.model, case.size)
        rows.append(
            Measured(
                case=case,
                parameters=parameters,
                macs=macs,
                seconds=times[i],
                first_seconds=firsts[i],
                kernels=profile(ready[i].step, case.device)[:kernels] if kernels else [],
            )
        )
    return rows


def ratio(ours: Measured, theirs: Measured) -> float | None:
    """Return the ratio of images per second; over rounds that ran in turns, the median ratio."""
    if not ours.seconds or not theirs.seconds:
        return None
    batches = ours.case.batch / theirs.case.batch
    if len(ours.seconds) == len(theirs.seconds):
        each = [b / a for a, b in zip(ours.seconds, theirs.seconds, strict=True)]
        return batches * statistics.median(each)
    return ours.images_per_s / theirs.images_per_s


def peer_of(row: Measured, rows: Sequence[Measured], peer: str) -> Measured | None:
    """Return the row of the model `peer` in the setting of `row`, if there is one."""
    for other in rows:
        if other.case.model == peer and other.case.setting == row.case.setting:
            return other
    return None
