"""A run whose compiled code takes over after some steps; the compiler here changes nothing.

What it is on a GPU, `benchmarks/distill_speed.py` measures.
"""

import json
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from zoo.commands.distill import run as commands
from zoo.compiled_blocks import compile_blocks
from zoo.features import Batch
from zoo.teachers.teacher import Frozen
from zoo.train.config import Every
from zoo.train.distill import compiling, speed, worth
from zoo.train.distill.compiling import (
    Compiling,
    compile_part,
    mark_of,
    parts_of,
    take_over_teachers,
)
from zoo.train.distill.config import Distill, TeacherSpec
from zoo.train.distill.setup import prepare
from zoo.train.distill.speed import Speed, choose
from zoo.train.distill.teachers import is_compiled

# the checks of shapes, which tests alone have, draw random numbers in compiled code
pytestmark = pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace the builtin")
CPU = torch.device("cpu")
FORM = Speed(channels_last=True, blocks=True, teachers=True, beside=True)


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(speed, "compile_blocks", partial(compile_blocks, backend="eager"))
    monkeypatch.setattr(torch.nn.Module, "compile", _as_it_is(torch.nn.Module.compile))
    (tmp_path / "photos").mkdir()
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 256, (80, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number}.png")
    return Distill(
        data=str(tmp_path / "photos"),
        teachers=(TeacherSpec(name="timm:test_vit/random@64"),),
        student="test_vit",
        size=64,
        batch=4,
        steps=6,
        calibration=1,
        eval_images=4,
        every=Every(log=1, checkpoint=100, evaluate=100),
        out=tmp_path / "run",
    )


def _as_it_is(plain):
    """Let heads and teachers be compiled by the compiler that changes nothing too."""
    return lambda module, **options: plain(module, **{"backend": "eager", **options})


def test_compiled_code_takes_over_at_a_step_that_is_recorded(config, monkeypatch, capfd):
    asked = []

    class Beside:
        def __init__(self, run, config, parts, say, lost):
            assert parts == ["student", "test_vit"] and (run / "config.json").is_file()

        def done(self):
            asked.append(True)
            return len(asked) > 2

        def stop(self):
            asked.append("stopped")

    monkeypatch.setattr(commands, "choose", lambda *_, **__: FORM)
    monkeypatch.setattr(compiling, "Compiling", Beside)
    monkeypatch.setattr(compiling, "SETTLING", 1)
    run = commands.distill(replace(config, speed="compiled"))
    about = json.loads((run.path / "about.json").read_text())["speed"]
    assert about["compiled_from"] == [3] and "student compiled" in about["form"]
    assert asked == [True, True, True, "stopped"]
    fast = losses(run.path)
    monkeypatch.setattr(commands, "choose", choose)
    plain = commands.distill(replace(config, speed="plain", out=config.out.parent / "plain"))
    monkeypatch.undo()
    assert [round(x, 4) for x in fast] == [round(x, 4) for x in losses(plain.path)]
    assert "the student runs compiled for 4 images of 64 px" in capfd.readouterr().err


@pytest.mark.parametrize("least", [0.0, 1e9])
def test_auto_compiles_where_the_steps_left_are_worth_it(config, monkeypatch, capfd, least):
    monkeypatch.setattr(commands, "choose", lambda *_, **__: FORM)
    monkeypatch.setattr(compiling, "Compiling", Done)
    for name, value in dict(SETTLING=1, TIMED=2, COLD=least).items():
        monkeypatch.setattr(worth, name, value)
    run = commands.distill(config)
    about = json.loads((run.path / "about.json").read_text())["speed"]
    said = " ".join(capfd.readouterr().err.split())
    if least:
        assert about["compiled_from"] == [] and "plain (the 3 steps left take" in about["form"]
        assert "speed auto: plain: the 3 steps left take" in said
    else:
        assert about == dict(form=FORM.describe(), compiled_from=[3])
        assert said.index("speed auto: channels last") < said.index("the student runs compiled")


class Done:
    """Side processes that have ended."""

    def __init__(self, *_):
        pass

    def done(self):
        return True

    def stop(self):
        pass


def losses(path):
    rows = map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if row["kind"] == "train"]


def test_a_teacher_that_no_compiler_takes_stays_as_it_is(config, monkeypatch):
    setup, said = prepare(config), []
    (teacher,) = setup.teachers.values()
    assert isinstance(teacher, Frozen)
    batch = Batch(torch.rand(4, 3, 64, 64))
    plain = teacher(batch)

    def broken(module, **_):
        def fail(*_):
            raise RuntimeError("no such operator")

        module._compiled_call_impl = fail

    monkeypatch.setattr(torch.nn.Module, "compile", broken)
    take_over_teachers(setup, said.append)
    assert said == ["the teacher test_vit is not compiled: RuntimeError: no such operator"]
    assert not is_compiled(teacher)
    torch.testing.assert_close(teacher(batch), plain)


def test_parts_that_were_compiled_before_are_not_again(config, tmp_path, monkeypatch):
    said = []
    parts = parts_of(config, FORM)
    assert parts == ["student", "test_vit"]
    assert parts_of(replace(config, teacher_precision="int8"), FORM) == ["student"]
    for part in parts:
        compile_part(config, part, CPU)  # as the process beside a run does
    mark = mark_of(config, "student")
    assert mark != mark_of(config, "test_vit")
    assert mark != mark_of(replace(config, batch=8), "student")
    assert mark == mark_of(replace(config, steps=9), "student")
    mark.parent.mkdir(parents=True)
    mark.touch()
    real = compiling.subprocess.Popen
    calls = []

    def other(words, **options):
        calls.append(words)
        code = "import sys; print('no such thing'); sys.exit(3)"
        return real([sys.executable, "-c", code], **options)

    monkeypatch.setattr(compiling.subprocess, "Popen", other)
    beside = Compiling(tmp_path, config, parts, said.append)
    assert [words[-1] for words in calls] == ["test_vit"]
    for process in beside._left.values():
        process.wait()
    assert beside.done()
    beside.stop()
    assert "test_vit did not compile beside the run" in said[-1] and "no such thing" in said[-1]


def test_processes_that_still_compile_end_with_the_run(config, tmp_path, monkeypatch):
    real = compiling.subprocess.Popen
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    monkeypatch.setattr(compiling.subprocess, "Popen", lambda _, **options: real(sleep, **options))
    beside = Compiling(tmp_path, config, ["student"], lambda _: None)
    (process,) = beside._left.values()
    assert not beside.done()
    beside.stop()
    assert process.poll() is not None
