import math

import pytest
import torch

from zoo.features import Batch
from zoo.teachers.open import open_teacher
from zoo.teachers.rule import RULES, Edges
from zoo.teachers.teacher import Teacher


@pytest.mark.parametrize("name", RULES)
def test_a_rule_is_a_teacher_without_weights(name):
    teacher = open_teacher(f"rule:{name}@64")
    assert isinstance(teacher, Teacher)
    assert not list(teacher.parameters())
    cells = None if name.startswith("plan-") else (4, 4)  # of trajectories there is no map
    assert teacher.size == (64, 64) and teacher.grid == cells
    plan = open_teacher(f"rule:{name}@64", device="meta")
    assert (plan.summary_dim, plan.spatial_dim) == (teacher.summary_dim, teacher.spatial_dim)


def test_colour_is_the_mean_and_deviation_of_each_cell_and_of_the_image():
    images = torch.rand(2, 3, 32, 48)
    features = open_teacher("rule:colour@32").features(images)
    cell = images[1, :, 16:32, 32:48].flatten(1)
    expected = torch.cat([cell.mean(1), cell.std(1, correction=0)])
    torch.testing.assert_close(features.spatial[1, 1, 2], expected)
    whole = images.flatten(2)
    expected = torch.cat([whole.mean(2), whole.std(2, correction=0)], 1)
    torch.testing.assert_close(features.summary, expected)


def test_a_flat_cell_has_no_deviation():
    features = open_teacher("rule:colour@32")(Batch(torch.full((1, 3, 32, 32), 0.7)))
    assert features.spatial.isfinite().all() and features.spatial[..., 3:].max() < 1 / 255


@pytest.mark.parametrize("bin", range(Edges.bins))
def test_edges_of_one_orientation_fall_into_its_bin(bin):
    angle = bin * math.pi / Edges.bins
    rows, cols = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    ramp = (cols * math.cos(angle) + rows * math.sin(angle)) / 128 + 0.4
    features = open_teacher("rule:edges@64")(Batch(ramp.expand(1, 3, 64, 64)))
    inner = features.spatial[0, 1:3, 1:3]
    torch.testing.assert_close(inner[..., bin], torch.full((2, 2), 1 / 128), atol=1e-5, rtol=0)
    assert inner.sum(-1).allclose(inner[..., bin], atol=1e-5)


def test_edges_share_out_the_whole_strength():
    images = torch.rand(1, 3, 32, 32)
    features = Edges()(images)
    grey = images.mean(1)[0]
    across = (grey[1:-1, 2:] - grey[1:-1, :-2]) / 2
    down = (grey[2:, 1:-1] - grey[:-2, 1:-1]) / 2
    inner = (across.square() + down.square()).sqrt().sum()
    total = features.spatial.sum() * 16 * 16
    assert inner < total < inner * 1.5  # the border's pixels come on top
    torch.testing.assert_close(features.summary.sum() * 32 * 32, total)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("color", "Did you mean colour"),
        ("colour/random", "has no weights"),
        ("edges@50", "take @48 or @64"),
    ],
)
def test_a_rule_that_does_not_exist_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        open_teacher(f"rule:{name}")
