"""The task of docs/tasks.md, as the page has it: it learns, it is short, it resumes."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from zoo.train.checkpoint import read_checkpoint

PAGE = Path(__file__).parents[2] / "docs" / "tasks.md"

CALL = """
from zoo.train.config import Every, Optim
import os, signal, sys

class Killed(ClassifyTask):
    def losses(self, state, batch, targets, step):
        if step == int(os.environ.get("KILL_AT", -1)):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().losses(state, batch, targets, step)

ClassifyTask = Killed
classify(Classify(
    data=sys.argv[1], out=Path(sys.argv[2]), model="test_vit", size=160, batch=8, steps=12,
    device="cpu", slices=2, optim=Optim(lr=3e-3, ema=0.5),
    every=Every(log=2, checkpoint=4, evaluate=6),
))
"""


def code() -> str:
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return block


def words(folder: Path, out: str) -> list[str]:
    """Write the script, and return the command line that runs it."""
    script = folder / "task.py"
    script.write_text(code() + CALL)
    return [str(script), str(folder / "images"), str(folder / out)]


def run(folder: Path, out: str, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", words(folder, out))
    runpy.run_path(sys.argv[0], run_name="__main__")


def test_the_example_has_under_60_lines():
    assert sum(bool(line.strip()) for line in code().splitlines()) < 60


@pytest.mark.slow
def test_the_example_trains_evaluates_and_resumes_to_the_same_bits_after_a_kill(
    tmp_path, monkeypatch, capsys
):
    for number, name in enumerate(("cold", "warm")):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(24):
            pixels = np.random.default_rng([number, i]).integers(0, 90, (40, 40, 3), np.uint8)
            pixels[..., 2 * number] += 120
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i:02d}.png")
    run(tmp_path, "whole", monkeypatch)
    assert re.search(r"classify 12/12 .* cross_entropy .* ETA 0 s", capsys.readouterr().err)
    command = [sys.executable, *words(tmp_path, "again")]
    killed = subprocess.run(command, env={**os.environ, "KILL_AT": "9"}, check=False)
    assert killed.returncode == -9
    run(tmp_path, "again", monkeypatch)
    ends = [tmp_path / name / "checkpoints" / "step_00000012" for name in ("whole", "again")]
    ours, theirs = (read_checkpoint(end)["model"] for end in ends)
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    rows = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "again")]
    assert rows[0] == rows[1]
    found = [json.loads(row) for row in rows[0].splitlines()]
    assert [row["step"] for row in found if row["kind"] == "eval"] == [6, 12]
    train = [row["cross_entropy"] for row in found if row["kind"] == "train"]
    assert train[-1] < train[0] / 2
