from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

from zoo.features import Batch, Features, match_grid
from zoo.train.distill.losses import mse, over_seen
from zoo.train.distill.shift import Side, cropped, draw_windows, overlap, shifted


class Patches(nn.Module):
    """A perfectly equivariant model: each cell sees its own patch, and nothing else."""

    def __init__(self, size: int, patch: int, pattern: float = 0.0):
        super().__init__()
        self.size, self.patch = (size, size), patch
        self.grid = (size // patch,) * 2
        self.pattern = pattern * torch.randn(*self.grid, 3, generator=torch.manual_seed(1))

    def forward(self, batch: Batch) -> Features:
        cells = nn.functional.avg_pool2d(batch.at(self.size), self.patch).permute(0, 2, 3, 1)
        return Features(None, cells + self.pattern)


def windows_of(*models: Patches, room: Fraction, step: int, images: int = 2):
    places = images * step + np.arange(images)
    return [
        draw_windows(m.size, m.grid, room, 7, places, number) for number, m in enumerate(models)
    ]


def pair(student, teacher, batch, step, room=Fraction(3, 8)):
    """The two maps, the positions that both see, and the windows."""
    ours, theirs = windows_of(student, teacher, room=room, step=step, images=len(batch.images))
    looks = shifted(student, ours)(batch), shifted(teacher, theirs)(batch)
    return overlap(looks[0].spatial, looks[1].spatial, ours, theirs), (ours, theirs)


def paid(maps) -> torch.Tensor:
    ours, theirs, seen = maps
    return over_seen(mse, ours, theirs, seen)


def test_each_image_of_a_batch_is_seen_through_windows_of_its_own():
    student, teacher = windows_of(
        Patches(64, 8), Patches(64, 8), room=Fraction(2, 8), step=3, images=64
    )
    starts = set(zip(student[0].starts, student[1].starts, strict=True))
    assert len(starts) == 9  # shifts by up to 2 cells: 3 x 3 places
    relative = {a - b for a, b in zip(student[0].starts, teacher[0].starts, strict=True)}
    assert relative == {-16, -8, 0, 8, 16}


def test_a_perfectly_equivariant_student_has_no_loss_under_any_shift():
    same = Patches(64, 8)
    batch = Batch(torch.rand(16, 3, 88, 88))  # the canvas: 11 patches, of which 8 are seen
    for step in range(4):
        maps, _ = pair(same, same, batch, step)
        assert paid(maps).tolist() == [0] * 16
        assert maps[2].sum((1, 2)).min() >= 25


def test_a_student_that_copies_a_fixed_pattern_pays_for_it_only_under_shifts():
    speckled = Patches(64, 8, pattern=0.3)
    batch = Batch(torch.rand(32, 3, 88, 88))
    unshifted = [speckled(batch).spatial for _ in range(2)]
    assert mse(*match_grid(*unshifted)).item() == 0
    maps, (ours, theirs) = pair(speckled, speckled, batch, 0)
    still = [
        all(o.starts[i] == t.starts[i] for o, t in zip(ours, theirs, strict=True))
        for i in range(32)
    ]
    assert [loss == 0 for loss in paid(maps).tolist()] == still and not all(still)
    assert sum(loss > 0.1 for loss in paid(maps).tolist()) > 16


def test_the_loss_of_an_image_is_the_mean_over_the_cells_that_both_crops_have():
    """Against a plain loop over images and cells, which finds a cell by its pixel of the canvas."""
    student, teacher = Patches(64, 8, pattern=0.3), Patches(64, 8)
    batch = Batch(torch.rand(8, 3, 88, 88))
    maps, (ours, theirs) = pair(student, teacher, batch, 5)
    means = nn.functional.avg_pool2d(batch.images, 8)
    for i, loss in enumerate(paid(maps).tolist()):
        losses = []
        for row in range(11):  # the cells of the canvas
            for col in range(11):
                mine = row - ours[0].starts[i] // 8, col - ours[1].starts[i] // 8
                its = row - theirs[0].starts[i] // 8, col - theirs[1].starts[i] // 8
                if all(0 <= place < 8 for place in (*mine, *its)):
                    guess = means[i, :, row, col] + student.pattern[mine]
                    losses.append((guess - means[i, :, row, col]).square().mean().item())
        assert loss == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_equal_windows_give_what_an_unshifted_loss_compares():
    student, teacher = Patches(64, 8), Patches(60, 12)
    batch = Batch(torch.rand(2, 3, 64, 64))
    maps = [model(batch).spatial for model in (student, teacher)]
    sides = [(Side(m.size[0], m.size[0], (0, 0)),) * 2 for m in (student, teacher)]
    *found, seen = overlap(*maps, *sides)
    assert seen.all()
    for mine, expected in zip(found, match_grid(*maps), strict=True):
        assert mine.shape == (2, 5, 5, 3)
        torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize("finer", [0, 1])
def test_maps_of_other_patches_meet_where_both_see_the_image(finer):
    """On a ramp, averages over cells are exact: what is compared must be the same place."""
    models = [Patches(64, 8), Patches(96, 16)]
    student, teacher = models[::-1] if finer else models
    ramp = torch.linspace(0, 1, 264)
    image = torch.stack([ramp[None].expand(264, 264), ramp[:, None].expand(264, 264)])
    batch = Batch(torch.cat([image, torch.zeros(1, 264, 264)])[None].repeat(20, 1, 1, 1))
    (mine, theirs, seen), _ = pair(student, teacher, batch, 0)
    assert mine.shape == (20, 6, 6, 3)
    # triangles are cut off at the rim of the finer map
    inner = seen & seen.roll(1, 1) & seen.roll(-1, 1) & seen.roll(1, 2) & seen.roll(-1, 2)
    inner[:, [0, -1]] = inner[:, :, [0, -1]] = False
    assert inner.any()
    assert (mine - theirs)[inner].abs().max() < 2e-3  # a cell is 1/11 of the ramp


def test_a_crop_is_the_part_of_the_canvas_that_its_window_names():
    images = torch.rand(2, 3, 88, 88)
    window = (Side(88, 64, (24, 0)), Side(88, 64, (8, 16)))
    crop = cropped(Batch(images, ["x", "y"]), window)
    assert torch.equal(crop.images[0], images[0, :, 24:88, 8:72]) and crop.keys == ["x", "y"]
    assert torch.equal(crop.images[1], images[1, :, :64, 16:80])


def test_windows_move_by_whole_cells_and_follow_their_key():
    room, many = Fraction(3, 8), np.arange(50)
    rows, cols = draw_windows((96, 96), (6, 6), room, 1, many)
    assert set(rows.starts) == set(cols.starts) == {0, 16, 32}  # 96 · 3/8 = 36 px: two cells of 16
    assert rows.starts != cols.starts
    halves = [draw_windows((96, 96), (6, 6), room, 1, part)[0] for part in (many[:20], many[20:])]
    assert halves[0].starts + halves[1].starts == rows.starts
    bare = draw_windows((50, 50), None, Fraction(1, 5), 4, many)
    assert len(set(bare[0].starts)) > 5
    assert all(side.canvas == 60 and set(side.starts) <= set(range(11)) for side in bare)
