"""`zoo detect` from its command line to its files, and `zoo eval --on detect` of what it made."""

import json
import os
import signal
from dataclasses import replace

import pytest
import torch

pytest.importorskip("faster_coco_eval", reason="faster-coco-eval is not installed; it is in [det]")

from zoo.cli import main
from zoo.commands.detect import Detect, read_config, tiny, train_detector
from zoo.eval.detect import training
from zoo.eval.detect.shapes import write_shapes
from zoo.train.interrupt import Interrupted
from zoo.train.run import Run

SMALL = [
    "eradio_nano", "--tiny", "--detector", "faster_rcnn", "--steps", "4", "--width", "16",
    "--size", "64", "--log", "2", "--device", "cpu",
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_shapes(folder, train=4, val=3, side=64)
    return folder


def refused(capsys, *args):
    with pytest.raises(SystemExit) as stopped:
        main(["detect", *map(str, args)])
    assert stopped.value.code == 2
    return capsys.readouterr().err


@pytest.mark.slow
def test_a_detector_is_trained_measured_and_measured_again(data, tmp_path, capsys):
    out = tmp_path / "run"
    main(["detect", *SMALL, "--data", str(data), "--out", str(out), "--pictures", "2"])
    results = json.loads((out / "results.json").read_text())
    assert "detect/box/AP50" in results
    assert len(list((out / "pictures").glob("*.png"))) == 2
    assert isinstance(json.loads((out / "predictions.json").read_text()), list)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4]
    again = tmp_path / "again.jsonl"
    main(["eval", str(out), "--on", "detect", "--data", str(data), "--out", str(again)])
    values = json.loads(again.read_text())["values"]
    assert values == pytest.approx(results)
    assert "detect/box/AP50" in capsys.readouterr().out


@pytest.mark.slow
def test_a_backbone_is_measured_by_a_short_training(data, tmp_path):
    out = tmp_path / "results.jsonl"
    short = "--detect.size 64 --detect.width 16 --detect.training.steps 2 --detect.pictures 1"
    words = [*short.split(), "--detect.training.batch", "2", "--data", str(data)]
    main(["eval", "eradio_nano", "--on", "detect", *words, "--out", str(out)])
    assert "detect/mask/AP50" in json.loads(out.read_text())["values"]


@pytest.mark.slow
def test_a_detector_is_no_subject_of_other_benchmarks(data, tmp_path, capsys):
    out = tmp_path / "run"
    main(["detect", *SMALL, "--steps", "1", "--data", str(data), "--out", str(out)])
    with pytest.raises(SystemExit):
        main(["eval", str(out), "--on", "knn", "--data", str(data)])
    assert "measure it with --on detect alone" in capsys.readouterr().err


@pytest.mark.slow
def test_ctrl_c_keeps_a_checkpoint_and_the_run_goes_on_to_the_same_weights(
    data, tmp_path, monkeypatch
):
    start = tiny(Detect(backbone="eradio_nano", data=data, detector="faster_rcnn", device="cpu"))
    few = replace(start.training, steps=4, batch=2)
    start = replace(start, size=64, width=16, training=few, pictures=0)
    train_detector(replace(start, out=tmp_path / "whole"))
    rate = training.rate

    def stopping(step, config):  # Ctrl-C in the middle of the second step
        if step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return rate(step, config)

    monkeypatch.setattr(training, "rate", stopping)
    with pytest.raises(Interrupted, match="Stopped after step 2"):
        train_detector(replace(start, out=tmp_path / "parts"))
    monkeypatch.undo()
    train_detector(read_config(tmp_path / "parts"), resume=True)
    ours, theirs = (Run(tmp_path / name).load() for name in ("parts", "whole"))
    for key, value in ours["detector"].items():
        assert torch.equal(value, theirs["detector"][key])
    assert (tmp_path / "parts" / "results.json").read_text() == (
        tmp_path / "whole" / "results.json"
    ).read_text()


@pytest.mark.slow
def test_a_dry_run_tells_the_plan_and_writes_nothing(data, tmp_path, capsys):
    main(["detect", *SMALL, "--data", str(data), "--out", str(tmp_path / "run"), "--dry-run"])
    told = capsys.readouterr().out
    assert "4 images" in told
    assert "Nothing was written" in told
    assert not (tmp_path / "run").exists()


def test_what_a_user_gets_wrong_is_said_before_any_work(data, tmp_path, capsys):
    out = tmp_path / "run"
    rest = ("--out", out)
    assert "Name a backbone" in refused(capsys, "--data", data, *rest)
    assert "neither a registered model" in refused(capsys, "resnet0", "--data", data, *rest)
    assert "There is no folder" in refused(capsys, "resnet18", "--data", data / "no", *rest)
    assert "no COCO split" in refused(capsys, "resnet18", "--data", tmp_path, *rest)
    assert "multiple of 32" in refused(capsys, "resnet18", "--data", data, "--size", 70, *rest)
    assert "no CUDA device" in refused(capsys, "resnet18", "--device", "cuda", *rest) or (
        torch.cuda.is_available()
    )
    assert "no run of `zoo detect`" in refused(capsys, "--resume", tmp_path)
    out.mkdir()
    (out / "file").touch()
    assert "--out" in refused(capsys, "resnet18", "--data", data, *rest)
