"""Teachers whose linear layers multiply in 8 bits: float8 or int8, as far as fidelity allows.

Hopper multiplies 8-bit numbers at twice the rate of bfloat16. Float8 (e4m3) keeps 3 bits of each
number whatever its size: a relative squared error of 6e-4 an operand. Int8 with one scale a row
keeps 7 bits of the row's largest: 6e-5 on bell-shaped rows, more where a few channels stick out.
Which one loses less, and how many layers a network bears, is measured (`quantize_linears`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from zoo.features import Batch, Features
from zoo.kernels.int8 import int8_product
from zoo.teachers.teacher import Frozen

QuantKind = Literal["fp8", "int8"]

GATE = 1000.0
"""Least fidelity tr Σ / (C · MSE) to the bfloat16 features: 0.1 % of their variance."""
LEAST = 0.25
"""Share of the multiply-adds below which 8 bits are not worth their quantisation."""
MULTIPLE = 16
"""Of rows and columns of a weight: what the 8-bit kernels take."""

CAPABILITY = {"fp8": (8, 9), "int8": (8, 0)}


class EightBitLinear(nn.Module):
    """A frozen linear layer with 8-bit weights, one scale an output; inputs get one a row.

    `int8` rows have a centre beside their scale, since what comes out of a GELU is one-sided:
    x = c + s q, so x Wᵀ = s (q Wᵀ) + c (W 1)ᵀ. Runs on a CPU too, slowly, to be looked at.
    """

    weight: Tensor
    scale: Tensor
    total: Tensor
    """W 1: what a centre of 1 adds."""
    bias: Tensor | None

    def __init__(self, linear: nn.Linear, kind: QuantKind):
        super().__init__()
        self.kind = kind
        weight = linear.weight.detach().float()
        self.dtype = linear.weight.dtype
        largest = weight.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        scale = largest / (448 if kind == "fp8" else 127)
        eight = weight / scale
        eight = eight.to(torch.float8_e4m3fn) if kind == "fp8" else eight.round().to(torch.int8)
        self.register_buffer("weight", eight)
        self.register_buffer("scale", scale.flatten())
        self.register_buffer("total", eight.float().sum(1) * scale.flatten())
        bias = None if linear.bias is None else linear.bias.detach().clone()
        self.register_buffer("bias", bias)

    def forward(self, x: Float[Tensor, "*B C"]) -> Float[Tensor, "*B D"]:
        rows = x.flatten(0, -2).float()
        with torch.autocast(x.device.type, enabled=False):
            out = self._fp8(rows) if self.kind == "fp8" else self._int8(rows)
        return out.view(*x.shape[:-1], -1)

    def _fp8(self, rows: Tensor) -> Tensor:
        scale = (rows.abs().amax(1, keepdim=True) / 448).clamp_min(1e-12)
        eight = (rows / scale).to(torch.float8_e4m3fn)
        if not rows.is_cuda:
            out = (eight.float() @ self.weight.float().T) * scale * self.scale
            return (out if self.bias is None else out + self.bias).to(self.dtype)
        bias = None if self.bias is None else self.bias.to(torch.bfloat16)
        return torch._scaled_mm(
            eight, self.weight.T, scale_a=scale, scale_b=self.scale[None], bias=bias,
            out_dtype=torch.bfloat16, use_fast_accum=True,
        )  # fmt: skip

    def _int8(self, rows: Tensor) -> Tensor:
        low, high = rows.aminmax(dim=1, keepdim=True)
        centre = (low + high) / 2
        scale = ((high - low) / 254).clamp_min(1e-12)
        eight = ((rows - centre) / scale).round().to(torch.int8)
        out = int8_product(
            eight, scale.flatten(), centre.flatten(), self.weight, self.scale, self.total, self.bias
        )
        return out.to(self.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}, {self.kind}"


@dataclass(frozen=True)
class QuantReport:
    """What became of a teacher."""

    kind: QuantKind
    fidelity: float
    """Of its features to those it gave before."""
    share: float
    """Part of the linear layers' multiply-adds that is done in 8 bits."""
    layers: tuple[str, ...]
    of: int
    """Linear layers that could have been."""
    all_layers: float
    """Fidelity with all of them in 8 bits."""

    def describe(self) -> str:
        return (
            f"{self.kind} in {len(self.layers)} of {self.of} linear layers ({self.share:.0%} of "
            f"their work): fidelity {self.fidelity:,.0f}; in all of them {self.all_layers:,.0f}"
        )


@dataclass
class _Candidate:
    name: str
    plain: nn.Linear
    eight: EightBitLinear
    work: int
    """Multiply-adds on the sample."""
    error: float = 0.0
    """Of the features, relative to their variance, with this layer alone in 8 bits."""


@torch.no_grad()
def quantize_linears(
    teacher: Frozen, batch: Batch, kind: QuantKind, *, gate: float = GATE, least: float = LEAST
) -> QuantReport:
    """Put as many linear layers of a teacher into 8 bits as `gate` allows; in place.

    Each layer is tried alone on `batch`; those that do most work for the error they make come
    first, and the longest such row that keeps the fidelity stays.

    Args:
        batch: Images like those that will come; a few are enough.
        gate: Least fidelity to the features before. 0 takes all layers, whatever they lose.

    Raises:
        ValueError: the machine cannot, or not even `least` of the work passes; the teacher is
            then as it was, and the figures are told.
    """
    _check_machine(batch, kind)
    reference = _tokens(teacher(batch))
    found = _candidates(teacher, batch, kind)
    if not found:
        raise ValueError(f"The teacher {teacher.name} has no linear layers for {kind}.")
    measure = partial(_measure, teacher, batch, reference)
    complete = measure(found)
    kept, fidelity = found, complete
    if complete < gate:
        for one in found:
            one.error = 1 / measure([one])
        found.sort(key=lambda one: one.error / one.work)
        kept, fidelity = _longest(found, measure, gate)
    every = sum(one.work for one in found)
    share = sum(one.work for one in kept) / every
    if share < least:
        raise ValueError(
            f"The teacher {teacher.name} cannot run in {kind}: all linear layers give a fidelity "
            f"of {complete:,.0f} to its bfloat16 features, and {gate:,.0f} is kept with only "
            f"{share:.0%} of their work. Take {'int8' if kind == 'fp8' else 'bf16'}."
        )
    for one in kept:
        _put(teacher.network, one.name, one.eight)
    names = tuple(one.name for one in kept)
    return QuantReport(kind, fidelity, share, names, len(found), complete)


def _check_machine(batch: Batch, kind: QuantKind) -> None:
    device = batch.images.device
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < CAPABILITY[kind]:
        needed = ".".join(map(str, CAPABILITY[kind]))
        raise ValueError(
            f"{torch.cuda.get_device_name(device)} has no {kind} products; they need a compute "
            f"capability of {needed}. Take bf16."
        )


def _tokens(seen: Features) -> Tensor:
    rows = seen.summary if seen.spatial is None else seen.spatial.flatten(0, -2)
    assert rows is not None
    return rows.double()


def _candidates(teacher: Frozen, batch: Batch, kind: QuantKind) -> list[_Candidate]:
    """Find the linear layers that see many rows, by looking at `batch` once."""
    found: list[_Candidate] = []
    rows: dict[str, int] = {}

    def note(name: str, module: Any, args: tuple[Tensor, ...]) -> None:
        rows[name] = rows.get(name, 0) + args[0].numel() // module.in_features

    layers = {n: m for n, m in teacher.network.named_modules() if type(m) is nn.Linear}
    hooks = [m.register_forward_pre_hook(partial(note, n)) for n, m in layers.items()]
    teacher(batch)
    for hook in hooks:
        hook.remove()
    for name, seen in rows.items():
        layer = layers[name]
        fits = layer.in_features % MULTIPLE == 0 and layer.out_features % MULTIPLE == 0
        if fits and seen >= MULTIPLE * len(batch.images):  # not what sees summaries alone
            work = seen * layer.weight.numel()
            found.append(_Candidate(name, layer, EightBitLinear(layer, kind), work))
    return found


def _measure(teacher: Frozen, batch: Batch, reference: Tensor, chosen: list[_Candidate]) -> float:
    """Return the fidelity with `chosen` in 8 bits, and put the plain layers back."""
    for one in chosen:
        _put(teacher.network, one.name, one.eight)
    ours = _tokens(teacher(batch))
    for one in chosen:
        _put(teacher.network, one.name, one.plain)
    spread = (reference - reference.mean(0)).square().mean()
    return float(spread / (ours - reference).square().mean().clamp_min(1e-30))


def _longest(
    found: list[_Candidate], measure: Callable[[list[_Candidate]], float], gate: float
) -> tuple[list[_Candidate], float]:
    """Bisect for the longest beginning of `found` whose fidelity passes."""
    good, bad, fidelity = 0, len(found), float("inf")
    while bad - good > 1:
        middle = (good + bad) // 2
        seen = measure(found[:middle])
        if seen >= gate:
            good, fidelity = middle, seen
        else:
            bad = middle
    return found[:good], fidelity


def _put(network: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(network.get_submodule(parent), leaf, layer)
