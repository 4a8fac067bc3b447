from dataclasses import replace

import numpy as np
import pytest
import torch

from zoo.data.plan import Plan
from zoo.features import Batch
from zoo.layers.vitdet import VitDet
from zoo.students.build import build_student
from zoo.students.student import MESA
from zoo.teachers.open import open_teacher
from zoo.train.distill.config import Distill, Losses, TeacherSpec
from zoo.train.distill.plan_step import (
    STUDENT,
    StepPlan,
    check_step_plans,
    drawn_size,
    drawn_teachers,
    drawn_window,
    grids_of,
    plan_step,
    view_of,
)
from zoo.train.distill.setup import check_names
from zoo.train.distill.sizes import every_size

RUN = Distill(
    teachers=(
        TeacherSpec(name="rule:colour@64"),
        TeacherSpec(name="rule:edges@96", rate=0.3),
    ),
    student="eradio_nano",
    size=64,
    sizes=(64, 96, 128),
)
PLAN = Plan(100, 8, seed=5)


@pytest.fixture(scope="module")
def teachers():
    return {s.name[5:].partition("@")[0]: open_teacher(s.name) for s in RUN.teachers}


def planned(plan, step, position, config, teachers):
    positions = position + np.arange(plan.batch)
    return plan_step(plan, step, positions, config, teachers, grids_of(config))


def checked(config, teachers):
    check_step_plans(config, teachers, grids_of(config))


def test_a_step_is_planned_by_seed_step_and_position_alone(teachers):
    shifting = replace(RUN, losses=Losses(shift=2, mesa=1.0))
    plans = [planned(PLAN, step, 8 * step, shifting, teachers) for step in range(30)]
    assert plans == [planned(PLAN, step, 8 * step, shifting, teachers) for step in range(30)]
    other = replace(PLAN, seed=6)
    assert plans != [planned(other, step, 8 * step, shifting, teachers) for step in range(30)]
    assert set(plans[0].windows) == {STUDENT, "colour", "edges", MESA}


def test_windows_follow_the_position_so_that_views_that_come_again_are_seen_alike(teachers):
    shifting = replace(RUN, sizes=(), losses=Losses(shift=2))
    again = replace(PLAN, views=1)  # 100 samples: position 108 is 8 once more
    first, later = (planned(again, s, p, shifting, teachers) for s, p in ((1, 8), (13, 108)))
    assert first.windows == later.windows
    assert first.windows != planned(again, 1, 12, shifting, teachers).windows  # another slice


def test_the_slices_of_a_batch_have_the_windows_of_the_whole(teachers):
    shifting = replace(RUN, sizes=(), losses=Losses(shift=2))
    whole, *halves = (
        plan_step(PLAN, 1, part, shifting, teachers, grids_of(shifting)).windows
        for part in (np.arange(8, 16), np.arange(8, 12), np.arange(12, 16))
    )
    for who, (rows, cols) in whole.items():
        assert halves[0][who][0].starts + halves[1][who][0].starts == rows.starts
        assert halves[0][who][1].starts + halves[1][who][1].starts == cols.starts
    assert len(set(whole[STUDENT][0].starts)) > 1  # one window for each image, not for the batch


def test_each_step_draws_windows_that_tile_its_grid_for_all_of_its_slices():
    windows = (0, 0, 2, 4, 3)
    run = replace(RUN, sizes=(), attention_windows=windows)
    drawn = [drawn_window(PLAN, step, run, (8, 8)) for step in range(4000)]
    assert set(drawn) == {0, 2, 4}  # 3 tiles no grid of 8
    assert [drawn.count(w) / 4000 for w in (0, 2, 4)] == pytest.approx([0.5, 0.25, 0.25], abs=0.03)
    assert drawn_window(PLAN, 1, replace(run, attention_windows=(3,)), (8, 8)) == 0


def test_a_student_attends_in_the_windows_of_its_step_and_then_as_it_was_built():
    options = dict(embed_dim=32, depth=8, num_heads=2, crop_positions=False, pos_dropout=0.0)
    student = build_student("radio_vit_base_patch16", {"a": (4, 4)}, size=64, options=options)
    with torch.no_grad():
        for block in student.backbone.blocks:
            block.attn.qkv.weight.mul_(30)  # attention that tells who attends to whom
    batch = Batch(torch.rand(2, 3, 64, 64))
    found = {
        w: StepPlan(64, None, attention=w).student(student.eval(), mesa=False)(batch)["a"].spatial
        for w in (0, 2, 4)
    }
    assert student.backbone.vitdet is None
    assert (found[0] - found[2]).abs().max() > 1e-3
    student.backbone.vitdet = VitDet(2, num_global=4)
    torch.testing.assert_close(student(batch)["a"].spatial, found[2])


def test_windows_that_no_step_could_have_are_refused(teachers):
    with pytest.raises(ValueError, match=r"attention_windows: 5 tiles none.*4x4, 6x6, 8x8"):
        checked(replace(RUN, attention_windows=(0, 2, 5)), teachers)
    with pytest.raises(ValueError, match=r"eradio_nano cannot attend in windows"):
        check_names(replace(RUN, attention_windows=(2,)))


def test_every_size_is_drawn_about_as_often():
    drawn = [drawn_size(PLAN, step, RUN) for step in range(3000)]
    assert all(abs(drawn.count(size) - 1000) < 100 for size in RUN.sizes)
    alone = replace(RUN, sizes=())
    assert {drawn_size(PLAN, step, alone) for step in range(50)} == {64}


def test_a_teacher_is_sampled_at_its_rate_and_the_others_always():
    asked = [drawn_teachers(PLAN, step, RUN) for step in range(3000)]
    assert all("colour" in some for some in asked)
    assert sum("edges" in some for some in asked) / 3000 == pytest.approx(0.3, abs=0.03)
    always = replace(RUN, teachers=(RUN.teachers[0],))
    assert drawn_teachers(PLAN, 0, always) is None


def test_a_teacher_of_one_size_is_sampled_in_the_steps_of_that_size():
    colour = replace(RUN.teachers[0], at=96)
    run = replace(RUN, teachers=(colour, RUN.teachers[1]))
    for step in range(200):
        at_96 = drawn_size(PLAN, step, run) == 96
        assert ("colour" in drawn_teachers(PLAN, step, run)) == at_96
    with pytest.raises(ValueError, match="is sampled at 32 px, and the student is at 64, 96, 128"):
        replace(RUN, teachers=(replace(colour, at=32),))
    assert TeacherSpec.parse(colour.describe()) == colour


def test_a_teacher_that_is_not_sampled_is_not_called(teachers):
    steps = [step for step in range(40) if "edges" not in drawn_teachers(PLAN, step, RUN)]
    assert set(planned(PLAN, steps[0], 0, RUN, teachers).teachers(teachers)) == {"colour"}


def test_images_are_decoded_for_the_largest_canvas(teachers):
    assert view_of(RUN, teachers, grids_of(RUN)).size == 128
    still = replace(RUN, sizes=())
    assert view_of(still, teachers, grids_of(still)).size == 96
    shifted = replace(still, losses=Losses(shift=1))
    assert view_of(shifted, teachers, grids_of(shifted)).size == 96 + 96 // (
        64 // 16
    )  # a cell of 16 px more
    assert [t.size for t in every_size(teachers["edges"])] == [(96, 96)]


def test_a_size_that_the_student_cannot_take_is_refused_before_any_work():
    with pytest.raises(ValueError, match=r"eradio_nano.* cannot look at 100 px.*another size"):
        grids_of(replace(RUN, sizes=(64, 100)))


def test_a_shift_that_leaves_too_little_in_common_is_refused(teachers):
    with pytest.raises(ValueError, match=r"losses.shift 9 would leave less.*at most"):
        checked(replace(RUN, losses=Losses(shift=9)), teachers)


def test_a_teacher_whose_cells_are_no_whole_pixels_cannot_be_shifted(teachers):
    odd = open_teacher("rule:colour@64")
    odd.grid = (5, 5)
    with pytest.raises(ValueError, match=r"whole cells, and the 5x5 cells of odd at 64x64 px"):
        checked(replace(RUN, sizes=(), losses=Losses(shift=1)), {"odd": odd})
