"""The training of heads: stopped and gone on with, in a place of its own, with losses to see."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from zoo.cli import main
from zoo.eval.dense.depth import DepthSettings, depth
from zoo.eval.dense.segment import SegmentSettings, build_segmenter, fit_segmenter
from zoo.eval.dense.segment_data import SegmentSet, open_segments
from zoo.eval.registry import Subject
from zoo.eval.results import read
from zoo.students.build import build_student
from zoo.train.run import Run

LINEAR = SegmentSettings(crop=32, stride=32, steps=20, batch=4, lr=0.01, pictures=1)
UPERNET = SegmentSettings(
    head="upernet", crop=64, stride=64, steps=4, batch=2, hidden=8, backbone_lr=1e-3, pictures=1
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Grey blocks whose brightness is their class and their depth."""
    root = tmp_path_factory.mktemp("blocks")
    draws = np.random.default_rng(0)
    for split in ("train", "val"):
        for kind in ("images", "masks", "depth"):
            (root / kind / split).mkdir(parents=True)
        for i in range(3):
            truth = draws.integers(2, size=(4, 6)).repeat(8, axis=0).repeat(8, axis=1)
            grey = np.stack([truth * 200 + 20] * 3, axis=-1).astype(np.uint8)
            Image.fromarray(grey).save(root / "images" / split / f"{i}.png")
            Image.fromarray(truth.astype(np.uint8)).save(root / "masks" / split / f"{i}.png")
            metres = (truth + 1).astype(np.float32)
            np.save(root / "depth" / split / f"{i}.npy", metres)
    (root / "classes.json").write_text(json.dumps(["dark", "light"]))
    return root


class FailingSet(SegmentSet):
    """A set whose disk fails after some reads."""

    def __init__(self, source, reads):
        super().__init__(source.pairs, source.classes, source.values)
        self.__dict__["reads"] = iter(range(reads))

    def image(self, index):
        if next(self.__dict__["reads"], None) is None:
            raise OSError("the disk is gone")
        return super().image(index)


@pytest.mark.parametrize("settings", [LINEAR, UPERNET], ids=["linear", "upernet"])
def test_a_stopped_head_training_resumes_to_the_same_weights(data, tmp_path, settings):
    student = build_student("eradio_nano", {}, size=64).eval()
    who = Subject(name="eradio", made=student)
    train, _ = open_segments(data, "auto")

    def fitted(source, work):
        who.work = work
        segmenter = build_segmenter(who, 2, settings)
        fit_segmenter(segmenter, source, who, settings)
        return segmenter.state_dict()

    whole = fitted(train, tmp_path / "whole")
    half = settings.steps // 2 * settings.batch + 1
    with pytest.raises(ValueError, match=r"unreadable, .*the disk is gone"):
        fitted(FailingSet(train, half), tmp_path / "work")
    assert 0 < Run(tmp_path / "work").load()["step"] < settings.steps
    resumed = fitted(train, tmp_path / "work")
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())
    logs = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "work")]
    assert logs[0] == logs[1]


def test_piped_output_shows_losses_and_the_time_that_is_left(planted, data, capsys):
    settings = DepthSettings(crop=16, stride=16, steps=20, batch=4, lr=0.5, max_depth=4.5)
    dict(depth(planted(), data, settings))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10
    for line in lines:
        assert re.fullmatch(r"planted head \d+/20 .* img/s  loss [\d.]+ .* ETA \d+ s", line)


def test_a_loss_that_is_not_finite_names_its_images(planted, data):
    settings = SegmentSettings(crop=32, stride=32, steps=3, batch=2)
    who, (train, _) = planted(lambda x: x * torch.nan), open_segments(data, "auto")
    segmenter = build_segmenter(who, 2, settings)
    with pytest.raises(ValueError, match="is not finite; its samples are listed in") as error:
        fit_segmenter(segmenter, train, who, settings)
    named = json.loads(Path(re.search(r"in (\S+)\. ", str(error.value)).group(1)).read_text())
    assert len(named["keys"]) == 2 and "/images/train/" in named["keys"][0]


KILLED = """
import os, signal, sys
from zoo.cli import main
from zoo.train.run import Run

log = Run.log
def log_and_die(self, kind, step, values):
    log(self, kind, step, values)
    if "depth" in str(self.path) and step == 12:
        os.kill(os.getpid(), signal.SIGKILL)
Run.log = log_and_die
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_an_evaluation_that_was_killed_resumes_to_the_same_weights_and_numbers(
    data, tmp_path, monkeypatch, capsys
):
    saved = {}
    save = Run.save
    monkeypatch.setattr(
        Run, "save", lambda run, state, **how: saved.update(state) or save(run, dict(state))
    )

    def command(out, *names):
        small = dict(crop=32, stride=32, steps=20, batch=4)
        own = [f"--{name}.{key}={value}" for name in names for key, value in small.items()]
        where = ["--data", str(data), "--out", str(out)]
        return ["eval", "test_vit", "--size", "32", "--on", ",".join(names), *where, *own]

    def final():
        return {key: value.clone() for key, value in saved["model"].items()}

    main(command(tmp_path / "whole.jsonl", "segment", "depth"))
    whole = final()
    out = tmp_path / "results.jsonl"
    both = command(out, "segment", "depth")
    words = [sys.executable, "-W", "ignore", "-c", KILLED, *both]
    killed = subprocess.run(words, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert re.search(r"test_vit head 2/20 .* loss .* ETA \d+ s", killed.stderr)
    assert [record.benchmark for record in read(out)] == ["segment"]
    (work,) = (tmp_path / "results.work").iterdir()
    assert Run(work).load()["step"] == 10

    with pytest.raises(SystemExit):
        main(command(out, "depth"))
    assert "--resume" in capsys.readouterr().err
    main([*both, "--resume"])
    assert "has it already" in capsys.readouterr().out
    assert all(torch.equal(value, whole[key]) for key, value in final().items())
    for mine, theirs in zip(read(out), read(tmp_path / "whole.jsonl"), strict=True):
        assert (mine.benchmark, mine.values) == (theirs.benchmark, theirs.values)
    assert not (tmp_path / "results.work").exists()
