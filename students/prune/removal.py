"""What a unit is worth by leaving it out: for axes inside a module that no product reads.

The states of a scan (`s` of Mamba-2 and MambaVision) are such. It works for every axis that lies in
one module, as the rank of MambaVision's step size, at a forward pass of the module for each unit.
"""

import itertools
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from zoo.axes import Axis, Shapes
from zoo.students.prune.proof import tensors
from zoo.students.prune.score import letters_of, outer_axes
from zoo.students.prune.taps import Inputs, Total, alone, seen_products


def removal(
    model: nn.Module,
    shapes: Shapes,
    batches: Iterable[Inputs],
    axis: Axis,
    *,
    total: Total = alone,
) -> tuple[Tensor, tuple[Axis, ...]]:
    """Score units by how far the output of their module moves when each alone is zero.

    The L2 norm over samples of the mean over tokens of the L2 norm over channels. Units in groups
    are left out one by one in each.

    Returns:
        Scores [*by, units], and the outer axes `by`.

    Raises:
        ValueError: there are no batches, or the axis lies in more than one module.
    """
    path = axis.rpartition(".")[0]
    names = list(dict.fromkeys(slot.param for slot in shapes.slots(axis)))
    if not path or not all(name.startswith(f"{path}.") for name in names):
        raise ValueError(
            f"Axis {axis} lies in several modules ({', '.join(names[:3])}, ...), so no one output "
            "shows its units; take --score activation, or magnitude."
        )
    module, by = model.get_submodule(path), outer_axes(shapes, axis)
    grid = [shapes.sizes[a] for a in (*by, axis)]
    squares = torch.zeros(grid, dtype=torch.float64)
    batch: Inputs = {}
    inside = False

    def hook(module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        nonlocal inside
        if inside:
            return
        inside = True
        whole = next(tensors(output))
        state = {n.removeprefix(f"{path}."): t for n, t in model.state_dict().items() if n in names}
        norms = []
        for place in itertools.product(*map(range, grid)):
            unit = dict(zip((*by, axis), place, strict=True))
            left = {n: without(t, shapes, f"{path}.{n}", unit, axis) for n, t in state.items()}
            moved = next(tensors(functional_call(module, left, args, kwargs))) - whole
            norms.append(_norm(moved, batch))
        squares.add_(torch.stack(norms).view(grid).cpu())
        inside = False

    handle = module.register_forward_hook(hook, with_kwargs=True)
    number = 0
    try:
        with torch.no_grad(), seen_products(model):
            for batch in batches:
                number += len(next(iter(batch.values())))
                model(**batch)
    finally:
        handle.remove()
    if not number:
        raise ValueError("Scores need data to look at, and there are no samples.")
    return total(squares).sqrt(), by


def without(tensor: Tensor, shapes: Shapes, name: str, unit: dict[Axis, int], axis: Axis) -> Tensor:
    """Return a weight with zeros where it belongs to one unit (of one outer unit each)."""
    tensor = tensor.clone()
    for _, dim, part, _ in (slot for slot in shapes.slots(axis) if slot.param == name):
        piece, letters = letters_of(tensor, shapes, name, dim, part)
        piece[tuple(unit.get(str(letter), slice(None)) for letter in letters)] = 0
    return tensor


def _norm(moved: Tensor, batch: Inputs) -> Tensor:
    """Sum over samples the square of the mean over tokens of the norm over channels."""
    samples = len(next(iter(batch.values())))
    channels = 1 if moved.ndim == 4 and moved.shape[1] < moved.shape[-1] else -1
    kind = torch.promote_types(moved.dtype, torch.float32)
    rows = torch.linalg.vector_norm(moved, dim=channels, dtype=kind).double().view(samples, -1)
    mask = batch.get("attention_mask")
    if mask is not None and mask.shape == rows.shape:
        return ((rows * mask).sum(1) / mask.sum(1)).square().sum()
    return rows.mean(1).square().sum()
