from fractions import Fraction

import pytest
import torch
from torch import nn

from zoo.features import Batch, Features, match_grid
from zoo.train.distill.losses import mse
from zoo.train.distill.shift import Side, cropped, draw_window, overlap, shifted


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


def windows_of(*models: Patches, room: Fraction, step: int):
    return [draw_window(m.size, m.grid, room, 7, step, number) for number, m in enumerate(models)]


def pair(student, teacher, batch, step, room=Fraction(3, 8)):
    """The two maps at the positions that both see."""
    ours, theirs = windows_of(student, teacher, room=room, step=step)
    looks = shifted(student, ours)(batch), shifted(teacher, theirs)(batch)
    return overlap(looks[0].spatial, looks[1].spatial, ours, theirs), (ours, theirs)


def test_a_perfectly_equivariant_student_has_no_loss_under_any_shift():
    same = Patches(64, 8)
    batch = Batch(torch.rand(2, 3, 88, 88))  # the canvas: 11 patches, of which 8 are seen
    relative = set()
    for step in range(20):
        maps, (ours, theirs) = pair(same, same, batch, step)
        assert mse(*maps).item() == 0
        relative.add((ours[0].start - theirs[0].start, ours[1].start - theirs[1].start))
    assert len(relative) > 10


def test_a_student_that_copies_a_fixed_pattern_pays_for_it_only_under_shifts():
    speckled = Patches(64, 8, pattern=0.3)
    batch = Batch(torch.rand(2, 3, 88, 88))
    unshifted = [speckled(batch).spatial for _ in range(2)]
    assert mse(*match_grid(*unshifted)).item() == 0
    paid = []
    for step in range(20):
        maps, (ours, theirs) = pair(speckled, speckled, batch, step)
        still = all(o.start == t.start for o, t in zip(ours, theirs, strict=True))
        paid.append(mse(*maps).item())
        assert (paid[-1] == 0) == still
    assert sum(loss > 0.1 for loss in paid) > 10


def test_equal_windows_give_what_an_unshifted_loss_compares():
    student, teacher = Patches(64, 8), Patches(60, 12)
    batch = Batch(torch.rand(2, 3, 64, 64))
    maps = [model(batch).spatial for model in (student, teacher)]
    sides = [(Side(m.size[0], m.size[0], 0),) * 2 for m in (student, teacher)]
    found = overlap(*maps, *sides)
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
    batch = Batch(torch.cat([image, torch.zeros(1, 264, 264)])[None])
    seen = 0
    for step in range(20):
        (mine, theirs), _ = pair(student, teacher, batch, step, Fraction(3, 8))
        inner = (mine - theirs)[:, 1:-1, 1:-1]  # triangles are cut off at the rim of the finer map
        assert inner.abs().max() < 2e-3  # a cell is 1/11 of the ramp
        assert 1 <= mine.shape[1] <= 6
        seen += inner.numel()
    assert seen > 0


def test_a_crop_is_the_part_of_the_canvas_that_its_window_names():
    images = torch.rand(1, 3, 88, 88)
    window = (Side(88, 64, 24), Side(88, 64, 8))
    crop = cropped(Batch(images, ["x"]), window)
    assert torch.equal(crop.images, images[:, :, 24:88, 8:72]) and crop.keys == ["x"]


def test_windows_move_by_whole_cells_and_follow_their_key():
    drawn = [draw_window((96, 96), (6, 6), Fraction(3, 8), 1, step) for step in range(50)]
    starts = {side.start for window in drawn for side in window}
    assert starts == {0, 16, 32}  # 96 · 3/8 = 36 px hold two cells of 16
    assert drawn == [draw_window((96, 96), (6, 6), Fraction(3, 8), 1, step) for step in range(50)]
    bare = draw_window((50, 50), None, Fraction(1, 5), 4)
    assert all(side.canvas == 60 and 0 <= side.start <= 10 for side in bare)
