"""Put a constant, or a small linear map, in the place of a part that is left out (2407.16286).

Both are fitted to what the part gives on calibration data, in closed form. `zoo.cut_format` keeps
them; no constructor of timm or transformers knows such a thing.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from zoo.cut_format import Emulated, put_emulated
from zoo.students.prune.library import Parent
from zoo.students.prune.taps import Inputs, seen_products


class Moments(NamedTuple):
    """Sums over tokens of what a part is given (x) and what it adds (f)."""

    number: Tensor
    x: Float[Tensor, " C"]
    f: Float[Tensor, " C"]
    xx: Float[Tensor, "C C"]
    xf: Float[Tensor, "C C"]


def low_rank(moments: Moments, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Solve min ||f - b - x D U||² over D [C, rank], U [rank, C] and b: reduced-rank regression.

    With A = Cxx⁻¹ Cxf, the least squares, and V the first eigenvectors of Aᵀ Cxx A, the covariance
    of what it predicts: D U = A V Vᵀ. At full rank it is least squares, at rank 0 b is the mean.

    Returns:
        D, U and b.
    """
    n, x, f, xx, xf = moments
    mean_x, mean_f = x / n, f / n
    if not rank:
        return x.new_zeros(len(x), 0), x.new_zeros(0, len(f)), mean_f
    cxx = xx / n - mean_x[:, None] * mean_x
    cxf = xf / n - mean_x[:, None] * mean_f
    least = torch.linalg.lstsq(cxx, cxf, driver="gelsd").solution
    predicted = least.T @ cxx @ least
    main = torch.linalg.eigh(predicted).eigenvectors.flip(-1)[:, :rank]
    down, up = least @ main, main.T
    return down, up, mean_f - mean_x @ down @ up


def emulate(
    parent: Parent,
    parts: Sequence[str],
    batches: Callable[[], Iterable[Inputs]],
    *,
    rank: int | None = 0,
    passes: bool = False,
) -> Parent:
    """Return a parent in which constants, or maps of low rank, stand for parts; it stays as it is.

    Each part is fitted with the others still there.

    Args:
        parts: Paths of modules: branches, or, with `passes`, whole layers.
        rank: 0: a constant. None: nothing at all, the parts are only left out.

    Raises:
        ValueError: there are no samples, or a part takes and gives different shapes.
    """
    model = parent.model
    sums = _measure(model, parts, batches(), passes, rank or 0)
    emulated, recipes = {}, dict(parent.emulated)
    for path in parts:
        moments, outputs = sums[path]
        recipes[path] = dict(dim=len(moments.f), rank=rank or 0, passes=passes, outputs=outputs)
        part = emulated[path] = Emulated(**recipes[path])
        if rank is None:
            continue
        down, up, bias = low_rank(moments, rank)
        with torch.no_grad():
            part.bias.copy_(bias)
            if part.down is not None and part.up is not None:
                part.down.weight.copy_(down.T)
                part.up.weight.copy_(up.T)
    like = next(p for p in model.parameters() if p.is_floating_point())
    child = copy.deepcopy(model)
    put_emulated(child, {path: part.to(like) for path, part in emulated.items()})
    return replace(parent, model=child.eval(), emulated=recipes)


def _measure(
    model: nn.Module, parts: Sequence[str], batches: Iterable[Inputs], passes: bool, rank: int
) -> dict[str, tuple[Moments, int]]:
    found: dict[str, tuple[Moments, int]] = {}
    mask: Tensor | None = None

    def watch(path: str):
        def hook(part: nn.Module, args: tuple, kwargs: Mapping[str, Any], output: Any) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            given = output[0] if isinstance(output, tuple) else output
            if x.shape != given.shape or x.ndim != 3:
                raise ValueError(
                    f"{path} ({type(part).__name__}) makes {list(given.shape)} of "
                    f"{list(x.shape)}; only what keeps [samples, tokens, channels] is emulated."
                )
            keep = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
            f = (given - x if passes else given)[keep.to(x.device)].double()
            x = x[keep.to(x.device)].double()
            products = (x.T @ x, x.T @ f) if rank else (x.new_zeros(()),) * 2
            count = torch.tensor(float(len(x)), dtype=torch.float64, device=x.device)
            new = Moments(count, x.sum(0), f.sum(0), *products)
            outputs = len(output) if isinstance(output, tuple) else 0
            old = found.get(path)
            sums = (
                new if old is None else Moments(*(a + b for a, b in zip(old[0], new, strict=True)))
            )
            found[path] = (sums, outputs)

        return hook

    hooks = [
        model.get_submodule(path).register_forward_hook(watch(path), with_kwargs=True)
        for path in parts
    ]
    try:
        with torch.no_grad(), seen_products(model):
            for batch in batches:
                mask = batch.get("attention_mask")
                model(**batch)
    finally:
        for handle in hooks:
            handle.remove()
    if missing := [path for path in parts if path not in found]:
        raise ValueError(f"{missing[0]} did not run on these data; are there samples?")
    return {
        path: (Moments(*(x.cpu() for x in moments)), outputs)
        for path, (moments, outputs) in found.items()
    }
