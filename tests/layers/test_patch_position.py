"""One grid of positions for every image size."""

import numpy as np
import pytest
import torch

from zoo.layers.patch_position import (
    CropDraws,
    cropped_positions,
    draw_crops,
    regridded_positions,
    resized_positions,
)


@pytest.fixture(scope="module")
def published(golden):
    with np.load(f"{golden.ROOT}/radio_algorithms.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def grid(golden):
    return torch.from_numpy(golden.fill_value("cpe_train.pos_embed", (1, 4096, 8)))


def _published_draws(golden):
    def draw(name, *shape):
        return torch.from_numpy(np.float32(golden.rng_of(f"cpe_train.{name}").random(shape)))

    return CropDraws(draw("scale", 3, 1, 1), draw("aspect", 3, 1, 1), draw("position", 3, 1, 1, 2))


def _coordinates(side):
    """A grid whose vectors say where they are: (column, row) in the unit square."""
    along = torch.linspace(0, 1, side)
    return torch.stack(torch.meshgrid(along, along, indexing="xy"), -1).view(1, -1, 2)


def test_training_windows_equal_the_published_ones(golden, published, grid):
    ours = cropped_positions(grid, 14, 10, _published_draws(golden))
    # 64 cells times the rounding of a float32 coordinate, through a grid of spread 0.3
    np.testing.assert_allclose(ours.numpy(), published["cpe_train"], atol=2e-5)


@pytest.mark.parametrize("rows, cols", [(14, 14), (14, 22), (10, 4), (64, 64), (70, 30)])
def test_positions_at_inference_equal_the_published_ones(published, grid, rows, cols):
    ours = resized_positions(grid, rows, cols, align_corners=False)[:, :: max(1, rows * cols // 64)]
    np.testing.assert_allclose(ours.numpy(), published[f"cpe_eval_{rows}x{cols}"], atol=1e-6)


def test_a_wide_image_has_the_first_rows_of_a_square_one():
    grid = torch.randn(1, 64, 3)
    square = resized_positions(grid, 6, 6, align_corners=True)
    wide = resized_positions(grid, 2, 6, align_corners=True)
    torch.testing.assert_close(wide, square[:, :12], rtol=0, atol=0)


def test_the_corners_are_aligned_only_when_asked():
    grid = _coordinates(8)
    aligned = resized_positions(grid, 4, 4, align_corners=True)
    torch.testing.assert_close(aligned[0, -1], torch.ones(2))
    assert (resized_positions(grid, 4, 4, align_corners=False)[0, -1] < 0.99).all()


def test_windows_stay_inside_the_grid_and_keep_the_promised_sides():
    draws = draw_crops(500)
    places = cropped_positions(_coordinates(9), 5, 7, draws).view(500, 5, 7, 2)
    assert places.min() >= -1e-6
    assert places.max() <= 1 + 1e-6
    sides = (places[:, -1, -1] - places[:, 0, 0]).clamp(min=1e-6)  # (columns, rows)
    aspect = sides[:, 0] / sides[:, 1]
    full = sides.max(dim=1).values > 1 - 1e-4  # clamped windows have another aspect
    assert (aspect[~full] < (4 / 3) ** 2 + 1e-3).all()  # s·a over s/a is a²
    assert (aspect[~full] > (3 / 4) ** 2 - 1e-3).all()
    size = (sides[~full, 0] * sides[~full, 1]).sqrt()
    assert size.min() >= 0.1**0.5 - 1e-4
    assert size.min() < 0.4
    assert size.max() > 0.8


def test_extreme_draws_give_the_smallest_window_and_the_whole_grid():
    none, one = torch.zeros(1, 1, 1), torch.ones(1, 1, 1)
    corner = torch.zeros(1, 1, 1, 2)
    grid = _coordinates(9)
    small = cropped_positions(grid, 2, 2, CropDraws(none, one / 2, corner))[0]
    torch.testing.assert_close(small[-1], torch.full((2,), 0.1**0.5))
    whole = cropped_positions(grid, 9, 9, CropDraws(one, one / 2, corner))
    torch.testing.assert_close(whole, grid)


def test_the_grid_learns_from_every_image():
    grid = torch.randn(1, 16, 4, requires_grad=True)
    cropped_positions(grid, 3, 3, draw_crops(2)).sum().backward()
    assert grid.grad.abs().sum() > 0


def test_half_precision_positions_are_those_of_single_precision_rounded():
    grid = torch.randn(1, 64, 3).bfloat16()
    ours = resized_positions(grid, 5, 3, align_corners=False)
    exact = resized_positions(grid.float(), 5, 3, align_corners=False)
    assert torch.equal(ours, exact.bfloat16())


def test_a_foreign_grid_is_resampled_with_its_corners_kept():
    grid = torch.randn(1, 16, 3)
    assert regridded_positions(grid, 16) is grid
    larger = regridded_positions(grid, 49)
    torch.testing.assert_close(larger[0, [0, 6, 42, 48]], grid[0, [0, 3, 12, 15]])


def test_a_grid_that_is_no_square_is_refused_with_the_nearest_square():
    with pytest.raises(ValueError, match="15 positions is not a square; 9"):
        resized_positions(torch.randn(1, 15, 2), 2, 2, align_corners=False)
