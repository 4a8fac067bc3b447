"""Checkpoints after the first are written by its plan, and their Python does not run in one go."""

import gc
import threading
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch

from zoo.train import planner
from zoo.train.checkpoint import Saver, damage, read_checkpoint
from zoo.train.garbage import garbage_frozen
from zoo.train.staging import Staging, pinned_like


def state_of(step: int, *sizes: int) -> dict:
    return dict(step=step, model={f"w{i}": torch.randn(n) for i, n in enumerate(sizes)}, best=None)


@pytest.fixture
def plans(monkeypatch):
    """The states that DCP has planned."""
    made, plan = [], planner.DefaultSavePlanner.create_local_plan
    monkeypatch.setattr(
        planner.DefaultSavePlanner,
        "create_local_plan",
        lambda self: made.append(sorted(self.state_dict)) or plan(self),
    )
    return made


def save(saver: Saver, state: dict) -> None:
    saver.begin(state, kept=9)
    saver.wait()


def test_a_state_of_the_same_shapes_is_planned_once_and_written_each_time(tmp_path: Path, plans):
    saver, states = Saver(tmp_path), [state_of(i, 70_000, 3, 80_000) for i in range(3)]
    for state in states:
        save(saver, state)
    assert len(plans) == 1
    for i, state in enumerate(states):
        read = read_checkpoint(tmp_path / f"step_{i:08d}")["model"]
        assert all(torch.equal(read[name], x) for name, x in state["model"].items())


@pytest.mark.parametrize("sizes", [(70_000, 90_000), (70_000,), (70_000, 80_000, 75_000)])
def test_a_state_of_other_shapes_is_planned_anew(sizes, tmp_path: Path, plans):
    saver, state = Saver(tmp_path), state_of(1, *sizes)
    save(saver, state_of(0, 70_000, 80_000))
    save(saver, state)
    assert len(plans) == 2
    read = read_checkpoint(tmp_path / "step_00000001")["model"]
    assert read.keys() == state["model"].keys()
    assert all(torch.equal(read[name], x) for name, x in state["model"].items())


def test_what_is_written_is_let_go(tmp_path: Path):
    saver = Saver(tmp_path)
    save(saver, state_of(0, 70_000))
    assert not saver._planner.state_dict


def test_a_checkpoint_that_is_waited_for_does_not_rest(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(planner, "REST", 3600.0)
    saver = Saver(tmp_path)
    saver.begin(state_of(0, 70_000, 80_000), kept=1)
    waiting = threading.Thread(target=saver.wait, daemon=True)
    waiting.start()
    waiting.join(60)
    assert not waiting.is_alive()
    assert (tmp_path / "step_00000000").is_dir()


@pytest.mark.parametrize("some_are", [False, True])
def test_the_garbage_of_a_run_is_frozen_by_the_outermost(some_are):
    gc.unfreeze()
    if some_are:  # as Python 3.12 does when it starts
        gc.freeze()
    made, before = [[] for _ in range(5000)], gc.get_freeze_count()
    with garbage_frozen(True):
        assert gc.get_freeze_count() > max(1000, before + len(made) // 2)
        with garbage_frozen(True):
            pass
        assert gc.get_freeze_count() > 1000  # what has died since is not counted any more
    assert gc.get_freeze_count() == 0 and made is not None
    with garbage_frozen(False):
        assert gc.get_freeze_count() == 0


class Kept(Staging):
    """Keeps its memory on a CPU too, as a GPU's is kept."""

    broken = False

    def reserve(self, tensors):
        self._reserved = Future()
        if self.broken:
            self._reserved.set_exception(MemoryError("pinned"))
        else:
            self._reserved.set_result(pinned_like(tensors))
        return self._reserved

    def copy(self, tensors):
        memory = self._memory_for(tensors)
        for name, x in tensors.items():
            memory[name].copy_(x)
        return memory


@pytest.mark.parametrize("broken", [False, True])
def test_the_first_save_finds_all_that_its_rehearsal_made(tmp_path: Path, monkeypatch, broken):
    monkeypatch.setattr("zoo.train.checkpoint.Staging", Kept)
    monkeypatch.setattr(Kept, "broken", broken)
    saver, state = Saver(tmp_path), state_of(1, 70_000, 80_000)
    saver.prepare(state)
    assert saver._rehearsal
    saver._rehearsal.result(60)
    assert not list(tmp_path.iterdir())
    planned, resolved = planner.Planner.create_local_plan, planner.Planner.resolve_data
    found = list[str]()

    def plans(self):
        plan = planned(self)
        found.extend(["planned"] * plan.usable)
        return plan

    def resolves(self, item):
        found.append("resolved")
        return resolved(self, item)

    monkeypatch.setattr(planner.Planner, "create_local_plan", plans)
    monkeypatch.setattr(planner.Planner, "resolve_data", resolves)
    for step in (1, 2, 3):
        state = state_of(step, 70_000, 80_000)
        saver.begin(state, kept=1)
        saver.wait()
        read = read_checkpoint(tmp_path / f"step_{step:08d}")
        assert all(torch.equal(read["model"][k], x) for k, x in state["model"].items())
        assert damage(tmp_path / f"step_{step:08d}") == ""
        # without memory reserved, the first save makes the pieces; they serve from then on
        assert set(found) == ({"resolved"} if broken else set())
    assert len(found) == (2 if broken else 0)


def test_another_state_than_the_rehearsed_one_is_saved_as_well(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("zoo.train.checkpoint.Staging", Kept)
    saver = Saver(tmp_path)
    saver.prepare(state_of(1, 70_000, 80_000))
    state = state_of(2, 90_000)
    saver.begin(state, kept=1)
    saver.wait()
    read = read_checkpoint(tmp_path / "step_00000002")
    assert all(torch.equal(read["model"][k], x) for k, x in state["model"].items())
