"""Which form keeps the documents of a row apart fastest, and the images of a batch.

python3 benchmarks/attention_forms.py --json attention_forms.json     # one H200, under a minute
python3 benchmarks/attention_forms.py --tiny --seconds 30             # tried on a CPU

Each row of the table is one form on one case: the median time of a forward and a backward pass of
one layer's attention, and its relative error against attention under a mask in float32. Documents
are of random lengths (an exponential law with the mean that the case names), causal, in bf16 as the
command trains; images are of random sizes and see all of themselves. `--attention auto` tries the
forms in the order in which they stand in `zoo.kernels.packed_attention.fast_forms`: the fastest
form of the table's middle case must be the first.

Rows that stand in the file already are not measured again, so a stopped run goes on.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.files import save_whole
from zoo.kernels.packed_attention import FORMS, Pieces, packed_attention

Row = dict[str, Any]


class Case(NamedTuple):
    """Tokens in all, heads, those of keys, channels of a head, mean length of a piece."""

    name: str
    tokens: int
    heads: int
    groups: int
    dim: int
    mean: int
    causal: bool


CASES = (
    Case("text, 4,096 tokens of short documents", 4096, 16, 4, 128, 128, True),
    Case("text, 16,384 tokens", 16384, 16, 4, 128, 512, True),
    Case("text, 16,384 tokens of long documents", 16384, 16, 4, 128, 4096, True),
    Case("text, narrow heads", 16384, 12, 12, 64, 512, True),
    Case("images of many sizes", 16384, 16, 16, 80, 700, False),
)
TINY = (Case("tiny", 256, 4, 2, 16, 40, True), Case("tiny images", 256, 4, 4, 16, 40, False))


def lengths_of(case: Case) -> tuple[int, ...]:
    """Draw the lengths of pieces that fill the row."""
    draw = torch.Generator().manual_seed(0)
    found: list[int] = []
    while (left := case.tokens - sum(found)) > 0:
        one = torch.empty(1).exponential_(1 / case.mean, generator=draw).item()
        found.append(min(left, 1 + int(one)))
    return tuple(found)


def flex(q: Tensor, k: Tensor, v: Tensor, pieces: Pieces) -> Tensor:
    """Attend by FlexAttention, compiled as transformers compiles it; its mask is made each time."""
    from torch.nn.attention.flex_attention import create_block_mask

    piece = _piece(pieces)

    def sees(_b: Tensor, _h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same = piece[query] == piece[key]
        return same & (query >= key) if pieces.causal else same

    total = len(piece)
    mask = create_block_mask(
        sees, None, None, total, total, device=q.device.type, _compile=q.is_cuda
    )
    heads = (x.transpose(0, 1)[None] for x in (q, k, v))
    call = _compiled_flex() if q.is_cuda else _flex()
    out = call(*heads, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
    return out[0].transpose(0, 1)


def _flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention  # pyright: ignore[reportReturnType]


_held: list[Callable[..., Tensor]] = []


def _compiled_flex() -> Callable[..., Tensor]:
    if not _held:
        _held.append(torch.compile(_flex()))
    return _held[0]


def _piece(pieces: Pieces) -> Tensor:
    lengths = torch.tensor(pieces.lengths, device=pieces.device)
    return torch.repeat_interleave(torch.arange(len(lengths), device=pieces.device), lengths)


def masked(q: Tensor, k: Tensor, v: Tensor, pieces: Pieces) -> Tensor:
    """Attend under a mask of [total total], made each time: the reference."""
    piece = _piece(pieces)
    mask = piece[:, None] == piece
    heads = (x.transpose(0, 1)[None] for x in (q, k, v))
    mask = mask.tril() if pieces.causal else mask
    gqa = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(*heads, attn_mask=mask, enable_gqa=gqa)
    return out[0].transpose(0, 1)


CALLS: dict[str, Callable[..., Tensor]] = {"sdpa": masked, "flex": flex} | {
    form: partial(packed_attention, form=form) for form in FORMS
}


def tensors(case: Case, device: torch.device) -> list[Tensor]:
    torch.manual_seed(0)
    counts = (case.heads, case.groups, case.groups)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shapes = [(case.tokens, count, case.dim) for count in counts]
    return [torch.randn(s, device=device, dtype=dtype).requires_grad_() for s in shapes]


def measure(case: Case, form: str, device: torch.device) -> Row:
    """Time one form, forward and backward, and hold it against the reference in float32."""
    q, k, v = tensors(case, device)
    pieces = Pieces(lengths_of(case), device, causal=case.causal)
    row: Row = dict(case=case.name, form=form, tokens=case.tokens, pieces=len(pieces.lengths))
    direction = torch.randn_like(q)

    def step() -> Tensor:
        out = CALLS[form](q, k, v, pieces)
        if device.type == "cuda" or form != "flex":  # on a CPU it has no backward pass
            torch.autograd.grad(out, (q, k, v), direction)
        return out

    try:
        with torch.set_grad_enabled(device.type == "cuda" or form != "flex"):
            out = step().detach().float()
            row["ms"] = 1e3 * _seconds(step, device)
    except Exception as error:  # a form that does not run is a row of the table
        line = next(iter(str(error).strip().splitlines()), "")
        return row | dict(error=f"{type(error).__name__}: {line}"[:300])
    if case.tokens <= 4096:
        with torch.no_grad():
            target = masked(q.float(), k.float(), v.float(), pieces)
        row["difference"] = ((out - target).norm() / target.norm()).item()
    return row


def _seconds(call: Callable[[], Any], device: torch.device, *, most: float = 0.3) -> float:
    times: list[float] = []
    for _ in range(2):
        call()
    while len(times) < 3 or (len(times) < 20 and sum(times) < most):
        _wait(device)
        begun = time.perf_counter()
        call()
        _wait(device)
        times.append(time.perf_counter() - begun)
    return sorted(times)[len(times) // 2]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def rows(found: list[Row], tiny: bool, device: torch.device, until: float) -> Iterator[Row]:
    """Measure what is not there yet, until the time is over."""
    done = {(row["case"], row["form"]) for row in found}
    for case in TINY if tiny else CASES:
        for form in ("varlen", "split", "sdpa", "xformers", "flex"):  # compiles last
            if (case.name, form) not in done and time.perf_counter() < until:
                yield measure(case, form, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, default=Path("attention_forms.json"))
    parser.add_argument("--seconds", type=float, default=55)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    until = time.perf_counter() + args.seconds
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    found = json.loads(args.json.read_text())["rows"] if args.json.is_file() else []
    for row in rows(found, args.tiny, device, until):
        found.append(row)
        about = dict(machine=name, torch=torch.__version__, rows=found)
        save_whole(about, args.json, lambda x, to: to.write_text(json.dumps(x, indent=1)))
        print(f"{row['case']:40} {row['form']:9}", row.get("error") or f"{row['ms']:9.3f} ms")


if __name__ == "__main__":
    main()
