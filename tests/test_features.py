"""The shared vocabulary: batches at any size, features of any timm model, two maps on one grid."""

import jaxtyping
import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.features import Batch, by_products, match_grid, read_features

GRIDS = st.tuples(st.integers(1, 9), st.integers(1, 9))


def test_bytes_and_floats_give_the_same_images_and_each_size_is_made_once():
    pixels = torch.randint(0, 256, (2, 3, 8, 6), dtype=torch.uint8)
    batch = Batch(pixels)
    torch.testing.assert_close(batch.at((8, 6)), pixels / 255)
    torch.testing.assert_close(batch.at((4, 3)), Batch(pixels / 255).at((4, 3)))
    assert batch.at((4, 3)) is batch.at((4, 3))
    assert batch.at((16, 12)).min() >= 0 and batch.at((16, 12)).max() <= 1


@pytest.mark.parametrize("name", ["resnet10t", "test_vit", "test_convnext", "test_efficientnet"])
def test_features_of_a_timm_model_are_its_pooled_vector_and_its_last_map(name):
    model = timm.create_model(name, num_classes=0).eval()
    x = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        features, pooled = read_features(model, x), model(x)
    torch.testing.assert_close(features.summary, pooled)
    assert features.spatial.ndim == 4
    assert features.spatial.shape[-1] == model.feature_info[-1]["num_chs"]


@settings(deadline=None, max_examples=40)
@given(GRIDS, GRIDS)
def test_both_maps_come_to_the_smaller_grid_side_by_side(a, b):
    ours, theirs = match_grid(torch.randn(2, *a, 3), torch.randn(2, *b, 3))
    smaller = min(a[0], b[0]), min(a[1], b[1])
    assert ours.shape == (2, *smaller, 3)
    assert theirs.shape == (2, *smaller, 3)


def test_equal_grids_are_left_as_they_are():
    ours, theirs = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4)
    matched = match_grid(ours, theirs)
    assert matched[0] is ours
    assert matched[1] is theirs


def test_shrinking_averages_all_cells_and_skips_none():
    ours = torch.arange(8.0).view(1, 1, 8, 1)
    theirs = torch.zeros(1, 1, 2, 1)
    shrunk, kept = match_grid(ours, theirs)
    # a triangle of half-width 4 cells about the centres 1.5 and 5.5, cut off at the border
    near = torch.tensor([0.625, 0.875, 0.875, 0.625, 0.375, 0.125, 0, 0])
    left = (near * torch.arange(8.0)).sum() / near.sum()
    torch.testing.assert_close(shrunk.flatten(), torch.stack([left, 7 - left]))
    assert kept is theirs


@settings(deadline=None, max_examples=25)
@given(GRIDS)
def test_shrinking_is_the_antialiased_bilinear_resize_of_torch(grid):
    ours = torch.randn(2, 9, 9, 3)
    shrunk, _ = match_grid(ours, torch.zeros(2, *grid, 3))
    expected = F.interpolate(ours.permute(0, 3, 1, 2), grid, mode="bilinear", antialias=True)
    torch.testing.assert_close(shrunk.permute(0, 3, 1, 2), expected)


def test_shrinking_stays_in_float32_under_autocast():
    ours, small = torch.randn(1, 8, 8, 2), torch.zeros(1, 3, 3, 2)
    with torch.autocast("cpu", torch.bfloat16):
        shrunk, _ = match_grid(ours, small)
    assert torch.equal(shrunk, match_grid(ours, small)[0])


@settings(deadline=None, max_examples=25)
@given(GRIDS, GRIDS)
def test_a_constant_map_stays_constant(a, b):
    value = torch.randn(3)
    for matched in match_grid(value.expand(1, *a, 3), value.expand(1, *b, 3)):
        torch.testing.assert_close(matched, value.expand_as(matched))


def test_mirrored_maps_shrink_to_mirrored_maps():
    ours, small = torch.randn(1, 7, 9, 2), torch.zeros(1, 4, 5, 2)
    there = match_grid(ours, small)[0].flip(1, 2)
    torch.testing.assert_close(match_grid(ours.flip(1, 2), small)[0], there)


def test_the_student_gets_a_gradient_through_its_resized_map():
    ours = torch.randn(1, 6, 6, 2, dtype=torch.bfloat16).requires_grad_()
    match_grid(ours, torch.zeros(1, 3, 4, 2))[0].square().sum().backward()
    assert ours.grad.abs().min() > 0


@pytest.mark.gpu
def test_on_a_gpu_the_gradient_of_shrinking_is_the_same_each_time():
    ours = torch.randn(4, 64, 64, 32, device="cuda", requires_grad=True)
    small = torch.randn(4, 9, 7, 32, device="cuda")
    first, *others = (
        torch.autograd.grad(match_grid(ours, small)[0].square().sum(), ours)[0] for _ in range(5)
    )
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.skipif(torch.__version__ < "2.12", reason="shapes are checked from torch 2.12 on")
def test_a_wrong_shape_is_caught_while_the_tests_run():
    with pytest.raises(jaxtyping.TypeCheckError):
        match_grid(torch.ones(2, 2), torch.ones(1, 2, 2, 2))


def test_images_of_two_interpolations_differ_and_those_that_fit_are_kept_once():
    batch = Batch(torch.rand(1, 3, 20, 20))
    assert not torch.equal(batch.at((8, 8), "bilinear"), batch.at((8, 8), "bicubic"))
    assert batch.at((20, 20), "bilinear") is batch.at((20, 20))


def photographs(*sides: int) -> torch.Tensor:
    """Bytes: smooth images, noise, and edges from black to white, which overshoot most."""
    draw = torch.Generator().manual_seed(0)
    noise = torch.rand(2, 3, *sides, generator=draw)
    smooth = F.avg_pool2d(noise, 9, 1, 4)
    return (255 * torch.cat([noise, smooth, (noise > 0.5).float()])).round().byte()


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(40, 30), (33, 71), (130, 100), (64, 50)])
def test_resizing_by_products_is_torchs_own(size, mode):
    images = photographs(64, 50)
    floats = images.double() / 255
    exact = F.interpolate(floats, size, mode=mode, antialias=True)
    torch.testing.assert_close(by_products(floats, size, mode), exact, rtol=0, atol=1e-12)
    single, theirs = floats.float(), F.interpolate(floats.float(), size, mode=mode, antialias=True)
    torch.testing.assert_close(by_products(single, size, mode), theirs, rtol=0, atol=1e-6)
    steps = 255 * (by_products(images, size, mode) - exact)  # of a byte
    assert steps.abs().max() < 0.5 and steps.square().mean().sqrt() < 0.07
    assert steps.mean().abs() < 0.02  # no image gets darker


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_a_gpu_resizes_as_a_cpu_does(mode):
    images = photographs(260, 200)
    size = (160, 224)
    with torch.autocast("cuda", torch.bfloat16):
        there = Batch(images.cuda()).at(size, mode)
    steps = 255 * (there.cpu() - Batch(images).at(size, mode))
    assert there.dtype == torch.float32 and there.min() >= 0 and there.max() <= 1
    assert steps.abs().max() < 0.5 and steps.square().mean().sqrt() < 0.07
    floats = images.float() / 255
    exact, there = Batch(floats).at(size, mode), Batch(floats.cuda()).at(size, mode).cpu()
    torch.testing.assert_close(there, exact, atol=4e-5, rtol=0)  # a hundredth of a byte
