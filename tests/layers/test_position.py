"""Position MLPs of a stage, all at once."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from zoo.layers.position import (
    CarrierBias,
    GridEmbedding,
    WindowPositionBias,
    compute_together,
)

aten = torch.ops.aten

KINDS = {
    "window": (lambda **kw: WindowPositionBias(2, 3, **kw), None),
    "window, carriers in front": (lambda **kw: WindowPositionBias(2, 3, prefix=4, **kw), None),
    "cells": (lambda **kw: GridEmbedding(6, 3, 3, **kw), (3, 3)),
    "cells of another grid": (lambda **kw: GridEmbedding(6, 3, 3, **kw), (2, 5)),
    "carriers": (lambda **kw: CarrierBias(2, 2, 4, square=False, **kw), (2, 4)),
    "carriers, published": (lambda **kw: CarrierBias(2, 2, 4, square=True, **kw), (2, 4)),
}


def parts_of(kind, count=3):
    make, grid = KINDS[kind]
    return [make(hidden=16).double() for _ in range(count)], grid


def assert_alike(parts, grid):
    leaves = [p for part in parts for p in part.parameters()]
    results = []
    for found in (compute_together(parts, grid), [part(grid) for part in parts]):
        loss = sum(t.square().sum() for t in found)
        results.append([*found, *torch.autograd.grad(loss, leaves)])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("kind", KINDS)
def test_all_at_once_gives_what_each_gives(kind):
    parts, grid = parts_of(kind)
    assert_alike(parts, grid)


class Products(TorchDispatchMode):
    """Count matrix products."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in {aten.mm, aten.addmm, aten.bmm}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
def test_two_products_do_for_any_number_of_parts(kind):
    for count in (1, 3, 7):
        parts, grid = parts_of(kind, count)
        with Products() as products:
            compute_together(parts, grid)
        assert products.count == 2


class Wrapped(nn.Module):
    """What a library puts in a layer's place."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return 2 * self.layer(x)


@pytest.mark.parametrize("kind", KINDS)
def test_parts_that_differ_are_computed_one_by_one(kind):
    parts, grid = parts_of(kind)
    parts[1] = KINDS[kind][0](hidden=12).double()  # cut narrower
    assert_alike(parts, grid)
    parts, grid = parts_of(kind)
    parts[1].mlp[2] = Wrapped(parts[1].mlp[2])
    assert_alike(parts, grid)


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_deploy_form_keeps_is_used(kind):
    parts, grid = parts_of(kind)
    before = compute_together(parts, grid)
    for part in parts:
        part.fuse()
        nn.init.zeros_(part.mlp[0].weight)  # so that computing again would show
    kept = kind != "cells of another grid"
    after = compute_together(parts, grid)
    assert all(torch.allclose(a, b) for a, b in zip(after, before, strict=True)) == kept
