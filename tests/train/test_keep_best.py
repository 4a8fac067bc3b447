"""Which checkpoints stay: the newest, and the one that was measured best."""

from collections import defaultdict
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

from zoo.commands.export.checkpoint import best_of
from zoo.train.config import Every, Training
from zoo.train.loop import train
from zoo.train.run import Run
from zoo.train.state import TrainState
from zoo.train.task import Loss, Task

MEASURES = {2: 0.1, 4: 0.7, 6: 0.3, 8: 0.7, 10: float("nan")}


@dataclass(frozen=True, kw_only=True)
class Line(Training):
    """A line through numbers."""

    kind: ClassVar[str] = "line"
    one_measure: ClassVar[bool] = True


class Fit(Task):
    def losses(self, state, batch, targets, step):
        return {"line": Loss((state.model(batch) - 2 * batch).square().sum(), len(batch))}


class Numbers:
    slices = (0,)

    def batches(self, start, steps):
        for step in range(start, steps):
            yield torch.full((4, 1), float(step))

    def counts(self, step):
        return defaultdict(lambda: 4)

    def keys(self, step):
        return [str(step)]

    def skipped(self):
        return ()


def fit(out, *, steps: int = 10, run: Run | None = None, **changes) -> Run:
    every = Every(log=1, evaluate=2, checkpoint=changes.pop("checkpoint", 2))
    config = Line(out=out, steps=steps, batch=4, device="cpu", every=every, **changes)
    run = run or Run.create(config)
    torch.manual_seed(0)
    state = TrainState.of(nn.Linear(1, 1), config.optim)
    state.resume(run)
    train(Fit(), state, Numbers(), config, run, evaluate=lambda _, step: MEASURES[step])
    return run


def steps_of(run: Run) -> list[int]:
    return [int(path.name.removeprefix("step_")) for path in run.checkpoints()]


def test_the_newest_stay_and_the_first_of_the_best(tmp_path):
    assert steps_of(fit(tmp_path / "two")) == [8, 10]
    assert steps_of(fit(tmp_path / "best", keep_best=True)) == [4, 8, 10]
    run = fit(tmp_path / "one", keep=1, keep_best=True)
    assert steps_of(run) == [4, 10]
    assert best_of(run, run.load())["step"] == 4


def test_the_best_is_saved_between_two_checkpoints(tmp_path):
    run = fit(tmp_path / "run", checkpoint=5, keep=1, keep_best=True)
    assert steps_of(run) == [4, 10]
    assert run.load(step=4)["best"] == (4, 0.7)


def test_a_run_that_goes_on_remembers_the_best(tmp_path):
    whole = fit(tmp_path / "whole", keep=1, keep_best=True)
    cut = fit(tmp_path / "cut", steps=6, keep=1, keep_best=True)
    assert steps_of(fit(cut.path, run=cut, keep=1, keep_best=True)) == steps_of(whole) == [4, 10]


def test_a_run_without_a_best_checkpoint_says_how_to_get_one(tmp_path):
    run = fit(tmp_path / "run")
    with pytest.raises(ValueError, match=r"keeps no best checkpoint.*--keep-best"):
        best_of(run, run.load())
    with pytest.raises(ValueError, match="keep_best is for zoo distill and zoo detect"):
        Training(keep_best=True)


def test_reading_a_run_leaves_what_it_is_writing_alone(tmp_path):
    """As `zoo export` does while training goes on."""
    run = fit(tmp_path / "run")
    writing = run.path / "checkpoints" / ".step_00000012.tmp"
    writing.mkdir()
    assert run.load()["step"] == 10 and writing.is_dir()
    run.sweep()
    assert not writing.exists()


def test_a_damaged_checkpoint_is_not_one_of_those_that_stay(tmp_path):
    run = fit(tmp_path / "run", steps=6)
    assert steps_of(run) == [4, 6]
    (run.path / "checkpoints" / "step_00000006" / "state.json").write_bytes(b"")
    assert steps_of(fit(run.path, run=run, steps=8, checkpoint=4)) == [4, 8]
