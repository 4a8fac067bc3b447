import json

import numpy as np
import pytest
import torch
from PIL import Image

from zoo.cli import main
from zoo.experiments.phi_s.config import ARMS, PhiSExperiment, StudentSet, sets_of
from zoo.experiments.phi_s.result import report, verdict
from zoo.experiments.phi_s.run import PhiSSetup, Trainer, channel_errors
from zoo.features import Batch, Features, match_grid
from zoo.train.distill.losses import SPATIAL_LOSSES, summary_loss
from zoo.train.distill.phi_s import Moments, fit
from zoo.train.distill.step import distill_step, spatial_term, summary_term


@pytest.fixture
def folder(tmp_path):
    draws = np.random.default_rng(0)
    for split in ("train", "val"):
        for number in range(2):
            place = tmp_path / "images" / split / f"c{number}"
            place.mkdir(parents=True)
            for i in range(10):
                pixels = draws.integers(0, 120, (8, 8, 3)) + 120 * number
                image = Image.fromarray(pixels.astype(np.uint8)).resize((48, 48))
                image.save(place / f"{i}.png")
    return tmp_path / "images"


class Fake:
    """A teacher whose map is a fixed function of the image, at twice the students' grid."""

    summary_dim, spatial_dim, size, name = 8, 16, (32, 32), "fake"

    def __call__(self, batch):
        cells = torch.nn.functional.avg_pool2d(batch.images, 8).permute(0, 2, 3, 1)
        weights = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
        spatial = cells @ weights * torch.linspace(0.1, 3, 16) + 5
        return Features(spatial.mean((1, 2))[:, :8], spatial)


def setup(arms):
    teacher = Fake()
    moments = Moments(16)
    moments.update(teacher(Batch(torch.rand(64, 3, 32, 32))).spatial)
    normalizers = {arm: {"fake": fit(ARMS[arm].normalise, moments)} for arm in arms}
    config = PhiSExperiment(batch=4, size=32, device="cpu", precision="float32")
    return PhiSSetup(config, torch.device("cpu"), None, None, {"fake": teacher}, normalizers)


def test_the_stacked_losses_are_those_of_a_distillation_step():
    arms = ("none", "hybrid", "phi_s", "standardize")
    given = setup(arms)
    chosen = StudentSet("arms", arms, 2, 2, 4, dict(depth=1, embed_dim=16, num_heads=2), None)
    trainer = Trainer(given, chosen)
    stack = trainer.begin(range(2), steps=3)
    images = torch.rand(2, 4, 3, 32, 32)
    answers = stack.answers(images.repeat_interleave(len(arms), dim=0))
    losses = trainer.losses(answers, trainer.features(images), seeds=2)
    for m, loss in enumerate(losses):
        seed, arm = divmod(m, len(arms))
        batch, distance = Batch(images[seed]), SPATIAL_LOSSES[ARMS[arms[arm]].loss]
        normalizer = given.normalizers[arms[arm]]["fake"]
        terms = (summary_term("fake", summary_loss), spatial_term("fake", distance, normalizer))
        targets = {"fake": given.teachers["fake"](batch)}
        one = distill_step(batch, stack.student(m), targets, terms, lambda _: match_grid)
        want = sum(part.total / part.count for part in one.values())
        torch.testing.assert_close(loss, want, rtol=1e-4, atol=1e-5)


def test_all_arms_of_a_seed_begin_alike_and_seeds_do_not():
    given = setup(("none", "phi_s"))
    chosen = StudentSet(
        "arms", ("none", "phi_s"), 2, 2, 4, dict(depth=1, embed_dim=16, num_heads=2), 8
    )
    stack = Trainer(given, chosen).begin(range(2), steps=3)
    weights = stack.params["backbone.blocks.0.attn.qkv.weight"]
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[2], weights[3])
    assert not torch.equal(weights[0], weights[2])


def test_the_error_of_a_channel_is_measured_in_the_space_of_the_loss(tmp_path):
    given = setup(("phi_s",))
    teacher, normalizer = given.teachers["fake"], given.normalizers["phi_s"]["fake"]

    class Held:
        def batches(self, size, batch):
            yield Batch(torch.rand(32, 3, 32, 32, generator=torch.Generator().manual_seed(1)))

    def student(batch):
        z = normalizer(teacher(batch).spatial)
        noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(2))
        return {"fake": Features(None, normalizer.inverse(z + 0.5 * noise))}

    found = channel_errors(student, given.teachers, {"fake": normalizer}, Held(), 32)
    assert 0.2 < found["error/fake/low"] < found["error/fake/high"] < 0.3  # 0.5², everywhere


def test_the_full_experiment_is_the_one_that_was_planned():
    first, second = sets_of(PhiSExperiment())
    assert len(first.arms) == 9 and first.seeds == 5 and first.options["embed_dim"] == 192
    assert second.arms == ("phi_s", "alpha_only") and second.seeds == 16


def row(arm, seed, least):
    found = {f"fidelity/{name}": least for name in ("t", "min", "geomean")}
    found |= {"knn/top1/x": 50.0, "error/t/low": 0.1, "error/t/high": 0.2, "img_s": 100.0}
    return dict(set="arms", arm=arm, seed=seed, **found)


@pytest.mark.parametrize(
    ("none", "hybrid", "passed"), [(0.5, 0.9, True), (2.5, 0.9, False), (0.5, 2.0, False)]
)
def test_the_demo_fails_if_a_raw_arm_is_as_good_on_any_seed(none, hybrid, passed):
    rows = [row("phi_s", 0, 9.0), row("none", 0, 0.1), row("hybrid", 0, 0.1)]
    rows += [row("phi_s", 1, 2.0), row("none", 1, none), row("hybrid", 1, hybrid)]
    rows += [row("global", s, 99.0) for s in (0, 1)]  # the others do not count
    assert verdict(rows)["passed"] is passed


def test_a_report_of_finished_seeds_has_its_table_figure_and_reduced_steps(tmp_path, capsys):
    rows = [row(a, s, v + s) for a, v in (("phi_s", 9.0), ("alpha_only", 3.0)) for s in (0, 1)]
    about = dict(config=dict(batch=4, size=48, steps=9), steps=5, device="CPU", seconds=1.0)
    result = report(rows, about, tmp_path)
    page = (tmp_path / "result.md").read_text()
    assert "Reduced: 5 steps instead of 9" in page and "| alpha_only | 3.50 ± 0.71" in page
    assert result["paired"]["arms"]["alpha_only"]["fidelity/min"]["wins"] == 2
    assert json.loads((tmp_path / "result.json").read_text())["rows"] == rows
    assert all((tmp_path / f"phi_s.{kind}").stat().st_size > 5000 for kind in ("png", "svg"))
    assert "rotation alone" in capsys.readouterr().out


@pytest.mark.slow
def test_the_tiny_experiment_runs_from_the_command_line(folder, tmp_path, capsys):
    out = tmp_path / "run"
    command = f"experiment phi_s --tiny --data {folder} --out {out} --device cpu --arms none phi_s"
    main([*command.split(), "--steps", "12", "--rotation-seeds", "1"])
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    assert [(r["set"], r["arm"], r["seed"]) for r in rows] == [
        ("arms", "none", 0), ("arms", "phi_s", 0), ("arms", "none", 1), ("arms", "phi_s", 1),
        ("rotation", "phi_s", 0), ("rotation", "alpha_only", 0),
    ]  # fmt: skip
    teachers = json.loads((out / "teachers.json").read_text())
    assert 0.01 < teachers["supervised"]["std"] < 0.1 and 2 < teachers["edges"]["std"] < 15
    assert teachers["edges"]["grid"] == [6, 6]  # twice the students'
    assert "knn/top1/images" in rows[0] and "minimum fidelity" in capsys.readouterr().out


@pytest.mark.slow
def test_the_dry_run_writes_nothing_and_counts_the_work(tmp_path, capsys):
    main(["experiment", "phi_s", "--dry-run", "--out", str(tmp_path / "run"), "--device", "cpu"])
    printed = capsys.readouterr().out
    assert "9 arms x 5 seeds" in printed and "PFLOP" in printed
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["phy_s"], "There is no experiment"),
        (["phi_s", "--arms", "phi_s", "alpha_onli"], "Did you mean alpha_only"),
        (["phi_s", "--arms", "none"], "phi_s is what the others are compared with"),
        (["phi_s", "--steps", "0"], "steps is 0"),
        (["phi_s", "--size", "90"], "multiple of the 16"),
        (["phi_s", "--tiny", "--data", "NOWHERE", "--out", "NEW"], "There is no data at NOWHERE"),
        (["students", "--families", "vitt"], "Did you mean vit"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_trained(
    args, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["experiment", *args])
    assert stop.value.code == 2 and message in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


def test_an_option_that_is_repeated_has_all_values():
    from zoo.commands.experiment import _gathered

    words = ["--data", "a", "--steps", "3", "--data=b", "c", "--tiny"]
    assert _gathered(words, "--data") == ["--steps", "3", "--tiny", "--data", "a", "b", "c"]
