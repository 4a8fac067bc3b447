"""Targets have the variance that calibration promises, on the grid on which they are compared."""

from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from zoo.data.feed import ImageFeed
from zoo.data.plan import Plan
from zoo.features import Features
from zoo.train.distill.calibrate import FILE, Calibration, Statistics, fit_normalizers
from zoo.train.distill.config import Distill, Losses, TeacherSpec
from zoo.train.distill.losses import mse
from zoo.train.distill.phi_s import KINDS, fit
from zoo.train.distill.setup import Setup, new_student, prepare
from zoo.train.distill.task import DistillTask
from zoo.train.run import Run


@pytest.mark.parametrize("kind", KINDS)
def test_the_baseline_of_a_map_is_what_the_best_constant_guess_would_lose(kind):
    x = torch.randn(2000, 8, dtype=torch.float64) @ torch.randn(8, 8, dtype=torch.float64) * 3 + 5
    found = Statistics()
    found.add("a", 32, Features(None, x.view(20, 10, 10, 8)))
    normalizers = {"a": fit(kind, found.moments["a", 32])}
    baseline = found.baseline_losses(normalizers, 32)["a/spatial"]
    target = normalizers["a"](x)
    lost = mse(target.mean(0).expand_as(target), target)
    torch.testing.assert_close(baseline, lost * 2000 / 1999)
    if kind in ("phi_s", "alpha_only", "standardize"):
        torch.testing.assert_close(baseline, torch.ones_like(baseline))


MODULE = """
from torch import nn
from zoo.features import Features

class Fine(nn.Module):
    def forward(self, x):
        x = nn.functional.avg_pool2d(x, 4).permute(0, 2, 3, 1)
        return Features(None, x @ x.new_tensor([[1, 0, 2, 1], [0, 5, -1, 1], [3, 0, 1, 1]]) + 7)

def fine():
    return Fine()
"""


def run_of(folder, **changes) -> Distill:
    """A teacher of 16 x 16 cells for a student of 8 x 8, and of 2 x 2 at its other size."""
    (folder / "images").mkdir()
    draws = np.random.default_rng(0)
    for i in range(40):  # blocks of all sizes, so that averages over more cells vary less
        pixels = sum(
            np.kron(draws.normal(0, 30, (2**k, 2**k, 3)), np.ones((64 >> k, 64 >> k, 1)))
            for k in range(7)
        )
        image = Image.fromarray((128 + pixels).clip(0, 255).astype(np.uint8))
        image.save(folder / "images" / f"{i:02d}.png")
    (folder / "fine_teacher.py").write_text(MODULE)
    config = Distill(
        data=str(folder / "images"), student="test_vit", size=128, sizes=(128, 32), batch=12,
        teachers=(TeacherSpec(name="torch:fine_teacher.fine@64"),), calibration=12,
        device="cpu", out=folder / "run",
    )  # fmt: skip
    return replace(config, **changes)


def lost_by_a_constant_guess(setup: Setup, calibration, steps: int = 16):
    """Return the mean losses by (name, size), over views that calibration has not seen."""
    config = setup.config
    student: Any = new_student(setup, calibration.normalizers).eval()
    for head in student.heads.values():
        torch.nn.init.zeros_(head.spatial.last.weight)
        torch.nn.init.zeros_(head.spatial.last.bias)
    plan = Plan(len(setup.train), config.batch, seed=config.seed)
    task = DistillTask.of(config, student, plan, setup.teachers, calibration, setup.grids)
    state: Any = SimpleNamespace(model=student, ema=None)
    found = defaultdict(list)
    batches = ImageFeed(setup.train, setup.view, plan, setup.device).batches(0, steps)
    with torch.no_grad():
        for step, batch in enumerate(batches):
            size = task.planned(batch, step).size
            losses = task.losses(state, batch, task.targets(batch, step), step)
            for name, loss in losses.items():
                found[name, size].append(loss.total.sum().item() / loss.count)
    return {key: sum(values) / len(values) for key, values in found.items()}


@pytest.mark.parametrize("shift", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_constant_guess_loses_the_baseline_on_the_compared_grid_at_every_size(
    tmp_path, monkeypatch, shift
):
    monkeypatch.syspath_prepend(tmp_path)
    setup = prepare(run_of(tmp_path, losses=Losses(shift=shift)))
    calibration = fit_normalizers(Run.create(setup.config), setup)["phi_s"]
    lost = lost_by_a_constant_guess(setup, calibration)
    assert calibration.baseline_losses["fine/spatial"] == pytest.approx(1)
    for size in (128, 32):
        assert lost["fine/spatial", size] == pytest.approx(1, abs=0.1)
    natively = Statistics()  # as if each map were compared on the teacher's own grid
    feed = ImageFeed(setup.train, setup.view, Plan(40, 12, seed=1), setup.device)
    for batch in feed.batches(0, 12):
        natively.add("fine", 128, setup.teachers["fine"](batch))
    normalizers = {"fine": fit("phi_s", natively.moments["fine", 128])}
    before = lost_by_a_constant_guess(setup, Calibration(normalizers, {}, {}))
    assert before["fine/spatial", 128] < 0.9 and before["fine/spatial", 32] < 0.5


def test_a_run_reads_its_calibration_again_and_refuses_that_of_an_earlier_version(
    tmp_path, monkeypatch
):
    monkeypatch.syspath_prepend(tmp_path)
    setup = prepare(run_of(tmp_path, compare=("none",), calibration=1))
    run = Run.create(setup.config)
    first, again = fit_normalizers(run, setup), fit_normalizers(run, setup)
    for kind in ("phi_s", "none"):
        assert again[kind].gains == first[kind].gains and set(first[kind].gains) == {("fine", 32)}
        weights = (found[kind].normalizers["fine"].weight for found in (first, again))
        assert torch.equal(*weights)
    tensors = load_file(run.path / FILE)
    earlier = {k: v for k, v in tensors.items() if not k.startswith(("grid/", "gain/"))}
    save_file(earlier, run.path / FILE)
    with pytest.raises(ValueError, match=r"earlier version, on the teachers' own grids.*--out"):
        fit_normalizers(run, setup)


def test_sizes_that_calibration_has_no_batch_for_are_refused():
    with pytest.raises(
        ValueError, match=r"calibration is 1 batches, and 2 sizes .*--calibration 2"
    ):
        Distill(size=64, sizes=(32, 64, 96), calibration=1)
