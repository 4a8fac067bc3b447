"""Groups of slices with unequal resolutions and teachers of their own: what they minimise."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from zoo.data.feed import ImageFeed
from zoo.data.loader import PlanSampler
from zoo.data.plan import Plan
from zoo.features import match_grid
from zoo.train.config import Optim
from zoo.train.device import autocast
from zoo.train.distill.calibrate import Calibration
from zoo.train.distill.config import Distill, Group, TeacherSpec
from zoo.train.distill.plan_step import drawn_teachers, shared_counts, slice_size
from zoo.train.distill.setup import new_student, prepare
from zoo.train.distill.task import DistillTask
from zoo.train.loop import take_step
from zoo.train.prefetch import numbered, prefetch
from zoo.train.state import TrainState
from zoo.train.step import Ranks

RUN = Distill(
    teachers=(
        TeacherSpec(name="rule:colour@64", spatial=2.0),
        TeacherSpec(name="rule:edges@96", summary=0.0, at=96),
        TeacherSpec(name="rule:edges@64", at=64),
    ),
    student="test_vit",
    size=64,
    sizes=(64, 96),
    partition=(3, 1),
    slices=4,
    batch=8,
    normalise="none",
    device="cpu",
    precision="float64",
    optim=Optim(ema=0.0),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("partition")
    for i in range(20):
        pixels = np.random.default_rng(i).integers(0, 255, (100, 100, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02d}.png")
    return folder


def spoken(config, setup, student, plan):
    """Take one step; return the losses that it logs, and the gradients."""
    cuts = [g.images // g.slices for g in config.groups for _ in range(g.slices)]
    feed = ImageFeed(
        setup.train, setup.view, plan, setup.device, config.num_slices,
        cuts=cuts, counted=shared_counts(config),
    )  # fmt: skip
    plain = {label: nn.Identity() for label in config.labels}
    grids = setup.grids
    task = DistillTask.of(config, student, plan, setup.teachers, Calibration(plain, {}, {}), grids)
    state = TrainState.of(student, config.optim, parts=dict(weighting=task.weighting))

    def precision():
        return autocast(config.precision, setup.device)

    parts = prefetch(numbered(feed, 0, 1), task.targets, precision)
    losses = take_step(Ranks(task, state), state, parts, feed.counts(0), config, precision)
    gradients = [p.grad.clone() for p in student.parameters() if p.grad is not None]
    student.zero_grad(set_to_none=True)
    return losses, gradients


def test_a_step_minimises_each_teachers_mean_over_the_slices_that_have_it(folder):
    """By hand: over W slices r, 1/W sum_r sum_t (W / R_t) mean_r l_t, for t of the slice's size."""
    config = replace(RUN, data=str(folder))
    setup = prepare(config)
    student, plan = new_student(setup, {}), Plan(len(setup.train), config.batch, config.seed)
    losses, gradients = spoken(config, setup, student, plan)

    slices = ImageFeed(setup.train, setup.view, plan, setup.device, 4).batches(0, 1)
    colour, fine, coarse = setup.teachers.values()
    of_slice = dict.fromkeys(range(3), ((colour, 4), (coarse, 3))) | {3: ((colour, 4), (fine, 1))}
    labels = {id(t): label for label, t in setup.teachers.items()}
    total, means = torch.zeros((), dtype=torch.float64), {}
    for r, batch in enumerate(slices):
        size = 96 if r == 3 else 64
        answers = student(batch, size=(size, size))
        for teacher, owners in of_slice[r]:
            label, target = labels[id(teacher)], teacher(batch)
            ours, theirs = match_grid(answers[label].spatial, target.spatial)
            found = {"spatial": F.mse_loss(ours, theirs)}
            if answers[label].summary is not None:
                cosine = F.cosine_similarity(answers[label].summary, target.summary, dim=-1)
                found["summary"] = (1 - cosine).mean()
            for part, value in found.items():
                weight = 2 if (label, part) == (labels[id(colour)], "spatial") else 1
                total = total + weight * (4 / owners) * value / 4
                name = f"{label}/{part}"
                means[name] = means.get(name, 0) + value.detach() / owners
    assert losses.keys() == {"loss", *means}
    for name, value in means.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(losses["loss"], total.detach(), rtol=1e-12, atol=1e-12)
    total.backward()
    theirs = [p.grad for p in student.parameters() if p.grad is not None]
    torch.testing.assert_close(gradients, theirs, rtol=1e-10, atol=1e-12)


def test_groups_of_unequal_batches_weigh_each_image_of_a_teacher_alike(folder):
    config = replace(RUN, data=str(folder), batches=(6, 2), partition=(1, 1), slices=2)
    assert config.groups == (Group(64, 1, 6), Group(96, 1, 2))
    assert shared_counts(config) == {
        "colour/summary": 8, "colour/spatial": 8, "edges/summary": 2, "edges/spatial": 2,
        "edges_2/summary": 6, "edges_2/spatial": 6,
    }  # fmt: skip
    parts = list(PlanSampler(Plan(20, 8, 0), 0, 1, 2, (0, 1), (6, 2)))
    assert [[position for position, _ in part] for part in parts] == [[*range(6)], [6, 7]]
    plan = Plan(20, 8, 0)
    assert [slice_size(plan, 3, p, config) for p in (24, 29, 30, 31)] == [64, 64, 96, 96]
    assert drawn_teachers(plan, 3, config, 96) == {"colour", "edges"}
    assert drawn_teachers(plan, 3, config, 64) == {"colour", "edges_2"}


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (dict(partition=(3, 1, 1)), "give --partition one number for each of two or more --sizes"),
        (dict(sizes=(), teachers=RUN.teachers[:1]), "for the sizes"),
        (dict(slices=2), "start 4 processes, or give --slices 4, which fewer processes take"),
        (dict(batches=(6, 3)), "add up to batch, which is 8, and split into the slices"),
        (dict(batches=(7, 1)), "which are 3, 1"),
        (
            dict(teachers=(TeacherSpec(name="timm:test_vit/random@64", at=96, place="shard"),)),
            "is cut over all processes",
        ),
    ],
)
def test_a_partition_that_nobody_can_share_out_is_refused(changes, match):
    with pytest.raises(ValueError, match=match):
        replace(RUN, **changes)


def test_fewer_processes_than_groups_are_refused_before_any_work(folder):
    config = replace(RUN, data=str(folder), slices="auto")
    with pytest.raises(
        ValueError, match=r"a batch has 1 \(--slices auto is the number of processes"
    ):
        prepare(config)
