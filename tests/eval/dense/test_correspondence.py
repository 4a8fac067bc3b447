"""Correspondence: planted features find every point, random ones what chance says."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from zoo.eval.dense.correspondence import (
    CorrespondenceSettings,
    correspondence,
    draw_warps,
    match,
    read_spair,
    warped,
)


def numbers(found):
    return {name: value.value for name, value in found}


def places(side=32):
    """An image whose colour says where a pixel is: red its column, green its row, blue all on."""
    at = (torch.arange(side) + 0.5) / side
    rows, cols = torch.meshgrid(at, at, indexing="ij")
    return torch.stack([cols, rows, torch.ones_like(rows)])


def test_features_that_say_the_place_find_every_point(planted, pictures, tmp_path):
    who = planted(images=pictures(places().expand(6, -1, -1, -1)))
    got = numbers(correspondence(who, tmp_path, CorrespondenceSettings()))
    assert got["correspondence/pck0.1"] == 100
    assert got["correspondence/pck0.05"] > 95


def test_features_drawn_at_random_find_what_chance_says(planted, pictures, tmp_path):
    generator = torch.Generator().manual_seed(0)

    def features(x):
        return torch.randn(len(x), 16, 16, 16, generator=generator)

    who = planted(features, images=pictures(torch.rand(40, 3, 32, 32)))
    got = numbers(correspondence(who, tmp_path, CorrespondenceSettings(finer=1)))
    # a disc of radius 0.1 in a square of side 1, a little less for points near its edge
    assert got["correspondence/pck0.1"] == pytest.approx(100 * math.pi * 0.1**2, rel=0.3)


def test_a_warp_and_its_points_go_together():
    warps = draw_warps(5, np.random.default_rng(0))
    points = torch.rand(30, 2)
    images = places(64).expand(5, -1, -1, -1)
    moved, at, inside = warped(images, warps, points)
    assert inside.any(dim=1).all() and not inside.all()
    sampled = F.grid_sample(moved, (2 * at - 1)[:, :, None], align_corners=False)[..., 0]
    error = (sampled[:, :2].transpose(1, 2) - points[None]).abs().amax(dim=-1)
    edge = ((points - 0.5).abs() < 0.45).all(dim=-1)  # beyond, the black around it mixes in
    assert error[inside & edge].max() < 0.02


def test_a_map_against_itself_gives_the_points_back_up_to_a_cell():
    x = torch.randn(2, 12, 10, 8)
    points = torch.rand(2, 20, 2)
    cells = torch.tensor([10, 12])
    middles = ((points * cells).floor() + 0.5) / cells
    torch.testing.assert_close(match(x, middles, x), middles)


def spair(root, *, shift=(0, 0), **changed):
    (root / "PairAnnotation" / "test").mkdir(parents=True)
    (root / "JPEGImages" / "cat").mkdir(parents=True)
    pixels = (places(64) * 255).byte().permute(1, 2, 0).numpy()
    wide = np.asarray(Image.fromarray(pixels).resize((96, 64)))
    Image.fromarray(pixels).save(root / "JPEGImages" / "cat" / "a.png")
    Image.fromarray(wide).save(root / "JPEGImages" / "cat" / "b.png")
    content = (
        dict(
            src_imname="a.png",
            trg_imname="b.png",
            category="cat",
            trg_bndbox=[10, 10, 50, 30],
            src_kps=[[16, 16], [40, 20]],
            trg_kps=[[24 + shift[0], 16 + shift[1]], [60, 20]],
            src_imsize=[64, 64, 3],
            trg_imsize=[96, 64, 3],
        )
        | changed
    )
    (root / "PairAnnotation" / "test" / "1.json").write_text(json.dumps(content))


def test_key_points_of_spair_are_measured_in_the_objects_larger_side(planted, tmp_path):
    who = planted(size=64)
    spair(tmp_path / "near")
    got = numbers(correspondence(who, tmp_path / "near", CorrespondenceSettings()))
    assert got == {"correspondence/pck0.05": 100, "correspondence/pck0.1": 100}
    spair(tmp_path / "off", shift=(3, 0))  # 3 of 40 pixels: within a tenth, not a twentieth
    got = numbers(correspondence(who, tmp_path / "off", CorrespondenceSettings()))
    assert got == {"correspondence/pck0.05": 50, "correspondence/pck0.1": 100}


def test_damaged_pairs_are_refused(planted, tmp_path):
    with pytest.raises(ValueError, match="no pairs in"):
        read_spair(tmp_path, "test")
    spair(tmp_path / "lost", trg_imname="c.png")
    with pytest.raises(ValueError, match=r"image .*c\.png is missing"):
        read_spair(tmp_path / "lost", "test")
    spair(tmp_path / "odd", trg_kps=[[1, 1]])
    with pytest.raises(ValueError, match="points do not pair up"):
        read_spair(tmp_path / "odd", "test")
    spair(tmp_path / "box", trg_bndbox=[1, 1])
    with pytest.raises(ValueError, match="not a pair of SPair-71k"):
        read_spair(tmp_path / "box", "test")
    with pytest.raises(ValueError, match="finer is 0"):
        CorrespondenceSettings(finer=0)
