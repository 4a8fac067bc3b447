"""The most expensive kernels of a model, and how far each is from its lower bound, the floor.

An operator's floor is the time in which the chip's memory could move the bytes that it must read
and write, or the matrix units could do its arithmetic, whichever is longer. Both are **estimated
from the shapes** of the operator that launched the kernel:

* bytes: every input once and every output once. The profiler records no outputs: those of matrix
  products and convolutions are computed, kernels of torch.compile list theirs among the inputs,
  and for any other operator the output is assumed to be as large as its largest input. What a
  kernel reads twice, or finds in the cache, is not known.
* arithmetic: that of matrix products, convolutions and attention in 16 bit; nothing else.

If an operator launches several kernels, the floor is that of the operator, and it is compared with
the time of all of them. An operator of unknown shapes has no floor.
"""

import ast
import json
import math
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity

Event = dict[str, Any]
"""An entry of a profiler's trace."""

Shape = tuple[int, ...]


class Limits(NamedTuple):
    """The limits of a chip, as measured."""

    bytes_per_s: float
    flops_per_s: float
    """For matrix products in bfloat16."""


LIMITS = {"H200": Limits(4.3e12, 790e12)}
"""Limits by a part of the device's name."""

ITEM_BYTES = {
    "c10::BFloat16": 2, "c10::Half": 2, "float": 4, "double": 8,
    "long int": 8, "long": 8, "int": 4, "short int": 2, "bool": 1, "unsigned char": 1,
    "signed char": 1,
}  # fmt: skip
"""Bytes of a value, by the names of types in a trace."""

LISTED_BYTES = 2
"""Bytes of a value in a list of tensors, whose type a trace does not have."""


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A kernel, summed over its launches by one kind of operator; numbers are for one step."""

    name: str
    op: str
    seconds: float
    share: float
    """Share of the step's time in kernels."""
    calls: float
    op_seconds: float
    """Seconds of all kernels of the operators that launched this one."""
    floor_seconds: float | None = None
    """The floor of these operators; estimated, see above."""
    bound: str = ""
    """What the floor mainly consists of: `memory` or `arithmetic`."""

    @property
    def times_floor(self) -> float | None:
        """The operators' time divided by their floor, if that is known."""
        return self.op_seconds / self.floor_seconds if self.floor_seconds else None


class Work(NamedTuple):
    """The work of an operator, estimated from its shapes."""

    bytes: float
    flops: float


def profile(step: Callable[[], None], device: str, *, steps: int = 3) -> list[Kernel]:
    """Return the kernels of `step` (on a CPU its operators), the most expensive first.

    Call `step` before, so that compilation and warm-up are not measured.

    Args:
        steps: Calls that are profiled.
    """
    on_gpu = torch.device(device).type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    how: dict[str, Any] = dict(activities=activities, record_shapes=on_gpu, acc_events=True)
    with torch.profiler.profile(**how) as profiler:
        for _ in range(steps):
            step()
        if on_gpu:
            torch.cuda.synchronize()
    if on_gpu:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(path))
            events = json.loads(path.read_text())["traceEvents"]
        found = (limit for name, limit in LIMITS.items() if name in torch.cuda.get_device_name())
        return kernels_of(events, steps=steps, limits=next(found, None))
    averages = profiler.key_averages()
    total = sum(op.self_cpu_time_total for op in averages) or 1
    kernels = [
        Kernel(
            name=op.key,
            op=op.key,
            seconds=op.self_cpu_time_total / 1e6 / steps,
            share=op.self_cpu_time_total / total,
            calls=op.count / steps,
            op_seconds=op.self_cpu_time_total / 1e6 / steps,
        )
        for op in averages
    ]
    return sorted(kernels, key=lambda kernel: -kernel.seconds)


def kernels_of(
    events: Iterable[Event], *, steps: int = 1, limits: Limits | None = None
) -> list[Kernel]:
    """Sum a GPU trace by kernel and launching operator, the most expensive first.

    Args:
        events: `traceEvents` of a Chrome trace that was recorded with shapes.
        steps: Number of steps in the trace.
        limits: The limits of the chip, for the floors.
    """
    ops: dict[int, Event] = {}
    launched: dict[int, list[Event]] = defaultdict(list)
    for event in events:
        number = event.get("args", {}).get("External id")
        if event.get("cat") == "cpu_op" and number is not None:
            ops[number] = event
        elif event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            # A kernel of a replayed CUDA graph has no operator.
            launched[-len(launched) - 1 if number is None else number].append(event)
    rows: dict[tuple[str, str], list[tuple[float, int]]] = defaultdict(list)
    for number, kernels in launched.items():
        op = ops.get(number, {}).get("name", "")
        for kernel in kernels:
            rows[kernel["name"], op].append((kernel["dur"] / 1e6, number))
    spent = {number: sum(k["dur"] for k in kernels) / 1e6 for number, kernels in launched.items()}
    total = sum(spent.values()) or 1.0
    result = []
    for (name, op), calls in rows.items():
        numbers = {number for _, number in calls}
        floor, bound = _floor([ops.get(number) for number in numbers], limits)
        seconds = sum(duration for duration, _ in calls)
        result.append(
            Kernel(
                name=name,
                op=op,
                seconds=seconds / steps,
                share=seconds / total,
                calls=len(calls) / steps,
                op_seconds=sum(spent[number] for number in numbers) / steps,
                floor_seconds=None if floor is None else floor / steps,
                bound=bound,
            )
        )
    return sorted(result, key=lambda kernel: -kernel.seconds)


def _floor(ops: list[Event | None], limits: Limits | None) -> tuple[float | None, str]:
    """Return the sum of the operators' floors, `None` unless all are known, and what bounds it."""
    moving = computing = total = 0.0
    for op in ops:
        done = None if op is None else work(op)
        if done is None or limits is None:
            return None, ""
        memory, arithmetic = done.bytes / limits.bytes_per_s, done.flops / limits.flops_per_s
        total += max(memory, arithmetic)
        moving, computing = moving + memory, computing + arithmetic
    return total, "memory" if moving >= computing else "arithmetic"


def work(op: Event) -> Work | None:
    """Estimate the bytes and FLOPs of an operator in a trace; `None` without shapes."""
    args = op.get("args", {})
    tensors = _tensors(args.get("Input Dims", []), args.get("Input type", []))
    if not tensors:
        return None
    name = op["name"].removeprefix("aten::")
    shapes = [shape for shape, _ in tensors]
    read = float(sum(math.prod(shape) * size for shape, size in tensors))
    item = tensors[0][1]
    written, flops = 0.0, 0.0
    first = PRODUCTS.get(name, 0)
    if name in PRODUCTS and len(shapes) >= first + 2:
        (*_, m, k), (*batch, _, n) = shapes[first : first + 2]
        out_is_listed = len(shapes) > first + 2
        written = 0.0 if out_is_listed else item * math.prod(batch) * m * n
        flops = 2.0 * math.prod(batch) * m * k * n
    elif name == "convolution_backward" and len(shapes) >= 3:
        out, image, weight = shapes[:3]
        written = item * (math.prod(image) + math.prod(weight))
        mask = str(["", *args.get("Concrete Inputs", [])][-1]).split(",")[:2]  # image, weight
        wanted = sum("True" in word for word in mask) if len(mask) == 2 else 2
        flops = wanted * 2.0 * math.prod(out) * math.prod(weight[1:])
    elif name in CONVOLUTIONS and len(shapes) >= 2:
        out = _convolved(shapes[0], shapes[1], args.get("Concrete Inputs", []), *CONVOLUTIONS[name])
        written = item * math.prod(out)
        flops = 2.0 * math.prod(out) * math.prod(shapes[1][1:])
    elif name in ATTENTIONS and len(shapes) >= 3:
        query, keys_dim, times = ATTENTIONS[name]
        written = item * math.prod(shapes[query])
        flops = times * 4.0 * math.prod(shapes[query]) * shapes[query + 1][keys_dim]
    elif not name.startswith("triton_") and not name.endswith("_"):
        written = float(max(math.prod(shape) * size for shape, size in tensors))
    return Work(read + written, flops if item == 2 else 0.0)


PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}
"""Operator -> index of its left factor."""

CONVOLUTIONS = {
    "convolution": (3, 4),
    "_convolution": (3, 4),
    "cudnn_convolution": (3, 2),
    "_conv_depthwise2d": (4, 5),
    "conv_depthwise3d": (4, 5),
}
"""Operator -> indices of its arguments for stride and padding."""

ATTENTIONS = {
    "_flash_attention_forward": (0, 1, 1.0),
    "_efficient_attention_forward": (0, 1, 1.0),
    "_scaled_dot_product_cudnn_attention": (0, 2, 1.0),
    "_flash_attention_backward": (1, 1, 2.5),
    "_efficient_attention_backward": (1, 1, 2.5),
    "_scaled_dot_product_cudnn_attention_backward": (1, 2, 2.5),
}
"""Operator -> index of the query, dim of the keys that counts them, FLOPs relative to forward."""


def _tensors(dims: list[Any], types: list[str]) -> list[tuple[Shape, int]]:
    """Return the shape and the bytes of a value of each tensor among an operator's arguments."""
    found: list[tuple[Shape, int]] = []
    for shape, kind in zip(dims, types, strict=False):
        if kind in ITEM_BYTES and shape:
            found.append((tuple(shape), ITEM_BYTES[kind]))
        elif kind == "TensorList":
            found += [(tuple(one), LISTED_BYTES) for one in shape if one]
    return found


def _convolved(
    image: Shape, weight: Shape, concrete: list[str], stride_at: int, padding_at: int
) -> Shape:
    """Return the shape of the output of a convolution without dilation."""

    def numbers(at: int, default: int) -> list[int]:
        try:
            values = ast.literal_eval(concrete[at])
        except (IndexError, SyntaxError, ValueError):
            return [default] * (len(image) - 2)
        return list(values) * (len(image) - 2) if len(values) == 1 else list(values)

    sides = zip(image[2:], weight[2:], numbers(stride_at, 1), numbers(padding_at, 0), strict=True)
    out = [(side + 2 * pad - kernel) // step + 1 for side, kernel, step, pad in sides]
    return (image[0], weight[0], *out)
