"""Teachers whose linear layers multiply in 8 bits: float8 or int8, as far as fidelity allows.

Hopper multiplies 8-bit numbers at twice the rate of bfloat16. Float8 (e4m3) keeps 3 bits of each
number whatever its size: a relative squared error of 6e-4 for each operand. Int8 with one scale a
row keeps 7 bits of the row's largest number: 6e-5 on bell-shaped rows, more where a few channels
are outliers. Which of the two loses less, and how many layers of a network can be quantized, is
measured (`quantize_linears`).
"""

from collections.abc import Callable, Sequence
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
"""Least share of the multiply-adds; quantizing fewer costs more than it saves."""
MULTIPLE = 16
"""The 8-bit kernels take weights whose rows and columns are multiples of this."""

CAPABILITY = {"fp8": (8, 9), "int8": (8, 0)}
"""Least CUDA compute capability of the products."""


class QuantizedLinear(nn.Module):
    """A frozen linear layer with 8-bit weights, one scale an output; inputs get one a row.

    `int8` inputs have a centre c beside their scale s, since the outputs of a GELU are one-sided:
    x = c + s q, so x Wᵀ = s (q Wᵀ) + c (W 1)ᵀ. It also runs on a CPU, slowly, for tests.
    """

    weight: Tensor
    """[D C], in 8 bits."""
    scale: Tensor
    """[D]"""
    total: Tensor
    """W 1, [D]: what a centre of 1 adds to the outputs."""
    bias: Tensor | None

    def __init__(self, linear: nn.Linear, kind: QuantKind):
        super().__init__()
        self.kind = kind
        weight = linear.weight.detach().float()
        self.dtype = linear.weight.dtype
        largest = weight.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        scale = largest / (448 if kind == "fp8" else 127)
        q = weight / scale
        q = q.to(torch.float8_e4m3fn) if kind == "fp8" else q.round().to(torch.int8)
        self.register_buffer("weight", q)
        self.register_buffer("scale", scale.flatten())
        self.register_buffer("total", q.float().sum(1) * scale.flatten())
        bias = None if linear.bias is None else linear.bias.detach().clone()
        self.register_buffer("bias", bias)

    def forward(self, x: Float[Tensor, "*B C"]) -> Float[Tensor, "*B D"]:
        rows = x.flatten(0, -2).float()
        with torch.autocast(x.device.type, enabled=False):
            out = self._fp8(rows) if self.kind == "fp8" else self._int8(rows)
        return out.view(*x.shape[:-1], -1)

    def _fp8(self, rows: Tensor) -> Tensor:
        scale = (rows.abs().amax(1, keepdim=True) / 448).clamp_min(1e-12)
        q = (rows / scale).to(torch.float8_e4m3fn)
        if not rows.is_cuda:
            out = (q.float() @ self.weight.float().T) * scale * self.scale
            return (out if self.bias is None else out + self.bias).to(self.dtype)
        bias = None if self.bias is None else self.bias.to(torch.bfloat16)
        return torch._scaled_mm(
            q,
            self.weight.T,
            scale_a=scale,
            scale_b=self.scale[None],
            bias=bias,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )

    def _int8(self, rows: Tensor) -> Tensor:
        low, high = rows.aminmax(dim=1, keepdim=True)
        centre = (low + high) / 2
        scale = ((high - low) / 254).clamp_min(1e-12)
        q = ((rows - centre) / scale).round().to(torch.int8)
        out = int8_product(
            q, scale.flatten(), centre.flatten(), self.weight, self.scale, self.total, self.bias
        )
        return out.to(self.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}, {self.kind}"


@dataclass(frozen=True)
class QuantReport:
    """Which layers of a teacher were quantized, and what its features lost."""

    kind: QuantKind
    fidelity: float
    """Of its features to those before, tr Σ / (C · MSE)."""
    share: float
    """Share of the linear layers' multiply-adds that is done in 8 bits."""
    layers: tuple[str, ...]
    """Names of the quantized layers."""
    of: int
    """Number of linear layers that could be quantized."""
    all_layers: float
    """Fidelity with all of them quantized."""

    def describe(self) -> str:
        """Return the report as one line of text."""
        return (
            f"{self.kind} in {len(self.layers)} of {self.of} linear layers ({self.share:.0%} of "
            f"their work): fidelity {self.fidelity:,.0f}; in all of them {self.all_layers:,.0f}"
        )


@dataclass
class _Candidate:
    name: str
    plain: nn.Linear
    quantized: QuantizedLinear
    work: int
    """Multiply-adds on the sample."""
    error: float = 0.0
    """Of the features, relative to their variance, with this layer alone quantized."""


@torch.no_grad()
def quantize_linears(
    teacher: Frozen, batch: Batch, kind: QuantKind, *, gate: float = GATE, least: float = LEAST
) -> QuantReport:
    """Quantize as many linear layers of a teacher as `gate` allows; in place.

    Each layer is quantized alone and its error measured on `batch`. The layers are sorted by error
    for each multiply-add, and as many as keep the fidelity stay quantized, from the first on.

    Args:
        batch: Images like those of the run; a few are enough.
        gate: Least fidelity to the features before. With 0 all layers are quantized.
        least: Least share of the layers' multiply-adds.

    Raises:
        ValueError: the machine has no such products, or the gate leaves less than `least` of the
            work. The teacher is then as it was, and the message has the figures.
    """
    check_products(kind, batch.images.device)
    reference = _tokens(teacher(batch))
    found = _candidates(teacher, batch, kind)
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
            f"The teacher {teacher.name} cannot run in {kind}: with all linear layers quantized it "
            f"has a fidelity of {complete:,.0f} to its bfloat16 features, and for {gate:,.0f} only "
            f"{share:.0%} of their work can be. Take {'int8' if kind == 'fp8' else 'bf16'}."
        )
    for one in kept:
        _replace(teacher.network, one.name, one.quantized)
    names = tuple(one.name for one in kept)
    return QuantReport(kind, fidelity, share, names, len(found), complete)


def quantize_layers(teacher: Frozen, kind: QuantKind, layers: Sequence[str]) -> None:
    """Quantize the layers that `quantize_linears` has chosen elsewhere; in place.

    Raises:
        ValueError: the network has no such linear layer.
    """
    found = dict(teacher.network.named_modules())
    if lost := [name for name in layers if type(found.get(name)) is not nn.Linear]:
        raise ValueError(f"The teacher {teacher.name} has no linear layer {lost[0]} to quantize.")
    for name in layers:
        _replace(teacher.network, name, QuantizedLinear(found[name], kind))


def share_quantized(first: Frozen, other: Frozen) -> None:
    """Give `other`, the same teacher at another size, the quantized layers of `first`; in place."""
    for name, layer in list(first.network.named_modules()):
        if isinstance(layer, QuantizedLinear):
            _replace(other.network, name, layer)


def check_products(kind: QuantKind, device: torch.device) -> None:
    """Refuse a GPU that has no products in 8 bits of this kind.

    Raises:
        ValueError: its compute capability is too low.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < CAPABILITY[kind]:
        needed = ".".join(map(str, CAPABILITY[kind]))
        raise ValueError(
            f"{torch.cuda.get_device_name(device)} has no {kind} products; they need a compute "
            f"capability of {needed}. Take bf16."
        )


@torch.no_grad()
def require_linears(teacher: Frozen, kind: QuantKind) -> None:
    """Refuse a teacher without linear layers that 8 bits would serve; one black image tells.

    Raises:
        ValueError: it has none.
    """
    black = torch.zeros(1, 3, *teacher.size, device=teacher.mean.device)
    _candidates(teacher, Batch(black), kind)


def _tokens(features: Features) -> Tensor:
    summary, spatial = features
    rows = summary if spatial is None else spatial.flatten(0, -2)
    assert rows is not None
    return rows.double()


def _candidates(teacher: Frozen, batch: Batch, kind: QuantKind) -> list[_Candidate]:
    """Find the linear layers that get many rows, by one forward pass on `batch`.

    Raises:
        ValueError: there are none.
    """
    found: list[_Candidate] = []
    num_rows: dict[str, int] = {}

    def note(name: str, module: Any, args: tuple[Tensor, ...]) -> None:
        num_rows[name] = num_rows.get(name, 0) + args[0].numel() // module.in_features

    layers = {n: m for n, m in teacher.network.named_modules() if type(m) is nn.Linear}
    hooks = [m.register_forward_pre_hook(partial(note, n)) for n, m in layers.items()]
    teacher(batch)
    for hook in hooks:
        hook.remove()
    for name, rows in num_rows.items():
        layer = layers[name]
        fits = layer.in_features % MULTIPLE == 0 and layer.out_features % MULTIPLE == 0
        if fits and rows >= MULTIPLE * len(batch.images):  # not those of summaries alone
            work = rows * layer.weight.numel()
            found.append(_Candidate(name, layer, QuantizedLinear(layer, kind), work))
    if not found:
        raise ValueError(
            f"The teacher {teacher.name} has no linear layers for {kind}; give "
            "--teacher-precision bf16."
        )
    return found


def _measure(teacher: Frozen, batch: Batch, reference: Tensor, chosen: list[_Candidate]) -> float:
    """Return the fidelity with `chosen` quantized, and put the plain layers back."""
    for one in chosen:
        _replace(teacher.network, one.name, one.quantized)
    ours = _tokens(teacher(batch))
    for one in chosen:
        _replace(teacher.network, one.name, one.plain)
    spread = (reference - reference.mean(0)).square().mean()
    return float(spread / (ours - reference).square().mean().clamp_min(1e-30))


def _longest(
    found: list[_Candidate], measure: Callable[[list[_Candidate]], float], gate: float
) -> tuple[list[_Candidate], float]:
    """Bisect for the longest prefix of `found` whose fidelity is at least `gate`."""
    good, bad, fidelity = 0, len(found), float("inf")
    while bad - good > 1:
        middle = (good + bad) // 2
        measured = measure(found[:middle])
        if measured >= gate:
            good, fidelity = middle, measured
        else:
            bad = middle
    return found[:good], fidelity


def _replace(network: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(network.get_submodule(parent), leaf, layer)
