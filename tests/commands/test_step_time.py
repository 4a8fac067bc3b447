"""Launching in `zoo plan`: the host beside the GPU, by hand and against a measured run."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from zoo.commands.cluster.models import Models
from zoo.commands.cluster.plan import column, notes
from zoo.commands.cluster.step_time import slice_launching, step_time
from zoo.train.cluster import GPUS
from zoo.train.distill.config import Distill, Losses, TeacherSpec
from zoo.train.distill.launching import Operators
from zoo.train.distill.speed import Speed

RUN = Distill(
    teachers=(
        TeacherSpec(name="timm:test_vit/random@64"),
        TeacherSpec(name="timm:test_vit2/random@64", rate=0.25),
    ),
    student="test_vit",
    size=64,
    batch=512,
    slices=16,
    steps=1000,
    speed="plain",
)
H200 = GPUS["h200"]
HOST = 20e-6
"""Seconds for a kernel that is launched by itself."""
GRAPHS = Speed(blocks=True, graphs=True, teachers=True)


@pytest.fixture(scope="module")
def models() -> Models:
    return Models.of(RUN)


def launched(models: Models) -> float:
    """Return the kernels of a slice of `RUN`, on average."""
    always, seldom = models.operators.teachers.values()
    return always + 0.25 * seldom + models.operators.student


@pytest.mark.parametrize("gpus", [1, 2, 16])
def test_each_slice_is_launched_by_itself_so_a_rank_with_fewer_of_them_is_sooner_done(gpus, models):
    found = column(RUN, models, gpus, H200)
    assert found.time.computing < found.time.launching  # 32 small images each
    assert found.step == pytest.approx(16 / gpus * HOST * launched(models) + found.waits)
    assert any("Launching is the limit" in line for line in notes(RUN, [found], "h200", H200))


def test_many_images_take_what_they_compute_and_few_what_they_launch(models):
    """The longer of the two, not their sum: a GPU computes while its host launches."""
    times = {}
    for batch in (16, 2**20):
        time = step_time(replace(RUN, batch=batch), models, 16, H200, Speed())
        assert time.seconds == max(time.computing, time.launching)
        times[batch] = time
    few, many = times.values()
    assert few.seconds == few.launching == many.launching
    assert many.seconds == many.computing == pytest.approx(2**16 * few.computing)


def test_graphs_launch_a_student_and_compilers_its_teachers_but_mesas_average_runs_plain(models):
    counted = models.operators.student
    alone = slice_launching(RUN, models.operators, GRAPHS, 64)
    assert alone == pytest.approx(1.8e-6 * counted)
    mesa = replace(models.operators, average=100)
    assert slice_launching(RUN, mesa, GRAPHS, 64) == pytest.approx(alone + 100 * HOST)
    whole = Speed(blocks=True)  # compiled, but launched kernel by kernel
    assert slice_launching(RUN, models.operators, whole, 64) == pytest.approx(
        HOST * launched(models)
    )


def test_where_the_size_is_drawn_each_size_waits_for_what_it_is_slower_in(models):
    """Half of the steps launch, and half compute: the mean of both, not the longer of two means."""
    sizes = replace(RUN, sizes=(32, 64), batch=2**20, batches=(16, 2**20))
    time = step_time(sizes, models, 16, H200, Speed())
    small = step_time(replace(RUN, size=64, batch=16), models, 16, H200, Speed())
    large = step_time(replace(RUN, size=64, batch=2**20), models, 16, H200, Speed())
    assert small.computing < small.launching and large.computing > large.launching
    assert time.seconds == pytest.approx((small.seconds + large.seconds) / 2)


def test_a_teacher_of_one_group_is_launched_in_that_group_alone(models):
    only = replace(RUN.teachers[0], at=64)
    split = replace(RUN, sizes=(32, 64), partition=(1, 1), teachers=(only, RUN.teachers[1]))
    count = next(iter(models.operators.teachers.values()))
    with_it, without = (slice_launching(split, models.operators, Speed(), n) for n in (64, 32))
    assert with_it - without == pytest.approx(HOST * count)
    assert step_time(split, models, 16, H200, Speed()).launching == pytest.approx(with_it)


def test_mesas_average_counts_once_more_forward():
    mesa = Models.of(replace(RUN, losses=Losses(mesa=1.0))).operators
    assert 0 < mesa.average < mesa.student / 2


def test_where_launching_is_slow_compiling_pays_sooner(models):
    run = replace(RUN, slices=1, batch=32, speed="auto", steps=30_000)
    quick = replace(models, operators=Operators({}, 0, 0))
    assert not column(run, quick, 1, H200).form.graphs
    assert 30_000 * HOST * launched(models) > 200
    assert column(run, models, 1, H200).form.graphs


@pytest.mark.slow
def test_a_run_that_was_measured_plain_and_in_graphs_is_planned_within_its_tolerance():
    """In-sample: its parts alone gave the constant and the shares, and a step is more than they."""
    results = Path(__file__).parents[2] / "benchmarks" / "results"
    measured = json.loads((results / "distill-speed-h200-2026-12-02.json").read_text())
    names = ("timm:efficientnet_lite0/random@224", "timm:efficientnet_lite2/random@260")
    run = Distill(
        teachers=tuple(TeacherSpec(name=name) for name in names),
        student="mambavision_t", size=160, batch=256, steps=4000,
    )  # fmt: skip
    models, speed = Models.of(run), dict[str, float]()
    for form in ("plain", "auto"):
        found = column(replace(run, speed=form), models, 1, H200)
        speed[form] = 256 / found.step
        assert found.form.graphs == (form == "auto")
    plain, auto = (measured[f"mamba {kind}"]["images_per_s"] for kind in ("plain", "warm"))
    assert 1 < speed["plain"] / plain < 1.5  # 2.3 when launching took no time
    assert 1 < speed["auto"] / auto < 1.25
    alone = measured["mamba parts"]["student"]["eager"] / 1e3
    assert HOST * models.operators.student == pytest.approx(alone, rel=0.25)
