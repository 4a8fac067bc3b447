"""How fast a model is: images a second, peak memory, multiply-adds; timm's own by the same road.

Needs torch and timm only, so that a machine with a GPU and little else can measure. What is
measured is a `Case`, what comes out is a `Measured`, one a case.
"""

import ast
import dataclasses
import functools
import gc
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import zoo
from zoo.compiled_blocks import compile_blocks
from zoo.deploy import deploy
from zoo.eval.speed.kernels import Kernel, profile

COMPILERS: dict[str, str | None] = {
    "compiled": None,
    "graphs": "reduce-overhead",
    "autotuned": "max-autotune",
}
"""Words of a mode that compile, and torch.compile's name for how."""

WORDS = ("eager", "deploy", "train", "blocks", *COMPILERS)
PRECISIONS = ("float32", "amp", "bf16")
CHECKED_IMAGES = 8
"""Of a batch, when a case is compared with eager float32."""


def words(mode: str) -> frozenset[str]:
    """Read a mode: words joined by `+`, as in `deploy+compiled`.

    `eager` is the plain model in eval mode, `deploy` its deploy form (`zoo.deploy`), `train` a
    forward and a backward pass in training mode. `compiled`, `graphs` (CUDA graphs) and
    `autotuned` are ways to compile; with `blocks` block by block (`zoo.compiled_blocks`), and CUDA
    graphs then hold the whole model.

    Raises:
        ValueError: an unknown word, or words that exclude each other.
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
            f"blocks says what is compiled, and the mode {mode!r} does not compile: add one of "
            f"{', '.join(COMPILERS)} (compiled+blocks)."
        )
    for exclusive in ({"deploy", "train"}, set(COMPILERS)):
        both = sorted(chosen & exclusive)
        if len(both) > 1:
            raise ValueError(f"{' and '.join(both)} exclude each other in the mode {mode!r}.")
    return chosen


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model in one mode at one size: what one row of a table measures.

    `model` is a registered name, with options if there are any (`name_and_options`).
    `precision` is `float32`, `amp` (autocast to bfloat16) or `bf16` (the weights too; batch norms
    that train stay in float32).
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
        return torch.channels_last if self.channels_last else torch.contiguous_format

    @property
    def setting(self) -> tuple:
        """All of the case but the model: peers are compared in the same setting."""
        return tuple(v for k, v in dataclasses.asdict(self).items() if k != "model")

    def describe(self) -> str:
        form = ", channels last" if self.channels_last else ""
        return f"{self.model} {self.mode} {self.precision}{form} {self.batch}x{self.size}"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What came out of a case; `error` says why, where nothing did."""

    case: Case
    parameters: int = 0
    macs: float = 0.0
    """Multiply-adds of the forward pass of one image, without the scan's and other elementwise."""
    seconds: list[float] = field(default_factory=list)
    """Of each round: one batch."""
    first_seconds: float = 0.0
    """Of the first call, compilation included."""
    peak_bytes: int | None = None
    relative_error: float | None = None
    """Against eager float32, of all outputs together."""
    kernels: list[Kernel] = field(default_factory=list)
    """The most expensive ones, if they were asked for."""
    error: str | None = None

    @property
    def images_per_s(self) -> float:
        return self.case.batch / statistics.median(self.seconds) if self.seconds else 0.0

    @property
    def macs_per_s(self) -> float:
        return self.macs * self.images_per_s

    def as_json(self) -> dict[str, Any]:
        fields = dataclasses.asdict(self)
        return {
            **fields.pop("case"),
            "images_per_s": self.images_per_s,
            "macs_per_s": self.macs_per_s,
            **fields,
        }

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> "Measured":
        """Read what `as_json` wrote; fields of later versions are passed over."""

        def own(kind: type) -> dict[str, Any]:
            names = {f.name for f in dataclasses.fields(kind)}
            return {key: value for key, value in row.items() if key in names}

        kernels = [Kernel(**kernel) for kernel in row.get("kernels", [])]
        return cls(case=Case(**own(Case)), **{**own(cls), "kernels": kernels})


def name_and_options(model: str) -> tuple[str, dict[str, Any]]:
    """Read `NAME` or `NAME,key=value,...`, the options being keywords of `timm.create_model`.

    Raises:
        ValueError: the options are not written as Python's keyword arguments.
    """
    name, _, rest = model.partition(",")
    try:
        call = ast.parse(f"_({rest})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or None in {k.arg for k in call.keywords}:
            raise SyntaxError
        return name, {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError):
        raise ValueError(
            f"The options of {model!r} cannot be read; write NAME,window_size=8,drop_rate=0.1."
        ) from None


def build(model: str, size: int, device: str | torch.device) -> nn.Module:
    """Make a model with random weights, the same on each call, fitted to square images of `size`.

    Models that fit themselves to a size (`set_input_size`) do so if it is not their default and
    no option of theirs sets a window.
    """
    name, options = name_and_options(model)
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(0)
        made = timm.create_model(name, **options)
    default = (getattr(made, "pretrained_cfg", None) or {}).get("input_size", (0,))[-1]
    fitted = size == default or not {"img_size", "window_size"}.isdisjoint(options)
    if not fitted and hasattr(made, "set_input_size"):
        fit: Any = made.set_input_size
        fit(img_size=size)
    return made.eval()


@functools.lru_cache(maxsize=64)
def cost(model: str, size: int) -> tuple[int, float]:
    """Count parameters, and the multiply-adds of one image, on the meta device.

    By torch's flop counter: convolutions and matrix products, those of attention included.
    """
    built = build(model, size, "meta")
    image = torch.zeros(1, 3, size, size, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        built(image)
    return sum(p.numel() for p in built.parameters()), counter.get_total_flops() / 2


@dataclass(frozen=True)
class Prepared:
    """A case ready to run: `step()` is one batch, forward, or forward and backward."""

    case: Case
    module: nn.Module
    model: Callable[[Tensor], Any]
    """`module`, compiled if the case is."""
    images: Tensor

    def autocast(self) -> AbstractContextManager:
        if self.case.precision != "amp":
            return nullcontext()
        cached = not isinstance(self.model, Recorded)  # a cast must not stay out of the graph
        return torch.autocast(self.images.device.type, torch.bfloat16, cache_enabled=cached)

    def step(self) -> None:
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
    """A model that runs once, is recorded in its second call, and replayed from then on.

    As two CUDA graphs, forward and backward, of what the model launches by then.
    """

    module: nn.Module
    calls: int = 0

    def __call__(self, images: Tensor) -> Any:
        self.calls += 1
        if self.calls == 2 and images.is_cuda:
            # Recording has a stream of its own, other than that of the first call: torch warns.
            torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
            record = torch.cuda.make_graphed_callables
            record(self.module, (images,), allow_unused_input=True)
        return self.module(images)


def total(outputs: Any) -> Tensor:
    """Add up everything that a model returns, as a loss that reaches all of it."""
    if isinstance(outputs, Tensor):
        return outputs.float().sum()
    return sum((total(o) for o in outputs), torch.zeros(()))


def prepare(case: Case) -> Prepared:
    """Build the case's model in its mode, and random images for it."""
    chosen = words(case.mode)
    module = build(case.model, case.size, case.device)
    if "deploy" in chosen:
        module = deploy(module)  # in float32, before any rounding
    dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32
    module = module.train("train" in chosen).to(dtype=dtype)
    if "train" in chosen:
        for norm in (m for m in module.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.float()  # running statistics do not move in 8 bits of mantissa
    module = module.to(memory_format=case.layout)
    model: Callable[[Tensor], Any] = module
    for word in chosen & set(COMPILERS):
        # Each case has its own shapes; a second size must not make the first one's dynamic.
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
    """Time `rounds` calls, in seconds: by CUDA events on a GPU, by the clock elsewhere."""
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
    """Compare with the plain model in float32 (no TF32), same weights: |ours - plain| / |plain|."""
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
    """Measure case after case, each alone on its device; for a machine that does nothing else.

    A case that fails is measured too: its row says why.

    Args:
        warmup: Calls before the timed ones; the first compiles.
        accuracy: Compare inference with eager float32 as well.
        kernels: Name so many of each case's most expensive kernels.
        seconds: Start no case after this time; those left get a row that says so.
    """
    end = time.monotonic() + seconds
    for case in cases:
        if time.monotonic() > end:
            yield Measured(case=case, error=f"not run: the {seconds:g} s were over")
            continue
        measured = _measure_alone(case, rounds, warmup, accuracy, kernels)
        _free(case)  # after the frames of a failure are gone, and what they held with them
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
    except Exception as failure:  # whatever it is, the other rows are still worth having
        return Measured(case=case, error=_describe(failure))
    return Measured(
        case=case, parameters=parameters, macs=macs, seconds=times, first_seconds=first,
        peak_bytes=peak, relative_error=error, kernels=found,
    )  # fmt: skip


def _start(prepared: Prepared, warmup: int) -> float:
    """Run the warm-up; give the seconds of its first call.

    Peak memory is counted from the second call on: after compiling, but with the recording of
    CUDA graphs, whose memory no later call allocates.
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
    """Measure all cases in turns (A B C A B C ...), so that a machine that drifts is fair to all.

    All models are in memory at once. Ratios of these are best taken round by round (`ratio`).
    """
    ready: dict[int, Prepared] = {}
    firsts: dict[int, float] = {}
    errors: dict[int, str] = {}
    for i, case in enumerate(cases):
        try:
            prepared = prepare(case)
            firsts[i] = _start(prepared, warmup)
            ready[i] = prepared
        except Exception as failure:  # the other rows are still worth having
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
    """Say how many times the images a second of `theirs`; the median over rounds run in turns."""
    if not ours.seconds or not theirs.seconds:
        return None
    batches = ours.case.batch / theirs.case.batch
    if len(ours.seconds) == len(theirs.seconds):
        each = [b / a for a, b in zip(ours.seconds, theirs.seconds, strict=True)]
        return batches * statistics.median(each)
    return ours.images_per_s / theirs.images_per_s


def peer_of(row: Measured, rows: Sequence[Measured], peer: str) -> Measured | None:
    """Find the row of the model `peer` in the setting of `row`."""
    for other in rows:
        if other.case.model == peer and other.case.setting == row.case.setting:
            return other
    return None


def environment(command: str | None = None) -> dict[str, Any]:
    """Describe what a measurement depends on besides the models: machine, versions, threads."""
    gpu = torch.cuda.is_available()
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions |= {"timm": timm.__version__, "zoo": zoo.__version__}
    if gpu:
        versions |= {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": command or " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "versions": versions,
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
            "gpu": torch.cuda.get_device_name() if gpu else None,
        },
        "threads": torch.get_num_threads(),
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "cudnn_benchmark_limit": torch.backends.cudnn.benchmark_limit,
    }


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
