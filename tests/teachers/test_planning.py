import pytest
import torch

from zoo.features import Batch
from zoo.teachers.open import open_teacher
from zoo.teachers.planning import (
    CURVATURES,
    METRES,
    RADIUS,
    SECONDS,
    SPEEDS,
    Scores,
    drive,
    judge,
    vocabulary,
)

SIZE = 64


def empty(speed: float = 0.5) -> torch.Tensor:
    """A scene without things, all of it road."""
    scene = torch.zeros(1, 3, SIZE, SIZE)
    scene[:, 1], scene[:, 2] = 1.0, speed
    return scene


def some_scene(seed: int) -> torch.Tensor:
    draws = torch.Generator().manual_seed(seed)
    scene = empty(float(torch.rand(1, generator=draws)))
    for _ in range(4):
        row, column = torch.randint(4, SIZE - 12, (2,), generator=draws).tolist()
        scene[0, 0, row : row + 4, column : column + 6] = 1.0
    scene[0, 1, :, : int(torch.randint(8, 24, (1,), generator=draws))] = 0.0
    return scene


def test_trajectories_are_what_their_speed_and_curvature_integrate_to():
    words, small = vocabulary(), 4000
    step = words.speeds[:, None].double() * SECONDS / small
    middles = (torch.arange(small).double() + 0.5) * step
    angle = words.curvatures[:, None].double() * middles
    ways = torch.stack([angle.sin(), angle.cos()], dim=-1) * step[..., None]
    ends = ways.cumsum(1)[:, small // 20 - 1 :: small // 20]
    torch.testing.assert_close(words.points.double(), ends, rtol=0, atol=1e-4)


def test_a_thing_is_hit_from_as_near_as_the_car_is_wide():
    scene, pixel = empty(), METRES / SIZE
    row, column = 30, 36
    scene[0, 0, row, column] = 1.0
    where = torch.tensor([(column + 0.5) * pixel - METRES / 2, METRES - (row + 0.5) * pixel])
    words = vocabulary()
    nearest = (words.points - where).norm(dim=-1).amin(-1)
    free = judge(scene).collision[0].bool()
    # the footprint is a square of pixels around each point
    assert (nearest[free] > RADIUS - pixel).all() and (nearest[~free] < 2 * RADIUS + pixel).all()
    assert 0 < int((~free).sum()) < len(free)


def test_scores_of_a_mirrored_scene_are_those_of_mirrored_trajectories():
    for seed in range(5):
        scene = some_scene(seed)
        for ours, mirrored in zip(judge(scene), judge(scene.flip(-1)), strict=True):
            again = mirrored.view(1, SPEEDS, CURVATURES).flip(-1).flatten(1)
            assert (ours - again).abs().gt(1e-6).float().mean() < 0.05  # points on pixels' edges


def test_another_thing_never_makes_a_trajectory_safer():
    for seed in range(5):
        scene = some_scene(seed)
        more = scene.clone()
        more[0, 0, 20:30, 20:30] = 1.0
        before, after = judge(scene), judge(more)
        for name in ("collision", "ttc"):
            assert (getattr(after, name) <= getattr(before, name)).all()
        assert (before.ttc <= before.collision).all()


def test_comfort_knows_the_cars_speed():
    slow, fast = judge(empty(0.2)).comfort[0], judge(empty(1.0)).comfort[0]
    words = vocabulary()
    assert slow[words.speeds <= 3].any() and not slow[words.speeds > 4].any()
    assert fast[words.speeds > 6].any() and not fast[words.speeds < 5].any()


def test_the_driver_takes_what_all_rules_like_best():
    scene = some_scene(3)
    taken = drive(scene)
    total = judge(scene).total()
    assert total[0, taken] == total.max()
    human = open_teacher(f"rule:plan-human@{SIZE}")(Batch(scene)).summary
    assert human is not None and human.argmax(-1) == taken
    torch.testing.assert_close(human.sum(-1), torch.ones(1))


@pytest.mark.parametrize("rule", Scores._fields)
def test_each_rule_is_a_teacher_without_a_map(rule: str):
    teacher = open_teacher(f"rule:plan-{rule}@{SIZE}")
    assert (teacher.summary_dim, teacher.spatial_dim) == (SPEEDS * CURVATURES, None)
    found = teacher(Batch(some_scene(1))).summary
    assert found is not None
    torch.testing.assert_close(found, getattr(judge(some_scene(1)), rule))
