"""Trackers are told what metrics.jsonl holds; one that is not installed is refused or skipped."""

import json
from dataclasses import dataclass
from typing import ClassVar

import pytest

from zoo.train.config import Training
from zoo.train.run import Run
from zoo.train.trackers import check_trackers, open_trackers


@dataclass(frozen=True, kw_only=True)
class Plain(Training):
    kind: ClassVar[str] = "plain"


@pytest.fixture
def run(tmp_path):
    def begin(*track):
        run = Run.create(Plain(out=tmp_path / "mine", steps=2, track=track))
        for step in (1, 2):
            run.log("train", step, {"loss": 1.0 / step, "note": "a text is no number"})
        for tracker in run._trackers:
            tracker.close()
        return run.path

    return begin


def rows(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_a_tracker_that_is_not_installed_or_known_is_refused_before_the_folder_is_made(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install wandb"):
        Run.create(Plain(out=tmp_path / "x", track=("wandb",)))
    assert not (tmp_path / "x").exists()
    with pytest.raises(ValueError, match="There is no tracker 'comet'"):
        check_trackers(["comet"])
    assert open_trackers(tmp_path, (), {}) == []


def test_tensorboard_is_told_without_being_asked_for(run):
    pytest.importorskip("tensorboard", reason="tensorboard is in the extra [train]")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    path = run()
    events = EventAccumulator(str(path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 1.0), (2, 0.5)]
    assert [row["loss"] for row in rows(path)] == [1.0, 0.5]


@pytest.mark.filterwarnings("ignore")
def test_mlflow_keeps_the_numbers_in_the_runs_folder(run, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    path = run("mlflow")
    client = mlflow.MlflowClient(tracking_uri=(path / "mlruns").as_uri())
    (kept,) = client.search_runs([client.get_experiment_by_name("zoo").experiment_id])
    history = client.get_metric_history(kept.info.run_id, "train/loss")
    assert sorted((m.step, m.value) for m in history) == [(1, 1.0), (2, 0.5)]
    assert kept.data.params["steps"] == "2" and kept.info.status == "FINISHED"


@pytest.mark.filterwarnings("ignore")
def test_a_resumed_run_goes_on_in_its_mlflow_run_and_a_lost_store_begins_another(run, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    path = run("mlflow")
    for store, steps in (("mlruns", {1, 2, 3}), ("elsewhere", {3})):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", (path / store).as_uri())
        tracker = open_trackers(path, ["mlflow"], {"steps": 3})[-1]
        tracker.log({"train/loss": 0.25}, 3)
        tracker.close()
        client = mlflow.MlflowClient(tracking_uri=(path / store).as_uri())
        (kept,) = client.search_runs([client.get_experiment_by_name("zoo").experiment_id])
        history = client.get_metric_history(kept.info.run_id, "train/loss")
        assert {m.step for m in history} == steps and kept.info.status == "FINISHED"


@pytest.mark.filterwarnings("ignore")
def test_each_evaluation_is_a_run_of_its_own(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    for _ in range(2):
        (tracker,) = open_trackers(tmp_path, ["mlflow"], {}, board=False)
        tracker.log({"knn/top1": 50.0}, 0)
        tracker.close()
    client = mlflow.MlflowClient(tracking_uri=(tmp_path / "mlruns").as_uri())
    assert len(client.search_runs([client.get_experiment_by_name("zoo").experiment_id])) == 2


@pytest.mark.filterwarnings("ignore")
def test_wandb_offline_keeps_the_numbers_in_the_runs_folder(run, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")

    monkeypatch.delenv("WANDB_MODE", raising=False)
    path = run("wandb")
    (file,) = path.glob("wandb/offline-run-*/*.wandb")
    kept = file.read_bytes()  # records of protobuf, in which names and values are plain text
    assert kept.count(b"train/loss") >= 2 and b"0.5" in kept
    assert b"a text is no number" not in kept


@pytest.mark.filterwarnings("ignore")
def test_trackio_keeps_the_numbers(run, monkeypatch, tmp_path):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio", reason="trackio is not installed")
    run("trackio")
    found = list((tmp_path / "trackio").rglob("*zoo*"))
    assert found
