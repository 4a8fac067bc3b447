"""A whole run in small: it learns, it resumes to the bit, and it refuses what it should."""

import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from zoo.commands.distill.args import main
from zoo.commands.distill.run import better_form, distill
from zoo.eval.report.run_folder import read_run
from zoo.eval.report.verdict import on_weights
from zoo.students.export import load_export
from zoo.train.checkpoint import read_checkpoint
from zoo.train.config import Augment, Every, Optim
from zoo.train.distill.config import Distill, Heads, Losses, TeacherSpec
from zoo.train.distill.setup import prepare
from zoo.train.interrupt import Interrupted
from zoo.train.run import Run

MODULES = '''
import os, signal
import torch
from torch import nn
from zoo.features import Features

class Rule(nn.Module):
    """Pooled colours, and what is brighter than its neighbours."""
    def __init__(self, scale=1.0):
        super().__init__()
        torch.manual_seed(3)
        self.conv = nn.Conv2d(3, 8, 8, 8)
        self.scale = scale
    def forward(self, x):
        x = self.scale * self.conv(x)
        return Features(x.mean((2, 3)), x.permute(0, 2, 3, 1))

def colours():
    return Rule()

def loud():
    return Rule(30.0)

class Sick(Rule):
    def forward(self, x):
        seen = super().forward(x)
        if len(x) > 1:  # sound on the one black image that it is introduced with
            seen.spatial[0, 0, 0, 0] = float("nan")
        return seen

def sick():
    return Sick()

class Stopper(Rule):
    """Sends the signal that the environment names, at the call that it names."""
    calls = 0
    def forward(self, x):
        Stopper.calls += 1
        if Stopper.calls == int(os.environ.get("STOP_AT", 0)):
            os.kill(os.getpid(), int(os.environ["STOP_WITH"]))
        return super().forward(x)

def stopper():
    Stopper.calls = 0
    return Stopper()

class Late(Rule):
    """Turns to NaN after the calibration and a few steps."""
    calls = 0
    def forward(self, x):
        Late.calls += 1
        return super().forward(x * float("nan") if Late.calls > 12 else x)

def late():
    Late.calls = 0
    return Late()
'''


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with images of two classes, and an importable module with teachers."""
    for split, each in (("train", 12), ("val", 6)):
        for number, name in enumerate(("cold", "warm")):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(each):
                draws = np.random.default_rng([number, i, each])
                pixels = draws.integers(0, 120, (40, 40, 3), dtype=np.uint8)
                pixels[..., 2 * number] += 100
                Image.fromarray(pixels).save(folder / f"{i:02d}.png")
    (tmp_path / "my_teachers.py").write_text(MODULES)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("STOP_AT", raising=False)
    return tmp_path


def config(here, *teachers: str, **changes) -> Distill:
    names = teachers or ("colours", "loud")
    settings = dict(
        data=str(here / "images"),
        teachers=tuple(TeacherSpec(name=f"torch:my_teachers.{n}@32") for n in names),
        student="eradio_nano",
        size=64,
        batch=8,
        steps=8,
        calibration=4,
        out=here / "run",
        device="cpu",
        augment=Augment(scale=(0.8, 1.0)),
        optim=Optim(lr=3e-3, ema=0.5, drop_path=0.1),
        every=Every(log=2, checkpoint=4, evaluate=4),
    )
    return Distill(**(settings | changes))


def lines(run: Run, kind: str) -> list[dict]:
    rows = map(json.loads, (run.path / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if row["kind"] == kind]


def final_weights(run: Run) -> dict:
    return read_checkpoint(run.checkpoints()[-1])


def assert_same_end(run: Run, other: Run):
    ours, theirs = final_weights(run), final_weights(other)
    for part in ("model", "ema"):
        for key, value in ours[part].items():
            assert torch.equal(value, theirs[part][key]), key
    files = [(r.path / "metrics.jsonl").read_bytes() for r in (run, other)]
    assert files[0] == files[1]


@pytest.mark.slow
def test_a_run_learns_and_leaves_all_that_it_promises(here):
    asked = config(here, steps=40, compare=("none",))
    run = distill(replace(asked, every=Every(log=4, checkpoint=20, evaluate=20)))
    losses = [row["loss"] for row in lines(run, "train")]
    assert losses[-1] < losses[0] / 2
    arms = {row["arm"]: row for row in lines(run, "eval") if row["step"] == 40}
    assert set(arms) == {
        "student", "student:other", "untrained", "none", "none:other",
        "teacher:colours", "teacher:loud",
    }  # fmt: skip
    assert arms["student"]["fidelity/min"] > 1 > arms["untrained"]["fidelity/min"]
    assert arms["student"]["knn/top1"] >= 90
    assert len(run.checkpoints()) == 2
    for name in ("config.json", "about.json", "maps.npz", "timing.jsonl", "export/config.json"):
        assert (run.path / name).is_file(), name
    student = load_export(run.path / "export")
    assert set(student.heads) == {"colours", "loud"}
    # the closer of the two forms is exported, and said to be
    chosen, other = arms["student"], arms["student:other"]
    assert {chosen["weights"], other["weights"]} == {"average", "raw"}
    assert chosen["fidelity/geomean"] >= other["fidelity/geomean"]
    assert chosen["knn/top1"] and "knn/top1" not in other
    about = json.loads((run.path / "about.json").read_text())
    assert about["student"]["weights"] == chosen["weights"]
    part = dict(average="ema", raw="model")[chosen["weights"]]
    weights = final_weights(run)[part]
    for key, value in load_file(run.path / "export" / "model.safetensors").items():
        assert torch.equal(value, weights[f"backbone.{key}"]), key
    assert "geometric-mean fidelity" in on_weights(read_run(run.path)).text


@pytest.mark.parametrize(
    ("average", "raw", "better"),
    [
        ({"fidelity/geomean": 2.0}, {"fidelity/geomean": 2.0}, "average"),
        ({"fidelity/geomean": 2.0, "cosine/a/summary": 0.9}, {"fidelity/geomean": 2.1}, "raw"),
        ({"fidelity/geomean": math.nan}, {"fidelity/geomean": 0.1}, "raw"),
        ({"cosine/a/summary": 0.9, "cosine/b/summary": 0.1}, {"cosine/a/summary": 0.4}, "average"),
    ],
)
def test_the_form_that_is_closer_to_the_teachers_is_the_better_one(average, raw, better):
    assert better_form(dict(average=average, raw=raw)) == better


@pytest.mark.slow
def test_a_run_repeats_exactly_and_resumes_to_the_bit_after_a_kill(here):
    whole = distill(config(here))
    again = distill(replace(config(here), out=here / "again"))
    assert_same_end(whole, again)
    # a kill -9 leaves the checkpoint of step 4 and a half-written line
    killed = here / "killed"
    shutil.copytree(whole.path, killed)
    shutil.rmtree(killed / "checkpoints" / "step_00000008")
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    asked = replace(config(here), out=killed)
    assert_same_end(whole, distill(asked, resume=True))


def everything(here, **changes) -> Distill:
    """All ingredients of the objective at once."""
    asked = config(
        here,
        student="test_vit",
        student_options=("init_values=0.5",),
        sizes=(64, 96),
        batches=(8, 4),
        spectral=True,
        losses=Losses(
            summary="angle", weighting="uncertainty", teacher_drop=0.3, shift=1, mesa=0.5
        ),
        optim=Optim(lr=3e-3, ema=0.5, drop_path=0.1, damp=0.02),
    )
    sampled = replace(asked.teachers[0], rate=0.5)
    following = replace(asked.teachers[1], follow=True)
    return replace(asked, teachers=(sampled, following), **changes)


@pytest.mark.slow
@pytest.mark.parametrize("weighting", ["uncertainty", "adaloss"])
def test_a_run_with_every_ingredient_repeats_and_resumes_to_the_bit(here, weighting):
    asked = everything(here)
    asked = replace(asked, losses=replace(asked.losses, weighting=weighting))
    whole = distill(asked)
    killed = here / "killed"
    shutil.copytree(whole.path, killed)
    shutil.rmtree(killed / "checkpoints" / "step_00000008")
    assert_same_end(whole, distill(replace(asked, out=killed), resume=True))
    if weighting == "uncertainty":
        learned = final_weights(whole)["parts"]["weighting"]["learned"]
        assert learned.shape == (5,) and (learned[:4] != 0).all() and learned[4] == 0
    rows = lines(whole, "train")
    assert all("mesa.ema/spatial" in row and "loud/spatial" in row for row in rows)
    # what was averaged under noise and spectral norms is exported as an ordinary model
    back = load_export(whole.path / "export")
    assert not [key for key in back.state_dict() if "parametrizations" in key]
    check = load_file(whole.path / "export" / "check.safetensors")
    final, _ = back.backbone.forward_intermediates(check["images"], indices=1, norm=True)
    torch.testing.assert_close(
        back.backbone.forward_head(final, pre_logits=True), check["summary"], rtol=1e-4, atol=1e-5
    )


KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from zoo.commands.distill.run import distill
from zoo.commands.distill.args import main
from zoo.train.distill.config import Distill
from zoo.train.run import Run
run = Run(Path(sys.argv[1]) / "killed")
distill(run.config(Distill), resume=True)
"""


@pytest.mark.slow
def test_a_run_that_is_killed_between_two_slices_resumes_to_the_bit(here):
    every = Every(log=1, checkpoint=2, evaluate=6)
    sliced = config(here, "stopper", slices=4, steps=6, every=every)
    whole = distill(sliced)
    killed = Run.create(replace(sliced, out=here / "killed"))
    # the sample that shapes are found on, 4 batches of calibration, 3 steps, 2 slices of the next
    environment = {**os.environ, "STOP_AT": str(1 + 4 * 4 + 3 * 4 + 2), "STOP_WITH": "9"}
    done = subprocess.run([sys.executable, "-c", KILLED, str(here)], env=environment, check=False)
    assert done.returncode == -9
    # written while training went on: the kill may have come before it was whole
    assert [path.name for path in killed.checkpoints()] in ([], ["step_00000002"])
    assert_same_end(whole, distill(replace(sliced, out=killed.path), resume=True))


def test_what_does_not_split_into_slices_is_refused_before_any_work(here):
    with pytest.raises(ValueError, match=r"batch of 8 does not split into 3 slices.*2, 4"):
        config(here, slices=3)
    with pytest.raises(ValueError, match="float64 is for tests on a CPU"):
        config(here, precision="float64", device="cuda")


@pytest.mark.slow
@pytest.mark.parametrize(
    "losses",
    [
        Losses(summary="angle", weighting="dispersion"),
        Losses(weighting="uncertainty"),
        Losses(teacher_drop=0.5, shift=1),
        Losses(mesa=0.2, spatial="hybrid"),
    ],
    ids=lambda losses: f"{losses.summary}-{losses.weighting}-{losses.spatial}",
)
def test_training_falls_with_each_objective(here, losses):
    every = Every(log=4, checkpoint=40, evaluate=40)
    run = distill(config(here, steps=40, losses=losses, every=every))
    rows = lines(run, "train")
    for name in ("colours/spatial", "loud/spatial"):
        assert rows[-1][name] < 0.6 * rows[0][name], name
    last = {row["arm"]: row for row in lines(run, "eval") if row["step"] == 40}
    assert last["student"]["fidelity/min"] > 1 > last["untrained"]["fidelity/min"]


def test_what_the_student_or_a_teacher_cannot_do_is_refused_before_any_work(here):
    for match, wrong in (
        ("no attention blocks of a ViT", dict(spectral=True)),
        ("cannot look at 70 px", dict(sizes=(64, 70))),
        ("is not of the form key=value", dict(student_options=("window",))),
        ("refuses its options", dict(student_options=("windows=3",))),
        (
            r"zca divides by .* 8 rows of colours \(--calibration 1, 4 cells .*at least 16 rows",
            dict(student="test_vit", size=32, batch=2, calibration=1, compare=("zca",)),
        ),
        ("losses.shift 3 would leave", dict(losses=Losses(shift=3))),
    ):
        with pytest.raises(ValueError, match=match):
            distill(config(here, **wrong))
    assert not Run(here / "run").checkpoints()


@pytest.mark.slow
def test_a_signal_saves_the_step_and_the_resumed_run_ends_the_same(here, monkeypatch):
    whole = distill(config(here, "stopper"))
    for number, at in ((signal.SIGINT, 4 + 2 + 3), (signal.SIGTERM, 4 + 2 + 5)):
        monkeypatch.setenv("STOP_AT", str(at))
        monkeypatch.setenv("STOP_WITH", str(int(number)))
        asked = replace(config(here, "stopper"), out=here / number.name)
        with pytest.raises(Interrupted) as stop:
            distill(asked)
        assert stop.value.exit_code == 128 + number
        saved = Run(asked.out).checkpoints()[-1]
        assert 0 < read_checkpoint(saved)["step"] < 8
        monkeypatch.delenv("STOP_AT")
        assert_same_end(whole, distill(asked, resume=True))


def test_a_teacher_that_gives_nan_is_named_before_any_training(here):
    with pytest.raises(ValueError, match="The teacher sick gave NaN"):
        distill(config(here, "colours", "sick"))
    assert not (here / "run").exists()  # where it would be in the way of the next try


def test_what_is_refused_leaves_no_folder_behind(here):
    (here / "strange").mkdir()
    (here / "strange" / "thesis.txt").write_text("do not lose me")
    for match, wrong in (
        ("strange is not empty and no feature cache", dict(cache=here / "strange", view_epochs=1)),
        (r"slice of 1,000,000 images.*this cpu has", dict(batch=10**6, slices=1, size=4096)),
        (r"refuses its options \(.*negative", dict(student_options=("depth=-1",))),
        (r"refuses its options", dict(student_options=("x={[]:1}",))),
        (r"refuses its options", dict(student_options=("embed_dim=0",))),
        (r"hidden layers of 65,536", dict(heads=Heads(hidden=65_536, num_inner=64))),
    ):
        with pytest.raises(ValueError, match=match):
            distill(config(here, **(dict(student="vit_tiny_patch16_224") | wrong)))
        assert not (here / "run").exists()


def test_a_teacher_without_linear_layers_is_refused_in_8_bits_before_the_folder_is_made(here):
    with pytest.raises(ValueError, match="no linear layers for int8; give --teacher-precision"):
        prepare(config(here, "colours", teacher_precision="int8"))


def test_a_teacher_whose_name_means_all_teachers_is_refused():
    for name in ("min", "geomean"):
        with pytest.raises(ValueError, match=f"would be called {name}"):
            Distill(teachers=(TeacherSpec(name=f"torch:mine.{name}"),))


def test_a_resumed_run_has_its_own_folder(here):
    Run.create(config(here))
    words = ["--resume", str(here / "run"), "--out", str(here / "other")]
    with pytest.raises(ValueError, match="goes on in its own folder"):
        main(words)


def test_a_loss_that_turns_to_nan_stops_the_run_and_names_the_images(here):
    with pytest.raises(ValueError, match=r"not finite.*nan_batch\.json.*step_00000004"):
        distill(replace(config(here, "late"), every=Every(log=2, checkpoint=4, evaluate=100)))
    told = json.loads((here / "run" / "nan_batch.json").read_text())
    assert len(told["keys"]) == 8 and all(key.endswith(".png") for key in told["keys"])
    last = final_weights(Run(here / "run"))
    assert all(value.isfinite().all() for value in last["model"].values())


@pytest.mark.slow
def test_a_corrupt_image_is_counted_named_and_skipped(here):
    broken = here / "images" / "train" / "warm" / "03.png"
    broken.write_bytes(broken.read_bytes()[:60])
    run = distill(config(here))
    assert json.loads((run.path / "about.json").read_text())["skipped"] == ["warm/03.png"]


@pytest.mark.slow
def test_a_resumed_run_refuses_other_teachers_and_other_weights(here):
    asked = config(here, steps=2)
    run = distill(asked)
    other = replace(config(here, "colours", steps=2), out=run.path)
    with pytest.raises(ValueError, match=r"other settings \(teachers"):
        distill(other, resume=True)
    (here / "my_teachers.py").write_text(MODULES.replace("manual_seed(3)", "manual_seed(4)"))
    import my_teachers

    my_teachers.Rule.__init__ = _other_init(my_teachers)
    with pytest.raises(ValueError, match="other weights of colours, loud"):
        distill(asked, resume=True)


def _other_init(module):
    def init(self, scale=1.0):
        torch.nn.Module.__init__(self)
        torch.manual_seed(4)
        self.conv = torch.nn.Conv2d(3, 8, 8, 8)
        self.scale = scale

    return init


def test_an_output_folder_that_exists_is_left_alone(here):
    (here / "run").mkdir()
    (here / "run" / "thesis.txt").write_text("do not lose me")
    with pytest.raises(ValueError, match=r"exists\. Give another --out"):
        distill(config(here))
    assert (here / "run" / "thesis.txt").read_text() == "do not lose me"


@pytest.mark.parametrize("place", ["/proc/run", "images/train/cold/00.png/run"])
def test_a_place_that_cannot_be_written_to_says_so_before_any_work(here, place):
    with pytest.raises(ValueError, match=r"Cannot write to .*run: .*Give another --out"):
        distill(replace(config(here), out=here / place))


def test_a_full_disk_leaves_the_checkpoint_before(here):
    run = Run.create(config(here))
    run.save(dict(step=4, weights=torch.ones(10)))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match=r"step 8 was not saved.*step_00000004 survives"):
            run.save(dict(step=8, weights=torch.ones(1_000_000)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert run.load()["step"] == 4
    assert [p.name for p in (run.path / "checkpoints").iterdir()] == ["step_00000004"]
