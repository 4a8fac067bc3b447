"""What a run would cost: counted without its weights."""

from dataclasses import replace

import pytest

from zoo.train.distill.config import Distill, TeacherSpec
from zoo.train.distill.plan_cost import image_flops, model_costs

RUN = Distill(
    teachers=(
        TeacherSpec(name="timm:test_vit/random@64"),
        TeacherSpec(name="timm:test_vit2/random@64", rate=0.25),
    ),
    student="test_vit",
    size=64,
)


def test_a_teacher_counts_by_its_rate_and_sizes_by_their_pixels():
    (always, seldom), student, _ = model_costs(RUN)
    count = lambda run: image_flops(run, [always, seldom], student)  # noqa: E731
    own = always.flops + 0.25 * seldom.flops
    assert count(RUN) == pytest.approx(own + 3 * student.flops)
    sizes = replace(RUN, sizes=(64, 128))
    assert count(sizes) == pytest.approx(own + 3 * 2.5 * student.flops)
    late = replace(RUN.teachers[0], at=128)
    uneven = replace(sizes, batch=32, batches=(24, 8), teachers=(late, RUN.teachers[1]))
    assert count(uneven) == pytest.approx(
        0.25 * always.flops + 0.25 * seldom.flops + 3 * (0.75 + 0.25 * 4) * student.flops
    )
    first = replace(RUN.teachers[0], follow=True)
    follows = replace(sizes, teachers=(first, RUN.teachers[1]))
    assert count(follows) == pytest.approx(count(sizes) + 1.5 * always.flops)
