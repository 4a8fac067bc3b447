"""Attention inside pieces of one long row (documents, images), none of which sees another.

Three forms, each one call for [total heads D]:

split      torch's scaled_dot_product_attention once a piece; it runs everywhere, in any precision.
varlen     torch's variable-length kernels (torch.nn.attention.varlen), on CUDA in 16 bits.
xformers   its block-diagonal masks, where xformers is installed and its kernels load.
"""

import importlib.util
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Form = Literal["split", "varlen", "xformers"]
FORMS: tuple[Form, ...] = ("split", "varlen", "xformers")
FUSED: dict[Form, str] = {"varlen": "torch.nn.attention.varlen", "xformers": "xformers"}
"""Forms for 16 bits on CUDA, the fastest first, and the modules that they need."""


@dataclass(frozen=True)
class Pieces:
    """Where the pieces of a row are, and what a token of one sees."""

    lengths: tuple[int, ...]
    device: torch.device
    causal: bool = False
    window: int | None = None
    """With `causal`: a token sees itself and the `window - 1` before it."""

    @cached_property
    def starts(self) -> Tensor:
        """Where each begins, and where the last one ends, [pieces + 1]."""
        ends = torch.tensor([0, *self.lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return ends.to(self.device)

    @cached_property
    def longest(self) -> int:
        return max(self.lengths)


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, pieces: Pieces, *, scale: float | None = None, form: Form
) -> Tensor:
    """Attend inside each piece; in more than 16 bits, which no fused form knows, by `split`.

    Args:
        q: [total heads D].
        k: [total groups D], as `v`: each is read by heads / groups heads.
        scale: Of the logits; 1 / √D by default.

    Returns:
        [total heads D].

    Raises:
        ValueError: the form is not installed, or cannot do this (a window).
    """
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if q.dtype not in (torch.bfloat16, torch.float16):
        form = "split"
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _CALLS[form](q, k, v, pieces, scale)


def fast_forms(device: torch.device, dtype: torch.dtype) -> Sequence[Form]:
    """Return the fused forms that may run, the fastest first.

    The order is that of benchmarks/attention_forms.py. Both are for 16 bits on CUDA.
    """
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return ()
    return [form for form, module in FUSED.items() if _has(module)]


def _has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _split(q: Tensor, k: Tensor, v: Tensor, pieces: Pieces, scale: float) -> Tensor:
    heads = (x.transpose(0, 1)[None].split(pieces.lengths, dim=2) for x in (q, k, v))
    options: dict[str, Any] = dict(scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    out = []
    for piece in zip(*heads, strict=True):
        length = piece[0].shape[2]
        mask = None
        if pieces.window and pieces.window < length:
            ones = torch.ones(length, length, dtype=torch.bool, device=q.device)
            mask = ones.tril() & ones.triu(1 - pieces.window)
        causal = pieces.causal and mask is None
        out.append(
            F.scaled_dot_product_attention(*piece, attn_mask=mask, is_causal=causal, **options)
        )
    return torch.cat(out, dim=2)[0].transpose(0, 1)


def _varlen(q: Tensor, k: Tensor, v: Tensor, pieces: Pieces, scale: float) -> Tensor:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ModuleNotFoundError as error:
        raise ValueError(f"torch {torch.__version__} has no torch.nn.attention.varlen.") from error
    known = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {}
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in known:
            options["enable_gqa"] = True
        else:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    if "scale" in known:
        options["scale"] = scale
    else:  # it multiplies by 1 / √D itself
        q = q * (scale * q.shape[-1] ** 0.5)
    if "window_size" in known:
        before = pieces.window - 1 if pieces.window else -1
        options["window_size"] = (before, 0) if pieces.causal else (-1, -1)
    elif pieces.window and pieces.window < pieces.longest:
        raise ValueError(f"varlen_attn of torch {torch.__version__} knows no windows.")
    else:
        options["is_causal"] = pieces.causal
    # the same tensor twice: only then may cuDNN run a causal mask
    ends = (pieces.starts, pieces.starts, pieces.longest, pieces.longest)
    out = varlen_attn(q.contiguous(), k.contiguous(), v.contiguous(), *ends, **options)
    assert isinstance(out, Tensor)  # a pair only where more is asked for
    return out


def _xformers(q: Tensor, k: Tensor, v: Tensor, pieces: Pieces, scale: float) -> Tensor:
    try:
        from xformers.ops import (  # pyright: ignore[reportMissingImports]
            memory_efficient_attention,
        )
    except ModuleNotFoundError as error:
        raise ValueError("xformers is not installed: pip install 'backbone-zoo[gpu]'.") from error
    if q.shape[1] != k.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    bias = xformers_mask(pieces)
    return memory_efficient_attention(q[None], k[None], v[None], attn_bias=bias, scale=scale)[0]


def xformers_mask(pieces: Pieces) -> Any:
    """Return what xformers calls the pieces."""
    from xformers.ops.fmha import (  # pyright: ignore[reportMissingImports]
        attn_bias as masks,
    )

    kind = masks.BlockDiagonalCausalMask if pieces.causal else masks.BlockDiagonalMask
    mask = kind.from_seqlens(list(pieces.lengths), device=pieces.device)
    if pieces.window and pieces.window < pieces.longest:
        return mask.make_local_attention(pieces.window)
    return mask


_CALLS: dict[Form, Callable[..., Tensor]] = {
    "split": _split,
    "varlen": _varlen,
    "xformers": _xformers,
}
