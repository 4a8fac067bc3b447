"""`zoo detect` from its command line to its files, and `zoo eval --on detect` of what it made."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("faster_coco_eval", reason="faster-coco-eval is not installed; it is in [det]")

from zoo.cli import main
from zoo.commands.detect_args import read_args
from zoo.eval.detect.benchmark import detect
from zoo.eval.detect.config import Detect, DetectSettings, DetectTraining
from zoo.eval.detect.shapes import write_shapes
from zoo.eval.registry import Subject
from zoo.train.config import Every
from zoo.train.run import Run

ROOT = Path(__file__).parents[2]
SMALL = [
    "eradio_nano", "--tiny", "--detector", "faster_rcnn", "--width", "16", "--size", "64",
    "--log", "2", "--device", "cpu",
]  # fmt: skip
FOUR = ["--steps", "4"]


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
    main(["detect", *SMALL, *FOUR, "--data", str(data), "--out", str(out), "--pictures", "2"])
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
    check_provenance(out, data, again, capsys)
    check_report(out, results)


def check_provenance(out, data, file, capsys):
    """What is recorded of a trained detector is what it is; what it would ignore is refused."""
    line = json.loads(file.read_text())
    trained = line["settings"]["trained"]
    assert (trained["detector"], trained["size"], trained["width"]) == ("faster_rcnn", 64, 16)
    assert trained["training"]["steps"] == 4 and line["model"]["size"] == 64
    assert "training" not in line["settings"] and line["settings"]["class_agnostic"] is False
    from zoo.eval.detect.config import DetectSettings

    default = str(DetectSettings().size)  # what is typed counts, also where it is the default
    for option in (
        ["--detect.size", "96"],
        ["--detect.size", default],
        ["--detect.training.steps", "7"],
    ):
        with pytest.raises(SystemExit):
            main(["eval", str(out), "--on", "detect", "--data", str(data), *option])
        told = capsys.readouterr().err
        assert "is a trained detector" in told and option[0].rpartition(".")[0] in told
    with pytest.raises(SystemExit):
        main(["eval", str(out), "--on", "detect", "--data", str(data), "--size", "96"])
    assert "at 64 px: leave out --size 96" in capsys.readouterr().err
    agnostic = ["--detect.class-agnostic", "--out", str(file)]
    main(["eval", str(out), "--on", "detect", "--data", str(data), *agnostic])
    last = json.loads(file.read_text().splitlines()[-1])
    assert last["settings"]["class_agnostic"] is True and "detect/box/AP" in last["values"]


def check_report(out, results):
    """The page of a detector's run shows its numbers, losses and pictures, and no empty section."""
    from zoo.eval.report.gathered import gather

    main(["report", str(out)])
    page = (out / "report.html").read_text("utf-8")
    assert 'class="note"' not in page and "faster_rcnn over eradio_nano" in page
    assert "detect/box/AP50" in page and page.count("<img") >= 4
    ((model,), _) = gather([out])
    named = {measure.name: value for measure, value in model.values.items()}
    assert named["detect/box/AP50"] == results["detect/box/AP50"]


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


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run that nothing stops, and its words."""
    out = tmp_path_factory.mktemp("whole") / "run"
    words = ["detect", *SMALL, "--steps", "20", "--checkpoint", "4", "--data", str(data)]
    main([*words, "--out", str(out)])
    return out, words


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_was_stopped_goes_on_to_the_same_weights(whole, tmp_path, number):
    (whole, words), parts = whole, tmp_path / "parts"
    command = [sys.executable, "-m", "zoo", *words, "--out", str(parts)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        while process.poll() is None and not Run(parts).checkpoints():
            time.sleep(0.02)
        process.send_signal(number)
        assert process.stderr is not None
        told = process.stderr.read()
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    assert re.search(r"faster_rcnn 2/20 .* loss .* loss_classifier .* ETA", told)
    assert ("which is saved" in told) == (number == signal.SIGINT)
    assert Run(parts).load()["step"] < 20
    main(["detect", "--resume", str(parts)])
    for name in ("detector/model.safetensors", "metrics.jsonl", "results.json"):
        assert (parts / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.slow
def test_a_run_is_measured_on_the_way(data, tmp_path):
    out = tmp_path / "run"
    words = ["--evaluate", "2", "--ema", "0.5", "--data", str(data), "--out", str(out)]
    main(["detect", *SMALL, *FOUR, *words])
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    (row,) = [row for row in rows if row["kind"] == "eval"]
    assert row["step"] == 2 and "detect/box/AP50" in row


@pytest.mark.slow
def test_a_benchmark_that_was_stopped_goes_on_in_its_folder(data, tmp_path):
    training = DetectTraining(steps=4, batch=2, every=Every(log=1, checkpoint=2))
    settings = DetectSettings(
        detector="faster_rcnn", size=64, width=16, training=training, pictures=0
    )
    subject = Subject(name="eradio_nano", made=None, seed=3, work=tmp_path / "work")
    first = {n: v.value for n, v in detect(subject, data, settings) if "AP" in n}
    shutil.rmtree(subject.work / "checkpoints" / "step_00000004")
    again = {n: v.value for n, v in detect(subject, data, settings) if "AP" in n}
    assert first == again
    with pytest.raises(ValueError, match="cannot go on with other settings"):
        next(detect(subject, data, replace(settings, width=32)))


@pytest.mark.slow
def test_a_dry_run_tells_the_plan_and_writes_nothing(data, tmp_path, capsys):
    main(
        ["detect", *SMALL, *FOUR, "--data", str(data), "--out", str(tmp_path / "run"), "--dry-run"]
    )
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
    assert "There is no run in" in refused(capsys, "--resume", tmp_path)
    assert not out.exists()  # so the next try may have the same name
    out.mkdir()
    (out / "file").touch()
    assert "--out" in refused(capsys, "resnet18", "--data", data, *rest)


def test_a_run_of_an_earlier_version_is_refused_with_what_to_do(tmp_path, capsys):
    old = dict(backbone="resnet18", data="shapes", training=dict(steps=5), log=10, checkpoint=500)
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert "of an earlier version" in refused(capsys, "--resume", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(dict(kind="distill", data="x")))
    assert "is one of distill, not of detect" in refused(capsys, "--resume", tmp_path)


def test_the_flags_of_the_training_have_no_prefix():
    words = "resnet18 --lr 1e-4 --weight-decay 0.1 --warmup 0 --clip 0 --layer-decay 0.8 --log 3"
    run = read_args(words.split()).run
    assert run.optim == replace(
        Detect().optim, lr=1e-4, weight_decay=0.1, warmup=0.0, clip=0.0, layer_decay=0.8
    )
    assert (run.backbone, run.every.log) == ("resnet18", 3)


def test_what_an_evaluation_decides_is_refused_for_its_training():
    for name, value in dict(seed=1, device="cpu", out=Path("x"), data="photos").items():
        with pytest.raises(ValueError, match=f"detect.training.{name} is the evaluation's own"):
            DetectSettings(training=replace(DetectTraining(), **{name: value}))
