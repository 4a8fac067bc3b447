"""N:M sparsity: of each M consecutive weights along a layer's inputs, at most N are not zero.

Which N, by one shot on calibration data: the largest (magnitude), the largest times the size of
their input (Wanda, 2306.11695), or those whose loss the others can make up for, which are then
updated (SparseGPT, 2301.00774). `zoo.train.masks` learns the choice (MaskLLM, 2409.17481).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

Method = Literal["magnitude", "wanda", "sparsegpt"]
Layers = Mapping[str, nn.Linear]
"""By name in the model."""


@dataclass(frozen=True)
class Pattern:
    """`kept` of each `group` weights."""

    kept: int = 2
    group: int = 4

    def __post_init__(self):
        if not 0 < self.kept < self.group:
            raise ValueError(
                f"The pattern {self.kept}:{self.group} keeps nothing or everything; give N:M with "
                "0 < N < M, such as 2:4."
            )

    @classmethod
    def parse(cls, text: str) -> "Pattern":
        """Read `N:M`."""
        kept, colon, group = text.partition(":")
        if not colon or not kept.isdigit() or not group.isdigit():
            raise ValueError(f"{text!r} is no pattern; give N:M, such as 2:4.")
        return cls(int(kept), int(group))

    def __str__(self) -> str:
        return f"{self.kept}:{self.group}"

    def masks(self, device: torch.device | None = None) -> Float[Tensor, "J M"]:
        """Return every mask of one group: 6 for 2:4."""
        rows = [
            [float(i in chosen) for i in range(self.group)]
            for chosen in combinations(range(self.group), self.kept)
        ]
        return torch.tensor(rows, device=device)

    def mask(self, scores: Float[Tensor, "D C"]) -> Bool[Tensor, "D C"]:
        """Keep the `kept` largest scores of each group; of equal ones, the first."""
        grouped = scores.unflatten(-1, (-1, self.group))
        order = grouped.argsort(dim=-1, descending=True, stable=True)
        mask = torch.zeros_like(grouped, dtype=torch.bool)
        return mask.scatter(-1, order[..., : self.kept], True).flatten(-2)

    def holds(self, weight: Float[Tensor, "D C"]) -> bool:
        """Tell whether each group has at most `kept` weights that are not zero."""
        return bool(((weight != 0).unflatten(-1, (-1, self.group)).sum(-1) <= self.kept).all())


def sparse_layers(model: nn.Module, pattern: Pattern) -> dict[str, nn.Linear]:
    """Return the linear layers that are thinned: all inside the model's repeated blocks.

    Embeddings, output heads and classifiers stay dense, as in all three papers: they stand outside
    of the blocks.

    Raises:
        ValueError: there is none, or a layer's inputs are no multiple of M.
    """
    layers = {
        f"{name}.{inner}": module
        for name, blocks in model.named_modules()
        if isinstance(blocks, (nn.ModuleList, nn.Sequential)) and _repeats(blocks)
        for inner, module in blocks.named_modules()
        if isinstance(module, nn.Linear)
    }
    if not layers:
        raise ValueError("The model has no linear layers in repeated blocks, so nothing to thin.")
    for name, layer in layers.items():
        if layer.in_features % pattern.group:
            raise ValueError(
                f"{name} has {layer.in_features} inputs, which is no multiple of {pattern.group}; "
                f"the pattern {pattern} cannot thin it."
            )
    return layers


def same_layers(model: nn.Module, layers: Layers, name: str) -> dict[str, Float[Tensor, "D C"]]:
    """Return the weights that another model has for the same layers.

    Args:
        name: Of the other model, for messages.

    Raises:
        ValueError: one is missing, or has another size.
    """
    theirs = {n: m.weight for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    other = [
        n for n, layer in layers.items() if n not in theirs or theirs[n].shape != layer.weight.shape
    ]
    if other:
        raise ValueError(
            f"{name} is another model: {len(other)} layers ({', '.join(other[:3])}) are not there, "
            "or have another size."
        )
    return {n: theirs[n].detach() for n in layers}


def _repeats(blocks: nn.Module) -> bool:
    children = list(blocks.children())
    return len(children) > 0 and len({type(child) for child in children}) == 1


@torch.no_grad()
def input_norms(layers: Layers, run: Callable[[], Any]) -> dict[str, Float[Tensor, " C"]]:
    """Return the L2 norm of each input of each layer over all tokens that `run` shows it.

    Raises:
        ValueError: `run` did not reach a layer.
    """
    return {name: total.sqrt() for name, total in _sums(layers, run, squares).items()}


@torch.no_grad()
def input_products(layers: Layers, run: Callable[[], Any]) -> dict[str, Float[Tensor, "C C"]]:
    """Return the sum of x xᵀ over all tokens that `run` shows each layer.

    Raises:
        ValueError: `run` did not reach a layer.
    """
    return _sums(layers, run, lambda x: x.T @ x)


def squares(x: Float[Tensor, "n C"]) -> Float[Tensor, " C"]:
    """Return the sum of squares of each column."""
    return x.square().sum(0)


def _sums(
    layers: Layers, run: Callable[[], Any], of: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    sums: dict[str, Tensor] = {}

    def listen(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].flatten(0, -2)
            # under autocast the product would have 8 bits, and x xᵀ negative eigenvalues
            with torch.autocast(x.device.type, enabled=False):
                value = of(x.to(torch.promote_types(x.dtype, torch.float32)))
                sums[name] = sums[name] + value.double() if name in sums else value.double()

        return hook

    hooks = [layer.register_forward_pre_hook(listen(name)) for name, layer in layers.items()]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    if missing := [name for name in layers if name not in sums]:
        raise ValueError(
            f"The calibration data did not reach {len(missing)} layers ({', '.join(missing[:4])})."
        )
    return sums


def sparsegpt(
    weight: Float[Tensor, "D C"],
    products: Float[Tensor, "C C"],
    pattern: Pattern,
    *,
    block: int = 128,
    damp: float = 0.01,
) -> Float[Tensor, "D C"]:
    """Return the weights with N of each M kept, the kept ones updated (2301.00774, algorithm 1).

    Column by column: a group drops the least w² / [H⁻¹]ᵢᵢ², and the columns behind it make up for
    what a zero changes in the output.

    Args:
        products: x xᵀ, summed over calibration tokens.
        block: Columns whose updates reach the rest at once; a multiple of M.
        damp: Share of the mean diagonal that is added to it; ten times as much, and again, where
            the sum is not positive definite for rounding.
    """
    w, products = weight.double().clone(), products.double().clone()
    dead = products.diagonal() == 0
    products.diagonal()[dead] = 1
    w[:, dead] = 0
    upper = _inverse_factor(products, damp)
    mask = torch.empty(0)
    for start in range(0, w.shape[1], block):
        stop = min(start + block, w.shape[1])
        errors = torch.zeros_like(w[:, start:stop])
        for i in range(start, stop):
            if i % pattern.group == 0:
                group = slice(i, i + pattern.group)
                mask = pattern.mask(w[:, group].square() / upper.diagonal()[group].square())
            kept = torch.where(mask[:, i % pattern.group], w[:, i], 0)
            error = (w[:, i] - kept) / upper[i, i]
            w[:, i:stop] -= error[:, None] * upper[i, i:stop]
            w[:, i] = kept
            errors[:, i - start] = error
        w[:, stop:] -= errors @ upper[start:stop, stop:]
    return w.to(weight.dtype)


def _inverse_factor(products: Float[Tensor, "C C"], damp: float) -> Float[Tensor, "C C"]:
    """Return the upper Cholesky factor of the inverse of the damped products."""
    damped = products.clone()
    damped.diagonal().add_(damp * products.diagonal().mean())
    lower, failed = torch.linalg.cholesky_ex(damped)
    if not failed:
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed:
            return upper
    if not products.isfinite().all():
        raise ValueError("The calibration data give a layer inputs that are not finite.")
    return _inverse_factor(products, 10 * damp)


@torch.no_grad()
def prune_nm(
    layers: Layers, pattern: Pattern, method: Method, run: Callable[[], Any] | None = None
) -> dict[str, Float[Tensor, "D C"]]:
    """Return the thinned weights of each layer; the model stays as it is.

    Every layer is measured on the dense model's inputs, in one pass.

    Args:
        run: Shows the model the calibration data; magnitude needs none.

    Raises:
        ValueError: data are needed and there are none, or they do not reach a layer.
    """
    if method == "magnitude":
        return {n: _masked(m.weight, m.weight.abs(), pattern) for n, m in layers.items()}
    if run is None:
        raise ValueError(f"The method {method} looks at data; give --text or --data.")
    if method == "wanda":
        norms = input_norms(layers, run)
        return {n: _masked(m.weight, m.weight.abs() * norms[n], pattern) for n, m in layers.items()}
    products = input_products(layers, run)
    return {n: sparsegpt(m.weight, products[n], pattern) for n, m in layers.items()}


def _masked(weight: Tensor, scores: Tensor, pattern: Pattern) -> Tensor:
    return torch.where(pattern.mask(scores), weight, 0)


@torch.no_grad()
def load_weights(layers: Layers, weights: Mapping[str, Tensor]) -> None:
    """Write weights into layers."""
    for name, weight in weights.items():
        layers[name].weight.copy_(weight)
