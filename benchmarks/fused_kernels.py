"""Measure the fused kernels on a GPU: time, floors, and error against float64.

python3 benchmarks/fused_kernels.py [--only scan window ...] [--save FILE]

Inputs are those of the models. A scan: bfloat16, with softplus, bias and skip inside, and B and C
narrow slices of one wider tensor. Batch norm, activation and residual in training: bfloat16 maps,
beside torch's own, compiled; the convolution over three tokens with its SiLU likewise. Window
attention: bfloat16 and a float32 bias, beside torch's own `scaled_dot_product_attention` with that
bias in bfloat16.

`eager` times one call from Python (triton.testing.do_bench, which also empties the cache before
each call); `graph` times the kernels alone, in a replayed CUDA graph of several calls, each with
inputs of its own. Floors: each tensor moved once at 4.3 TB/s, which a copy on an H200 reaches, and
one exponential for each entry of the state, at 16 a clock and multiprocessor and 1.98 GHz.
"""

import argparse
import functools
import itertools
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.testing import do_bench

from zoo.kernels import batch_norm as batch_norm_op  # noqa: F401 -- registers the operator
from zoo.kernels.attention import MAX_TOKENS, biased_attention, window_attention
from zoo.layers.gelu import GELU
from zoo.layers.scan import selective_scan
from zoo.layers.short_conv import in_torch, short_conv_silu

SHAPES = [  # batch, channels, tokens, states
    (128, 160, 196, 8),
    (128, 320, 49, 8),
    (128, 392, 196, 8),
    (16, 1024, 4096, 8),
]
WINDOWS = [  # windows, tokens, heads, head dim: of FasterViT-0 and -4, E-RADIO-L, MambaVision-T
    (2048, 53, 8, 32),
    (128, 49, 16, 32),
    (2048, 53, 16, 56),
    (512, 64, 16, 96),
    (128, 49, 16, 40),
    (512, 256, 8, 96),  # E-RADIO-L with windows of 16, its largest and its deepest
    (128, 256, 16, 96),
    (512, 256, 8, 32),  # eradio_xxxtiny's
]
MIXERS = [  # windows, tokens, channels: of MambaVision-T, -S and -L, and -S's last stage
    (128, 196, 320),
    (128, 196, 384),
    (128, 196, 784),
    (128, 49, 768),
]
NORMS = [  # images, channels, side, activation: of MambaVision-S and -L, FasterViT-4, E-RADIO-L
    (128, 96, 56, "gelu_tanh"),
    (128, 192, 28, "gelu_tanh"),
    (128, 64, 112, "relu"),
    (128, 196, 56, "gelu"),
    (128, 392, 28, "gelu"),
    (128, 96, 64, "silu"),
]
BYTES_PER_SECOND = 4.3e12
EXPONENTIALS_PER_CLOCK = 16
CLOCKS_PER_SECOND = 1.98e9
SCAN_COLUMNS = (
    "batch, channels, tokens, states",
    "forward, eager ms",
    "forward, graph ms",
    "both, eager ms",
    "both, graph ms",
    "forward's memory floor ms",
    "both's memory floor ms",
    "forward's exponential floor ms",
    "largest relative error",
)
COMPARED = (
    "forward ms",
    "both ms",
    "torch's forward ms",
    "torch's both ms",
    "forward's memory floor ms",
    "both's memory floor ms",
)
ERROR = "largest relative error"
WINDOW_COLUMNS = ("windows, tokens, heads, head dim", *COMPARED, ERROR)
NORM_COLUMNS = ("images, channels, side, activation (torch's compiled)", *COMPARED, ERROR)
MIXER_COLUMNS = ("windows, tokens, channels (torch's compiled)", *COMPARED, ERROR)
GELU_COLUMNS = ("tokens, channels (both compiled)", *COMPARED)


def make_inputs(batch: int, chs: int, length: int, states: int) -> list[Tensor]:
    """Make x, the raw steps, A, B, C, D and the bias, all with gradients."""
    x = torch.randn(batch, length, chs, device="cuda").bfloat16()
    delta = (torch.randn(batch, length, chs, device="cuda") / 2 - 2).bfloat16()
    wide = torch.randn(batch, length, chs // 8 + 2 * states, device="cuda").bfloat16()
    _, B, C = wide.split((chs // 8, states, states), dim=-1)
    A = -torch.arange(1.0, states + 1, device="cuda") * (0.5 + torch.rand(chs, 1, device="cuda"))
    D, bias = torch.randn(chs, device="cuda"), torch.randn(chs, device="cuda") / 10
    return [t.detach().requires_grad_() for t in (x, delta, A, B, C, D, bias)]


def scan(inputs: list[Tensor], **options: int) -> Tensor:
    """Run the scan as a mixer does."""
    return selective_scan(*inputs[:-1], delta_bias=inputs[-1], delta_softplus=True, **options)


def scan_and_back(inputs: list[Tensor], dy: Tensor) -> tuple[Tensor, ...]:
    """Run the scan forward and backward; return the gradients of all inputs."""
    return torch.autograd.grad(scan(inputs), inputs, dy)


def graph_ms(calls: Sequence[Callable[[], object]], repeats: int = 20) -> float:
    """Time the calls in a CUDA graph: the median over replays, for each call."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]
    times = []
    for _ in range(repeats + 3):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        times.append(began.elapsed_time(ended) / len(kept))
    return statistics.median(times[3:])


def eager_ms(calls: Sequence[Callable[[], object]]) -> float:
    """Time the calls one after the other, with a cold cache."""
    turns = itertools.cycle(calls)
    return float(do_bench(lambda: next(turns)(), return_mode="median"))  # type: ignore[arg-type]


def largest_error(chs: int, length: int, states: int) -> float:
    """Compare output and gradients with float64, both rounded to bfloat16, on two sequences.

    The error of a tensor is the norm of the difference over its norm.
    """
    inputs = make_inputs(2, chs, length, states)
    dy = torch.randn(2, length, chs, device="cuda").bfloat16()
    ours = [scan(inputs), *scan_and_back(inputs, dy)]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    y = scan(exact, chunk=64)
    theirs = [y, *torch.autograd.grad(y, exact, dy.double())]
    return largest(ours, [b.to(a.dtype).double() for a, b in zip(ours, theirs, strict=True)])


def scan_row(batch: int, chs: int, length: int, states: int) -> list[str]:
    """Measure one shape."""
    num_sets = 2 if batch * chs * length > 2**25 else 6
    sets = [make_inputs(batch, chs, length, states) for _ in range(num_sets)]
    dys = [torch.randn_like(inputs[0]) for inputs in sets]

    @torch.no_grad()
    def forward(inputs: list[Tensor]) -> Tensor:
        return scan(inputs)

    ahead = [lambda inputs=inputs: forward(inputs) for inputs in sets]
    both = [lambda i=i, dy=dy: scan_and_back(i, dy) for i, dy in zip(sets, dys, strict=True)]
    tokens = batch * length
    moved = 2 * tokens * (3 * chs + 2 * states)  # x, Δ and y; B and C
    moved_back = 2 * tokens * (5 * chs + 4 * states)  # x, Δ, dy, dx and dΔ; B, C and theirs
    units = torch.cuda.get_device_properties(0).multi_processor_count * EXPONENTIALS_PER_CLOCK
    numbers = (
        eager_ms(ahead),
        graph_ms(ahead),
        eager_ms(both),
        graph_ms(both),
        1e3 * moved / BYTES_PER_SECOND,
        1e3 * (moved + moved_back) / BYTES_PER_SECOND,
        1e3 * tokens * chs * states / units / CLOCKS_PER_SECOND,
    )
    error = largest_error(chs, length, states)
    shape = ", ".join(map(str, (batch, chs, length, states)))
    return [shape, *(f"{number:.4f}" for number in numbers), f"{error:.0e}"]


def largest(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Return the largest relative error of some tensors."""
    pairs = zip(found, wanted, strict=True)
    return max(float(((a.double() - b).norm() / b.norm()).detach()) for a, b in pairs)


def both_ways(
    calls: Sequence[Callable[..., Any]], leaves: list[Tensor], dy: Any, copies: int = 3
) -> list[float]:
    """Time each call forward, and with its backward pass; kernels alone."""
    times = []
    for call in calls:

        @torch.no_grad()
        def forward(call=call) -> Any:
            return call(*leaves)

        def both(call=call) -> tuple[Tensor, ...]:
            return torch.autograd.grad(call(*leaves), leaves, dy)

        times += [graph_ms([forward] * copies), graph_ms([both] * copies)]
    return times


def torch_attention(qkv: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Attend with torch's own attention."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    mask = bias.to(q.dtype)[None]
    x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return x.transpose(1, 2).flatten(2)


def window_row(windows: int, tokens: int, heads: int, dim: int) -> list[str]:
    """Measure one shape of window attention; kernels alone."""
    shape, scale = (windows, tokens, 3, heads, dim), dim**-0.5
    qkv = torch.randn(shape, device="cuda").bfloat16().requires_grad_()
    bias = torch.randn(heads, tokens, tokens, device="cuda", requires_grad=True)
    dy = torch.randn(windows, tokens, heads * dim, device="cuda").bfloat16()
    ours = window_attention if tokens <= MAX_TOKENS else biased_attention
    calls = [functools.partial(attend, scale=scale) for attend in (ours, torch_attention)]
    times = both_ways(calls, [qkv, bias], dy)
    inputs = [qkv[:64].detach().requires_grad_(), bias]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    y = ours(inputs[0], inputs[1], scale)
    wanted = torch_attention(exact[0], exact[1], scale)
    found = [y, *torch.autograd.grad(y, inputs, dy[:64])]
    theirs = [wanted, *torch.autograd.grad(wanted, exact, dy[:64].double())]
    error = largest(found, theirs)
    floor = 1e3 * 2 * dy.numel() * 4 / BYTES_PER_SECOND  # q, k, v in, x out
    numbers = (*times, floor, floor + 2 * floor)  # backward: those, dx, dq, dk, dv
    name = ", ".join(map(str, (windows, tokens, heads, dim)))
    return [name, *(f"{number:.4f}" for number in numbers), f"{error:.0e}"]


def norm_row(images: int, chs: int, side: int, act: str) -> list[str]:
    """Measure one shape of batch norm, activation and residual in training; kernels alone."""
    width = chs + -chs % 16
    acts = {"relu": F.relu, "silu": F.silu, "gelu": F.gelu}
    acts["gelu_tanh"] = functools.partial(F.gelu, approximate="tanh")

    def maps(channels: int) -> Tensor:
        x = torch.randn(images, channels, side, side, device="cuda", dtype=torch.bfloat16)
        return x.to(memory_format=torch.channels_last)

    def ours(x, plus, weight, bias):
        return torch.ops.zoo.batch_norm_act(x, weight, bias, plus, None, act, 1e-5, chs)[0]

    def theirs(x, plus, weight, bias):
        z = F.batch_norm(x[:, :chs], None, None, weight, bias, True, 0.0, 1e-5)
        return plus + acts[act](z)

    x, plus, dy = maps(width), maps(chs), maps(chs)
    x[:, chs:] = 0
    leaves = [x, plus, torch.rand(chs, device="cuda") + 0.5, torch.randn(chs, device="cuda")]
    leaves = [t.requires_grad_() for t in leaves]
    times = both_ways((ours, torch.compile(theirs, dynamic=False)), leaves, dy)
    found = [y := ours(*leaves), *torch.autograd.grad(y, leaves, dy)]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    wanted = [y := theirs(*exact), *torch.autograd.grad(y, exact, dy.double())]
    error = largest(found, wanted)
    one = 1e3 * dy.numel() * 2 / BYTES_PER_SECOND
    numbers = (*times, 4 * one, 9 * one)  # x twice, plus, y; back: x and dy twice, dx
    name = ", ".join(map(str, (images, chs, side, act)))
    return [name, *(f"{number:.4f}" for number in numbers), f"{error:.0e}"]


def gelu_row(rows: int, width: int) -> list[str]:
    """Measure GELU on the hidden tokens of an MLP, compiled; the floors are 2 and 5 passes."""
    x = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn_like(x)
    calls = [torch.compile(call, dynamic=False) for call in (GELU(), F.gelu)]
    times = both_ways(calls, [x], dy, copies=4)
    one = 1e3 * x.numel() * 2 / BYTES_PER_SECOND
    return [f"{rows}, {width}", *(f"{number:.4f}" for number in (*times, 2 * one, 5 * one))]


def short_conv_row(windows: int, tokens: int, chs: int) -> list[str]:
    """Measure the convolution over three tokens with its SiLU; kernels alone."""
    x = torch.randn(windows, tokens, chs, device="cuda").bfloat16().requires_grad_()
    taps = torch.randn(chs, 3, device="cuda").bfloat16().requires_grad_()
    dys = torch.randn_like(x).chunk(2, dim=-1)
    times = both_ways((short_conv_silu, torch.compile(in_torch, dynamic=False)), [x, taps], dys)
    found = [*(y := short_conv_silu(x, taps)), *torch.autograd.grad(y, (x, taps), dys)]
    exact = [t.detach().double().requires_grad_() for t in (x, taps)]
    y = in_torch(*exact)
    wanted = [*y, *torch.autograd.grad(y, exact, [dy.double() for dy in dys])]
    error = largest(found, wanted)
    one = 1e3 * x.numel() * 2 / BYTES_PER_SECOND
    numbers = (*times, 2 * one, 5 * one)  # x, y; back: x, dy, dx
    name = ", ".join(map(str, (windows, tokens, chs)))
    return [name, *(f"{number:.4f}" for number in numbers), f"{error:.0e}"]


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Format a table in Markdown."""
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


TABLES: dict[str, tuple[Sequence[str], Callable[..., list[str]], list[Any]]] = {
    "scan": (SCAN_COLUMNS, scan_row, SHAPES),
    "norm": (NORM_COLUMNS, norm_row, NORMS),
    "short_conv": (MIXER_COLUMNS, short_conv_row, MIXERS),
    "gelu": (GELU_COLUMNS, gelu_row, [(25088, 3072)]),
    "window": (WINDOW_COLUMNS, window_row, WINDOWS),
}


def main() -> None:
    """Print each row as soon as it is measured, then the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--save", type=Path, help="also write the tables here")
    parser.add_argument("--only", nargs="+", choices=TABLES, default=list(TABLES))
    args = parser.parse_args()
    device = torch.cuda.get_device_name()
    lines = [f"{device}, torch {torch.__version__}, Triton {triton.__version__}", ""]
    print(lines[0])
    for name in args.only:
        columns, row_of, shapes = TABLES[name]
        rows = []
        for shape in shapes:
            torch.compiler.reset()  # else torch stops compiling after eight forms
            rows.append(row_of(*shape))
            print(" | ".join(rows[-1]), flush=True)
        lines += table(columns, rows)
    print("\n".join(lines))
    if args.save:
        args.save.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
