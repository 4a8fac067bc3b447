"""Slices of a batch: order does not matter, and what is not random adds up to the whole batch."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from zoo.data.feed import ImageFeed
from zoo.data.plan import Plan
from zoo.train.config import Optim
from zoo.train.distill.calibrate import Calibration
from zoo.train.distill.config import Distill, Losses, TeacherSpec
from zoo.train.distill.setup import new_student, prepare
from zoo.train.distill.task import DistillTask
from zoo.train.loop import train
from zoo.train.run import Run
from zoo.train.slices import SliceBuffers, SliceSeeds, slice_seed
from zoo.train.state import TrainState


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slices")
    for i in range(20):
        pixels = np.random.default_rng(i).integers(0, 255, (70, 70, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02d}.png")
    return folder


def config(images, out, student: str, **changes) -> Distill:
    settings = dict(
        data=str(images),
        teachers=(TeacherSpec(name="rule:colour@64"), TeacherSpec(name="rule:edges@64", summary=0)),
        student=student,
        size=64,
        batch=8,
        slices=4,
        steps=5,
        normalise="none",
        out=out,
        device="cpu",
        precision="float64",
        losses=Losses(weighting="adaloss"),
        optim=Optim(lr=3e-3, ema=0.5, drop_path=0.3, clip=0.5),
    )
    return Distill(**(settings | changes))


def trained(config: Distill, order=()) -> TrainState:
    """Train, taking the slices of each batch in `order`."""
    setup = prepare(config)
    student = new_student(setup, {})
    plan = Plan(len(setup.train), config.batch, config.seed)
    feed = ImageFeed(setup.train, setup.view, plan, setup.device, config.num_slices, order)
    plain = {label: nn.Identity() for label in config.labels}
    task = DistillTask.of(
        config, student, plan, setup.teachers, Calibration(plain, {}, {}), setup.grids
    )
    state = TrainState.of(student, config.optim, parts=dict(weighting=task.weighting))
    train(task, state, feed, config, Run.create(config))
    return state


def largest_gap(ours: TrainState, theirs: TrainState) -> float:
    pairs = zip(ours.model.state_dict().items(), theirs.model.state_dict().values(), strict=True)
    return max((a.double() - b.double()).abs().max().item() for (_, a), b in pairs)


@pytest.mark.slow
@pytest.mark.parametrize("student", ["eradio_nano", "test_vit"])
def test_slices_in_another_order_give_the_same_parameters_and_statistics(student, images, tmp_path):
    first = trained(config(images, tmp_path / "a", student))
    other = trained(config(images, tmp_path / "b", student), order=(2, 0, 3, 1))
    assert largest_gap(first, other) < 1e-12
    damped = Optim(lr=3e-3, ema=0.5, drop_path=0.3, clip=0.5, damp=0.05)
    first = trained(config(images, tmp_path / "c", student, optim=damped))
    other = trained(config(images, tmp_path / "d", student, optim=damped), order=(3, 2, 1, 0))
    assert largest_gap(first, other) < 1e-12


@pytest.mark.slow
def test_slices_draw_for_themselves(images, tmp_path):
    """Four slices and one differ with drop path, and agree without it in a ViT."""
    still = Optim(lr=3e-3, ema=0.5, drop_path=0.0, clip=0.5)
    for optim, alike in ((still, True), (replace(still, drop_path=0.3), False)):
        runs = [
            trained(config(images, tmp_path / f"{alike}{n}", "test_vit", slices=n, optim=optim))
            for n in (1, 4)
        ]
        assert (largest_gap(*runs) < 1e-12) == alike


@pytest.mark.slow
def test_a_spectral_students_slices_take_one_power_step_together(images, tmp_path):
    still = Optim(lr=3e-3, ema=0.0, drop_path=0.0)
    settings = dict(optim=still, spectral=True)
    runs = [
        trained(config(images, tmp_path / str(n), "test_vit", slices=n, **settings)) for n in (1, 2)
    ]
    assert largest_gap(*runs) < 1e-12


def test_running_statistics_move_once_by_the_mean_over_the_slices():
    norm = nn.BatchNorm1d(3, momentum=0.1).double()
    x = torch.randn(4, 5, 3, dtype=torch.float64)
    buffers = SliceBuffers(norm)
    for step in range(2):
        before = norm.running_mean.clone()
        buffers.begin_step()
        for part in x:
            norm(part + step)
            buffers.end_slice()
        buffers.end_step(len(x))
        expected = 0.9 * before + 0.1 * (x + step).mean((0, 1))
        torch.testing.assert_close(norm.running_mean, expected, rtol=0, atol=1e-15)
        assert norm.num_batches_tracked == step + 1
    spread = x.var(1).mean(0)
    expected = 0.9 * (0.9 + 0.1 * spread) + 0.1 * spread
    torch.testing.assert_close(norm.running_var, expected, rtol=0, atol=1e-15)


def test_slice_0_goes_on_behind_what_all_slices_share():
    def drawn(order):
        seeds = SliceSeeds(seed=3, step=5, device=torch.device("cpu"))
        shared = torch.rand(2)
        seeds.keep()
        values = {}
        for index in order:
            seeds.begin(index)
            values[index] = torch.rand(2)
        return shared, values

    (shared, first), (again, other) = drawn((0, 1, 2)), drawn((2, 1, 0))
    assert torch.equal(shared, again)
    assert all(torch.equal(first[i], other[i]) for i in first)
    torch.manual_seed(slice_seed(3, 5, 0))
    assert torch.equal(torch.rand(4), torch.cat([shared, first[0]]))
