"""Depth: a planted answer, the measures' formulas, and what is refused before work."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from zoo.eval.dense.depth import (
    DepthSettings,
    depth,
    depth_errors,
    open_depths,
    scale_invariant,
    to_depth,
)
from zoo.eval.examples import Example
from zoo.eval.registry import Picture, Scores

QUICK = DepthSettings(crop=16, stride=16, steps=100, batch=4, lr=0.5, max_depth=4.5, pictures=1)


def write(root, *, kind="png", size=(40, 32), splits=("train", "val"), metres=(1.0, 4.0)):
    """Images whose grey says the depth, in blocks; a stripe of each is unknown."""
    draws = np.random.default_rng(0)
    for split in splits:
        (root / "images" / split).mkdir(parents=True)
        (root / "depth" / split).mkdir(parents=True)
        for i in range(4):
            near = draws.integers(2, size=(4, 5)).repeat(8, axis=0).repeat(8, axis=1)
            grey = np.stack([near * 200 + 20] * 3, axis=-1).astype(np.uint8)
            Image.fromarray(grey).save(root / "images" / split / f"{i}.png")
            far = np.where(near, *metres)[: size[1], : size[0]].copy()
            far[:, :3] = 0
            if kind == "npy":
                np.save(root / "depth" / split / f"{i}.npy", far.astype(np.float32))
            else:
                file = root / "depth" / split / f"{i}.png"
                Image.fromarray((far * 1000).astype(np.uint16)).save(file)
    return root


def measured(who, data, settings):
    found = dict(depth(who, data, settings))
    return {
        name: value.value if isinstance(value, Scores) else value
        for name, value in found.items()
        if not isinstance(value, Picture | Example)
    }


@pytest.mark.parametrize("kind", ["png", "npy"])
def test_depth_that_the_pixels_show_is_found_and_a_blind_model_does_not_find_it(
    planted, tmp_path, kind
):
    data = write(tmp_path, kind=kind)
    got = measured(planted(), data, QUICK)
    assert got["depth/delta1"] > 70 and got["depth/rmse"] < 0.8
    blind = measured(planted(lambda x: x * 0), data, replace(QUICK, steps=30))
    assert blind["depth/delta1"] < 60 and blind["depth/rmse"] > 1


def test_the_measures_are_their_formulas():
    ours, theirs = torch.tensor([[1.0, 2.0, 9.0]]), torch.tensor([[1.2, 4.0, 0.0]])
    delta, rmse, relative = depth_errors(ours, theirs)
    assert delta == 0.5
    assert rmse == pytest.approx(math.sqrt((0.2**2 + 2**2) / 2))
    assert relative == pytest.approx((0.2 / 1.2 + 0.5) / 2)


def test_the_loss_is_the_scale_invariant_one_over_known_pixels():
    theirs = torch.rand(2, 4, 5) + 0.5
    ours = (torch.rand(2, 4, 5) + 0.5).requires_grad_()
    theirs[0, :2] = 0
    gap = (ours.detach().log() - theirs.log())[theirs > 0]
    want = (gap.var(correction=0) + 0.15 * gap.mean() ** 2).sqrt()
    loss = scale_invariant(ours, theirs)
    torch.testing.assert_close(loss.detach(), want)
    loss.backward()
    assert ours.grad.isfinite().all() and not ours.grad[0, :2].any()


def test_one_bin_that_wins_is_the_depth_and_none_that_wins_the_middle():
    scores = torch.full((1, 1, 1, 256), -1.0)
    middle = to_depth(scores, 10.0)
    assert middle.item() == pytest.approx(5, abs=0.01)
    scores[..., 100] = 1e6
    assert to_depth(scores, 10.0).item() == pytest.approx(10 * 100.5 / 256, abs=0.01)


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no images/train beside depth/train"):
        open_depths(tmp_path, QUICK)
    data = write(tmp_path / "sizes", size=(38, 32))
    with pytest.raises(ValueError, match=r"has \(38, 32\) pixels .the image \(40, 32\)"):
        open_depths(data, QUICK)
    data = write(tmp_path / "far", metres=(20.0, 30.0))
    with pytest.raises(ValueError, match=r"0 of them up to 4.5 m.*--depth\.max-depth"):
        open_depths(data, QUICK)
    assert len(open_depths(data, replace(QUICK, max_depth=80.0))[0]) == 4
    (data / "depth" / "train" / "2.png").unlink()
    with pytest.raises(ValueError, match=r"1 of 4 images .* have no depth, .*2\.png first"):
        open_depths(data, replace(QUICK, max_depth=80.0))
    with pytest.raises(ValueError, match="gaps"):
        DepthSettings(stride=900)
