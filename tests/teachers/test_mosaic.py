"""Mosaics: images side by side in a teacher's canvas."""

import math

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.features import Batch
from zoo.teachers.from_timm import TimmTeacher
from zoo.teachers.mosaic import Mosaic, border_effect, cut, pack
from zoo.teachers.open import open_teacher
from zoo.teachers.teacher import Teacher
from zoo.train.distill.config import TeacherSpec


@pytest.fixture(scope="module")
def sam() -> TimmTeacher:
    """A SAM of two layers, one of them with windows, on canvases of 128 px."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = timm.create_model(
            "samvit_base_patch16",
            img_size=128,
            depth=2,
            embed_dim=32,
            num_heads=2,
            global_attn_indexes=(1,),
            window_size=4,
            num_classes=0,
        )
    norm = dict(mean=(0.5,) * 3, std=(0.5,) * 3)
    return TimmTeacher("timm:tiny_sam", network, size=(128, 128), **norm)


def test_a_sams_map_is_what_its_last_block_returns_or_its_neck(sam):
    network, images = sam.network, torch.rand(1, 3, 128, 128)
    norm = dict(mean=(0.5,) * 3, std=(0.5,) * 3)
    before = TimmTeacher("timm:tiny_sam", network, normed=False, size=(128, 128), **norm)
    seen = []
    hook = network.blocks[-1].register_forward_hook(lambda *args: seen.append(args[-1]))
    torch.testing.assert_close(before(Batch(images)).spatial, seen[0])
    hook.remove()
    behind = network.neck(seen[0].permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    torch.testing.assert_close(sam(Batch(images)).spatial, behind)


@given(count=st.integers(1, 19), k=st.integers(2, 4), cells=st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_a_teacher_of_single_patches_has_the_same_features_in_a_mosaic(count, k, cells):
    tile = 16 * cells
    images = torch.rand(count, 3, tile, tile)
    whole = open_teacher(f"rule:colour@{tile}")
    mosaic = open_teacher(f"rule:colour@{tile * k}", mosaic=k)
    assert isinstance(mosaic, Teacher) and isinstance(mosaic, Mosaic)
    features = mosaic(Batch(images))
    assert features.summary is None and mosaic.summary_dim is None
    assert features.spatial.shape == (count, cells, cells, whole.spatial_dim)
    torch.testing.assert_close(features.spatial, whole(Batch(images)).spatial, rtol=0, atol=1e-6)


def test_cutting_undoes_packing_and_the_first_images_fill_the_last_canvas():
    tiles = torch.rand(5, 3, 8, 8)
    canvas = pack(tiles, 2)
    assert canvas.shape == (2, 3, 16, 16)
    back = cut(canvas.permute(0, 2, 3, 1), 2).permute(0, 3, 1, 2)
    torch.testing.assert_close(back, torch.cat([tiles, tiles[:3]]), rtol=0, atol=0)


def test_what_neighbours_change_in_a_sam_is_strongest_at_the_borders(sam):
    mosaic = Mosaic(sam, 2)
    images = torch.rand(6, 3, 64, 64)
    for others in ("same", "black"):
        effect = border_effect(mosaic, [Batch(images)], others)
        # the convolutions of its neck reach over the border: 3.0 and 21 beside itself, 1.5 and
        # 2.7 in black on these draws
        assert 1 < 1.5 * effect.fidelity < effect.inner < math.inf
        assert 0 < effect.cosine < 1


def test_the_border_effect_of_patches_alone_is_none():
    mosaic = Mosaic(open_teacher("rule:colour@128"), 2)
    effect = border_effect(mosaic, [Batch(torch.rand(3, 3, 64, 64))])
    assert effect.fidelity > 1e6 and effect.inner > 1e6


def test_the_teacher_runs_once_for_all_tiles(sam):
    canvases = []
    hook = sam.network.patch_embed.register_forward_pre_hook(
        lambda _, args: canvases.append(len(args[0]))
    )
    Mosaic(sam, 4)(Batch(torch.rand(17, 3, 32, 32)))
    hook.remove()
    assert canvases == [2]


def test_tiles_that_the_stride_does_not_divide_name_what_does(sam):
    message = r"tiles of 42.6667 px.*stride of 16 px.*mosaic=2.*@96 or @144"
    with pytest.raises(ValueError, match=message):
        Mosaic(sam, 3)
    with pytest.raises(ValueError, match="at least 2"):
        Mosaic(sam, 1)


def test_a_spec_says_how_many_images_are_in_a_canvas():
    spec = TeacherSpec.parse("rule:colour@128,mosaic=4")
    assert spec.mosaic == 4 and TeacherSpec.parse(spec.describe()) == spec
    with pytest.raises(ValueError, match="mosaic is 0"):
        TeacherSpec.parse("rule:colour@128,mosaic=0")
    with pytest.raises(ValueError, match="needs a number"):
        TeacherSpec.parse("rule:colour@128,mosaic=many")
