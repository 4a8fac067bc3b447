"""Runs in stages: each builds on the one before it, and what is finished is not done again."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

import zoo
from zoo.commands.distill.args import read_args
from zoo.commands.distill.stages import distill_stages, print_plans, read_stages
from zoo.eval.report.page import build_report
from zoo.teachers.open import open_teacher
from zoo.teachers.teacher import fingerprint
from zoo.train.config import Every, Optim, to_json
from zoo.train.distill.config import Distill, TeacherSpec
from zoo.train.distill.stages import placed, plannable
from zoo.train.interrupt import Interrupted
from zoo.train.run import Run

MODULE = """
import os, signal
import torch
from torch import nn
from zoo.features import Features

class Stopper(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.calls, self.name = 0, name
        torch.manual_seed(3)
        self.conv = nn.Conv2d(3, 8, 8, 8)
    def forward(self, x):
        self.calls += 1
        if self.calls == int(os.environ.get(self.name, 0)):
            os.kill(os.getpid(), int(os.environ["STOP_WITH"]))
        x = self.conv(x)
        return Features(x.mean((2, 3)), x.permute(0, 2, 3, 1))

class Sick(Stopper):
    def forward(self, x):
        return Features(*(y * (1 if len(x) == 1 else float("nan")) for y in super().forward(x)))

def sick():
    return Sick("STOP_SICK")

def first():
    return Stopper("STOP_FIRST")

def last():
    return Stopper("STOP_LAST")
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with images, and an importable module with a teacher that can stop a run."""
    for split, count in (("train", 12), ("val", 4)):
        folder = tmp_path / "images" / split
        folder.mkdir(parents=True)
        for i in range(count):
            draws = np.random.default_rng([i, count])
            pixels = draws.integers(0, 255, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i:02d}.png")
    (tmp_path / "stoppers.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def three(here, out="whole", **changes) -> dict[str, Distill]:
    """A proxy, its small student, and more heads on that student's frozen trunk."""
    proxy = Distill(
        data=str(here / "images"),
        teachers=(TeacherSpec(name="torch:stoppers.first@32"),),
        student="test_vit",
        size=32,
        batch=4,
        steps=4,
        calibration=2,
        out=here / out,
        device="cpu",
        optim=Optim(lr=3e-3, ema=0.5),
        every=Every(log=1, checkpoint=2, evaluate=4),
    )
    proxy = replace(proxy, **changes)
    taught = TeacherSpec(name="zoo:local-dir:{proxy}/export@64")
    small = replace(proxy, student="test_vit2", teachers=(taught,))
    heads = replace(
        small,
        start=Path("{small}"),
        size=64,
        sizes=(32, 64),
        batches=(4, 2),
        teachers=(taught, TeacherSpec(name="torch:stoppers.last@32")),
        optim=replace(proxy.optim, freeze="trunk"),
    )
    return dict(proxy=proxy, small=small, heads=heads)


FOLDERS = ("1-proxy", "2-small", "3-heads")


def results(root: Path) -> dict[str, bytes]:
    """What was measured, and each exported tensor; the order in a file's header is not fixed."""
    found = {}
    for folder in FOLDERS:
        found[folder] = (root / folder / "metrics.jsonl").read_bytes()
        for part in ("model", "heads"):
            tensors = load_file(root / folder / "export" / f"{part}.safetensors")
            found |= {f"{folder}/{part}/{k}": v.numpy().tobytes() for k, v in tensors.items()}
    return found


@pytest.mark.slow
def test_each_stage_builds_on_the_one_before_and_a_stopped_run_ends_the_same(here, monkeypatch):
    run = distill_stages(three(here))
    whole = here / "whole"
    assert run.path == whole / "3-heads"
    # the teacher of the second stage is the export of the first
    proxy = open_teacher(f"zoo:local-dir:{whole / '1-proxy' / 'export'}@64")
    assert Run(whole / "2-small").read_json("teachers.json") == {"export": fingerprint(proxy)}
    # the third begins with the second, and its trunk stays frozen: the same bytes come out
    second, third = (load_file(whole / f / "export" / "model.safetensors") for f in FOLDERS[1:])
    resized = {"pos_embed"}  # 32 px there, 64 here
    assert second.keys() == third.keys()
    assert all(second[key].equal(third[key]) for key in second.keys() - resized)
    first = load_file(whole / "1-proxy" / "export" / "heads.safetensors")
    assert first.keys() != load_file(whole / "3-heads" / "export" / "heads.safetensors").keys()
    page = (run.path / "report.html").read_text()
    assert 'href="../1-proxy/report.html"' in page and 'href="../2-small/report.html"' in page

    # killed inside the first stage, where no signal can be noted
    places = [str(here), str(Path(__file__).parent), *sys.path]
    environment = dict(
        os.environ, STOP_FIRST="6", STOP_WITH="9", PYTHONPATH=os.pathsep.join(places)
    )
    code = (
        "from pathlib import Path; from test_stages import three, distill_stages; "
        f"distill_stages(three(Path({str(here)!r}), 'stopped'))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    stopped = here / "stopped"
    assert not (stopped / "1-proxy" / "export").exists()
    # interrupted inside the last stage, and its folder moved before it goes on
    stages = read_stages(stopped)
    monkeypatch.setenv("STOP_WITH", str(int(signal.SIGINT)))
    monkeypatch.setenv("STOP_LAST", str(1 + 2 * 2 + 2))  # its sample, calibration, two steps
    with pytest.raises(Interrupted):
        distill_stages(stages, resume=True)
    monkeypatch.delenv("STOP_LAST")
    assert (stopped / "2-small" / "export").exists()
    assert not (stopped / "3-heads" / "export").exists()
    moved = stopped.rename(here / "moved")
    before = (moved / "1-proxy" / "about.json").stat().st_mtime_ns
    distill_stages(read_stages(moved), resume=True)
    assert (moved / "1-proxy" / "about.json").stat().st_mtime_ns == before
    assert results(moved) == results(whole)


def test_other_settings_of_a_stage_are_refused_when_it_goes_on(here):
    whole, stages = here / "whole", three(here)
    whole.mkdir()
    with pytest.raises(ValueError, match=f"There is no run of the stages proxy.* in {whole}"):
        distill_stages(stages, resume=True)
    Run(whole).write_json("stages.json", {name: to_json(c) for name, c in stages.items()})
    assert read_stages(whole) == stages
    with pytest.raises(ValueError, match=r"The stage small in .* other settings \(steps: 4 there"):
        zoo.distill(resume=whole, stages=dict(small=dict(steps=3)))
    with pytest.raises(ValueError, match="no stage smal; there are proxy, small, heads"):
        zoo.distill(stages, stages=dict(smal=dict(steps=3)))
    assert [path.name for path in whole.iterdir()] == ["stages.json"]
    (whole / "1-proxy").mkdir()
    with pytest.raises(ValueError, match="give one of its folders: 1-proxy"):
        build_report(whole)


def test_what_a_later_stage_cannot_be_is_refused_before_the_first_begins(here):
    stages = three(here)
    for match, wrong in (
        ("In the stage heads: There is no registered model 'resnett18'", dict(student="resnett18")),
        ("In the stage heads: The student test_vit2, built for 64 px", dict(sizes=(64, 70))),
    ):
        other = stages | dict(heads=replace(stages["heads"], batches=(), **wrong))
        with pytest.raises(ValueError, match=match):
            distill_stages(other)
    sick = replace(stages["proxy"], teachers=(TeacherSpec(name="torch:stoppers.sick@32"),))
    with pytest.raises(ValueError, match="The teacher sick gave NaN"):
        distill_stages(stages | dict(proxy=sick))
    assert not (here / "whole").exists()


def test_a_stage_may_name_earlier_stages_alone(here):
    stages = three(here)
    with pytest.raises(ValueError, match=r"\{proxy\} stands for no stage before this one"):
        placed(dict(heads=stages["heads"]))
    with pytest.raises(ValueError, match="folders of one --out"):
        placed(stages | dict(small=replace(stages["small"], out=here / "other")))
    assert placed(stages)["heads"].start == here / "whole" / "2-small"
    stand_in = plannable(stages)["heads"]
    assert stand_in.start is None and stand_in.teachers[0].name == "timm:test_vit/random@64"


def test_options_are_for_all_stages_or_for_one():
    words = "am_radio --data D --steps 7 --stage high --steps 9 --out O --optim.lr 1e-4 --dry-run"
    asked = read_args(words.split())
    assert asked.args.dry_run
    low, high = asked.stages.values()
    assert low.out == high.out == Path("O")
    assert (low.data, low.steps, low.optim.lr) == ("D", 7, 1e-3)
    assert (high.data, high.steps, high.optim.lr, high.start) == ("D", 9, 1e-4, Path("{low}"))
    for wrong, match in (
        ("am_radio --stage hihg --steps 3", "no stage hihg; there are low, high"),
        ("unic --stage high --steps 3", "this run has one stage"),
        ("am_radio --start runs/mine", "say which: --stage low --start"),
        ("am_radio --stage", "--stage needs a name"),
    ):
        with pytest.raises(ValueError, match=match):
            read_args(wrong.split())


def test_a_dry_run_plans_every_stage_and_writes_nothing(here, capsys):
    print_plans(three(here))
    shown = capsys.readouterr().out
    for number, folder in enumerate(FOLDERS, 1):
        assert f"stage {number} of 3: {folder[2:]}, in {here / 'whole' / folder}" in shown
    assert shown.count("Nothing was written.") == 3 and not (here / "whole").exists()
