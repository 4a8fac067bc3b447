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
from zoo.features import Features, match_grid
from zoo.train.distill.calibrate import FILE, Calibration, Statistics, fit_normalizers
from zoo.train.distill.config import Distill, Losses, TeacherSpec
from zoo.train.distill.losses import SPATIAL_LOSSES, angle, mse, summary_loss
from zoo.train.distill.phi_s import KINDS, fit
from zoo.train.distill.setup import Setup, new_student, prepare
from zoo.train.distill.task import DistillTask, terms_of
from zoo.train.distill.weighting import Weighting
from zoo.train.run import Run


@pytest.mark.parametrize("kind", KINDS)
def test_the_baseline_of_a_map_is_what_the_best_constant_guess_would_lose(kind):
    x = torch.randn(2000, 8, dtype=torch.float64) @ torch.randn(8, 8, dtype=torch.float64) * 3 + 5
    found = Statistics()
    found.add("a", 32, Features(None, x.view(20, 10, 10, 8)))
    normalizers = {"a": fit(kind, found.moments["a", 32])}
    baseline = found.baseline_losses(normalizers, 32, Losses())["a/spatial"]
    target = normalizers["a"](x)
    lost = mse(target.mean(0).expand_as(target), target)
    torch.testing.assert_close(baseline, lost * 2000 / 1999)
    if kind in ("phi_s", "alpha_only", "standardize"):
        torch.testing.assert_close(baseline, torch.ones_like(baseline))


@pytest.mark.parametrize(
    ("losses", "lost"),
    [
        # every token is 3 from the mean: by hand, in units of the targets
        (Losses(spatial="mse"), 9.0),
        (Losses(spatial="smooth_l1"), 3 - 0.5),
        (Losses(spatial="smooth_l1", beta=4.0), 9 / 8),
        (Losses(spatial="hybrid", hybrid=(0.0, 0.1)), 0.25),
        # at right angles to one another, and the guess between them: 1 - cos 45°
        (Losses(spatial="hybrid", hybrid=(1.0, 0.0)), 1 - 0.5**0.5),
    ],
)
def test_the_baseline_is_what_a_constant_guess_loses_in_that_loss(losses, lost):
    tokens = torch.tensor([[6.0, 0.0], [0.0, 6.0]]).repeat(500, 1)
    found = Statistics()
    found.add("a", 32, Features(None, tokens.view(10, 10, 10, 2)))
    normalizers = {"a": fit("none", found.moments["a", 32])}
    baseline = found.baseline_losses(normalizers, 32, losses)["a/spatial"].item()
    assert baseline == pytest.approx(lost, rel=2e-3)  # a variance is over n - 1


@pytest.mark.parametrize("spatial", ["mse", "smooth_l1", "hybrid"])
@pytest.mark.parametrize("summary", ["cosine", "angle"])
def test_with_dispersion_weighting_a_constant_guess_loses_one_from_every_teacher(spatial, summary):
    """Two teachers that say the same in units a hundred times apart, on their own scale."""
    losses = Losses(spatial=spatial, summary=summary, weighting="dispersion")
    seed, found = torch.Generator().manual_seed(0), Statistics()
    maps = torch.randn(40, 8, 8, 16, generator=seed) + 1
    vectors = torch.randn(40, 12, generator=seed) + 1
    answers = {f"{k}": Features(vectors * k, maps * k) for k in (1, 100)}
    for label, answer in answers.items():
        found.add(label, 32, answer)
    normalizers = {label: fit("none", found.moments[label, 32]) for label in answers}
    baselines = found.baseline_losses(normalizers, 32, losses)
    baselines = {name: value.item() for name, value in baselines.items()}
    specs = {label: TeacherSpec(name=f"rule:{label}") for label in answers}
    for label, (y, x) in answers.items():
        direction = torch.nn.functional.normalize(y, dim=-1).mean(0).expand_as(y)
        distance = summary_loss(direction, y)
        if summary == "angle":
            distance = angle(y.mean(0).expand_as(y), y, dispersion=baselines[f"{label}/summary"])
        flat = x.flatten(0, 2)
        values = [distance, SPATIAL_LOSSES[spatial](flat.mean(0).expand_as(flat), flat)]
        names = [f"{label}/summary", f"{label}/spatial"]
        for name, value in zip(names, values, strict=True):
            weigh = Weighting([name], specs, losses, baselines)
            assert weigh(value[None]).item() == pytest.approx(1, rel=0.02), name


def test_standardised_summaries_have_variance_one_in_every_channel_and_are_what_is_compared():
    """UNIC standardises the class token's target as well as the patches'."""
    found, seed = Statistics(), torch.Generator().manual_seed(0)
    y = torch.randn(500, 6, generator=seed) * torch.logspace(-1, 1, 6) + torch.arange(6.0)
    for part in y.split(100):
        found.add("a", 32, Features(part, None))
    assert found.summary_normalizers("none") == {}
    normalizers = found.summary_normalizers("standardize")
    target = normalizers["a/summary"](y)
    torch.testing.assert_close(target.var(0), torch.ones(6), rtol=1e-4, atol=0)
    torch.testing.assert_close(target.mean(0), torch.zeros(6), rtol=0, atol=1e-4)
    head = SimpleNamespace(summary=True, spatial=None)
    student: Any = SimpleNamespace(heads={"a": head})
    (term,) = terms_of(Distill(), student, normalizers, {})
    by_hand = [(value - y.mean(0)) / y.std(0) for value in y[:4]]
    guess = torch.stack([x.roll(1) for x in by_hand])
    cosines = [torch.dot(a, b) / a.norm() / b.norm() for a, b in zip(guess, by_hand, strict=True)]
    loss = term.loss(Features(guess, None), Features(y[:4], None), match_grid)
    torch.testing.assert_close(loss, 1 - torch.stack(cosines).mean(), rtol=1e-4, atol=0)


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
