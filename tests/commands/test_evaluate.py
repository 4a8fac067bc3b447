"""`zoo eval` from target to result file: what is measured, kept and compared."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from zoo.cli import main
from zoo.commands.evaluate.compare import records_of
from zoo.commands.evaluate.run import evaluate, kept, read_data
from zoo.eval.benchmarks import BENCHMARKS, Benchmark
from zoo.eval.fewshot import FewshotSettings
from zoo.eval.registry import Picture, Scores
from zoo.eval.results import Record, read
from zoo.eval.subject import EvalRequest


@dataclass(frozen=True, kw_only=True)
class Planted:
    share: float = 0.5


def planted(subject, data, settings: Planted):
    """A benchmark as another author would write one."""
    keys = [f"{i}" for i in range(10)]
    right = np.arange(10) < round(10 * settings.share)
    yield "planted/top1", Scores(keys, right.astype(np.uint8))
    yield "planted/width", float(subject.student.size[0])
    yield "planted/first", Picture(np.zeros((8, 8, 3), np.uint8), "black")


def broken(subject, data, settings: Planted):
    """A benchmark that fails when it is half through."""
    yield "broken/top1", 50.0
    raise RuntimeError("out of memory")


@pytest.fixture
def with_broken(monkeypatch, with_planted):
    line = Benchmark(f"{__name__}:broken", "broken", "broken/top1")
    monkeypatch.setitem(BENCHMARKS, "broken", line)


@pytest.fixture
def with_planted(monkeypatch):
    line = Benchmark(f"{__name__}:planted", "planted", "planted/top1")
    monkeypatch.setitem(BENCHMARKS, "planted", line)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two classes that any network tells apart by their brightness."""
    root = tmp_path_factory.mktemp("eval") / "images"
    draws = np.random.default_rng(0)
    for split, each in (("train", 10), ("val", 6)):
        for number, name in enumerate(("dark", "light")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(each):
                noise = draws.normal(0, 4, (32, 32, 3))
                pixels = np.clip(20 + 200 * number + noise, 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


def asked(images, *on, **changes):
    return EvalRequest(on=on, data=dict.fromkeys(on, (images,)), size=64, **changes)


def test_planted_classes_score_one_hundred_and_the_line_holds_what_a_rerun_needs(images, tmp_path):
    out = tmp_path / "results.jsonl"
    evaluate("test_vit", asked(images, "knn", "linear", out=out, seed=3, command="zoo eval ..."))
    knn, linear = read(out)
    for record in (knn, linear):
        name = record.benchmark
        assert record.values == {f"{name}/top1": 100, f"{name}/mean_per_class": 100}
    assert knn.settings == {"k": 20, "temperature": 0.07, "folds": 0, "confusion": False}
    assert (knn.seed, knn.batch, knn.precision, knn.command) == (3, 64, "float32", "zoo eval ...")
    assert len(knn.weights_hash) == len(knn.data_hash) == 16
    assert knn.model["name"] == "test_vit" and knn.model["macs"] > 0
    assert {"python", "torch", "timm", "zoo"} <= set(knn.versions) and knn.machine["processor"]
    assert knn.scores()["knn/top1"].value == 100 and len(knn.scores()["knn/top1"].keys) == 12


def test_multiply_adds_are_those_of_the_size_that_a_benchmark_uses(images, tmp_path):
    from zoo.eval.settings import SegmentSettings
    from zoo.eval.speed.cost import cost

    streets, out = tmp_path / "streets", tmp_path / "results.jsonl"
    for part in ("train", "val"):
        for kind in ("images", "masks"):
            (streets / kind / part).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (96, 96), (i, 0, 0)).save(streets / "images" / part / f"{i}.png")
            mask = Image.fromarray(np.arange(96 * 96, dtype=np.uint8).reshape(96, 96) % 2)
            mask.save(streets / "masks" / part / f"{i}.png")
    (streets / "classes.json").write_text('["a", "b"]')
    short = SegmentSettings(crop=96, stride=96, steps=1, batch=2, warmup=0, pictures=0)
    evaluate(
        "test_vit",
        EvalRequest(
            on=("knn", "segment"),
            data={"knn": (images,), "segment": (streets,)},
            settings={"segment": short},
            size=64,
            out=out,
        ),
        show=False,
    )
    knn, segment = read(out)
    assert (knn.size, segment.size) == (64, 96)
    for record in (knn, segment):
        assert record.model["macs"] == cost("test_vit,num_classes=0", record.size)[1]


def test_a_model_without_weights_is_drawn_by_the_seed(images):
    hashes = [
        evaluate("test_vit", asked(images, "knn", seed=seed), show=False)[0].weights_hash
        for seed in (0, 0, 1)
    ]
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_benchmark_plugs_in_by_one_line_of_the_table(images, tmp_path, with_planted, capsys):
    out = tmp_path / "results.jsonl"
    command = f"eval test_vit --on planted --planted.share 0.7 --size 64 --data {images}"
    main([*command.split(), "--out", str(out)])
    (record,) = read(out)
    assert record.values == {"planted/top1": pytest.approx(70), "planted/width": 64}
    assert record.settings == {"share": 0.7}
    assert (tmp_path / record.pictures[0]["file"]).is_file()
    assert "planted/top1" in capsys.readouterr().out


def test_data_may_be_named_for_one_benchmark_and_several_times(images, tmp_path):
    words = [str(images), f"knn={tmp_path}", f"knn={images}"]
    found = read_data(words, ["knn", "linear", "speed"])
    assert found == {"knn": (tmp_path, images), "linear": (images,)}
    odd = tmp_path / "knn=x"
    odd.mkdir()
    assert read_data([str(odd)], ["knn"]) == {"knn": (odd,)}  # a folder that is there is meant


def test_two_models_are_compared_from_one_file_and_from_scratch(images, tmp_path, capsys):
    out = tmp_path / "results.jsonl"
    for name in ("test_vit", "test_convnext"):
        evaluate(name, asked(images, "knn", out=out), show=False)
    main(["eval", "--compare", f"{out}:test_vit", f"{out}:test_convnext"])
    told = capsys.readouterr().out
    assert "knn/top1" in told and "[+0.00, +0.00]" in told and "12" in told
    with pytest.raises(ValueError, match="name one"):
        records_of(str(out), EvalRequest())
    with pytest.raises(ValueError, match="no result of 'resnet'"):
        records_of(f"{out}:resnet", EvalRequest())
    both = f"eval --compare test_vit test_vit --on knn --size 64 --data {images}"
    main(both.split())
    assert "[+0.00, +0.00]" in capsys.readouterr().out


def test_a_dry_run_reads_no_image_and_writes_nothing(images, tmp_path, capsys):
    out = tmp_path / "results.jsonl"
    command = f"eval vit_giant_patch14_dinov2 --on knn,speed --data {images} --knn.k 5 --dry-run"
    main([*command.split(), "--out", str(out)])
    told = " ".join(capsys.readouterr().out.split())
    assert "knn" in told and "k=5" in told and "speed" in told
    assert not out.exists()


def test_a_dry_run_refuses_what_an_evaluation_would(images, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["eval", "test_vit", "--dry-run"])
    assert "knn needs data" in capsys.readouterr().err
    out = tmp_path / "r.jsonl"
    evaluate("test_vit", asked(images, "knn", out=out))
    main(["eval", "--compare", f"{out}:test_vit", "test_vit", "--data", str(images), "--dry-run"])
    assert "12 + 0" not in capsys.readouterr().out


def test_a_dry_run_counts_the_images_and_refuses_data_that_does_not_fit(images, tmp_path, capsys):
    main(["eval", "test_vit", "--on", "knn", "--size", "64", "--data", str(images), "--dry-run"])
    told = capsys.readouterr().out
    assert "20 + 12, 2 classes" in told and "s for the network" in told
    Image.new("RGB", (32, 32)).save(tmp_path / "alone.png")
    Image.new("RGB", (32, 32)).save(tmp_path / "other.png")
    with pytest.raises(SystemExit):
        main(["eval", "test_vit", "--on", "knn", "--data", str(tmp_path), "--dry-run"])
    assert "has no classes" in capsys.readouterr().err


def test_every_benchmark_stands_in_the_help_of_on(capsys):
    from zoo.commands.evaluate.args import EvalArgs

    with pytest.raises(SystemExit):
        main(["eval", "--help"])
    told = capsys.readouterr().out
    assert all(name in told for name in BENCHMARKS) and "--device" in told and EvalArgs


def test_checks_of_all_benchmarks_come_before_the_first_number(images, tmp_path, capsys):
    out = tmp_path / "results.jsonl"
    words = ["eval", "test_vit", "--on", "knn,zeroshot", "--size", "64", "--data", str(images)]
    with pytest.raises(SystemExit):
        main([*words, "--zeroshot.teacher", "open_clip:ViT-B-32", "--out", str(out)])
    assert "has no head 'ViT-B-32'" in capsys.readouterr().err
    assert not out.exists()


def test_windows_step_by_two_thirds_of_a_crop_of_any_size(images, tmp_path):
    from zoo.eval.dense.windows import stride_of
    from zoo.eval.settings import DepthSettings, SegmentSettings

    assert stride_of(SegmentSettings()) == 341 and stride_of(DepthSettings()) == 320
    assert stride_of(SegmentSettings(crop=96)) == 64
    assert stride_of(SegmentSettings(crop=96, stride=90)) == 90


def test_options_of_zoo_detect_are_those_of_its_training(capsys):
    from zoo.commands.evaluate.args import _spelt_out

    given = ["--detect.steps", "5", "--detect.optim.lr=1e-3", "--detect.size", "64"]
    assert _spelt_out([*given, "--detect.training.batch", "2"]) == [
        "--detect.training.steps", "5", "--detect.training.optim.lr=1e-3", "--detect.size", "64",
        "--detect.training.batch", "2",
    ]  # fmt: skip


def test_speed_is_recorded_with_its_spread_and_the_load_of_the_machine(tmp_path):
    from zoo.eval.settings import SpeedSettings

    out, settings = tmp_path / "r.jsonl", {"speed": SpeedSettings(rounds=4)}
    evaluate("test_vit", EvalRequest(on=("speed",), size=64, batch=2, settings=settings, out=out))
    (record,) = read(out)
    rates = [record.values[f"speed/{name}"] for name in ("img_s_low", "img_s", "img_s_high")]
    assert 0 < rates[0] <= rates[1] <= rates[2]
    assert record.load is not None and record.load >= 0


def test_what_was_measured_before_a_benchmark_refused_is_shown_and_kept(images, tmp_path, capsys):
    out = tmp_path / "results.jsonl"
    settings = {"fewshot": FewshotSettings(shots=(99,))}
    with pytest.raises(ValueError, match="smallest class has 10 images"):
        evaluate("test_vit", asked(images, "knn", "fewshot", out=out, settings=settings))
    assert "knn/top1" in capsys.readouterr().out
    assert [record.benchmark for record in read(out)] == ["knn"]


def test_a_benchmark_that_fails_is_named_and_counted_while_the_others_go_on(
    images, with_broken, tmp_path, capsys
):
    out = tmp_path / "r.jsonl"
    words = f"eval test_vit --on planted,broken,knn --size 32 --data {images} --out {out}"
    with pytest.raises(SystemExit) as stop:
        main(words.split())
    told = capsys.readouterr()
    assert stop.value.code and [r.benchmark for r in read(out)] == ["planted", "knn"]
    assert f"FAILED broken of test_vit on {images}: out of memory" in told.err
    assert "1 of 3 measurements failed" in told.err and "knn/top1" in told.out
    with pytest.raises(RuntimeError, match="out of memory"):  # alone, its error is the answer
        evaluate("test_vit", asked(images, "broken"))


def test_unlabelled_images_are_refused_by_name(tmp_path):
    for number in range(4):
        Image.new("RGB", (32, 32)).save(tmp_path / f"{number}.png")
    with pytest.raises(ValueError, match="has no classes"):
        evaluate("test_vit", asked(Path(tmp_path), "knn"), show=False)


def test_every_line_of_a_result_file_is_json(images, tmp_path):
    out = tmp_path / "results.jsonl"
    evaluate("test_vit", asked(images, "knn", "fewshot", out=out), show=False)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["benchmark"] for line in lines] == ["knn", "fewshot"]
    assert set(lines[1]["values"]) >= {"fewshot/1/top1", "fewshot/1/low", "fewshot/10/high"}


@pytest.mark.parametrize("extra", [".ipynb_checkpoints", "a_class_of_train_alone"])
def test_folders_of_train_and_val_are_matched_by_name(images, extra, tmp_path):
    data = tmp_path / "images"
    shutil.copytree(images, data)
    (data / "train" / extra).mkdir()
    for i in range(2):
        Image.new("RGB", (32, 32), (255, 0, 40 * i)).save(data / "train" / extra / f"{i}.png")
    for record in evaluate("test_vit", asked(data, "knn", "linear")):
        assert record.values[f"{record.benchmark}/top1"] == 100


def test_unreadable_images_are_in_no_number_and_recorded(images, tmp_path):
    data = tmp_path / "images"
    shutil.copytree(images, data)
    for i in range(4):
        (data / "val" / "dark" / f"{i}.png").write_bytes(b"nothing")
    out = tmp_path / "r.jsonl"
    (record,) = evaluate("test_vit", asked(data, "knn", out=out))
    assert len(record.kept["knn/top1"].keys) == 8
    assert record.unreadable == read(out)[0].unreadable == 4


def test_a_result_that_cannot_be_written_any_more_is_shown(tmp_path, capsys):
    (tmp_path / "full").write_text("a file where a folder should be")
    request = EvalRequest(out=tmp_path / "full" / "results.jsonl")
    record = Record(target="mine", benchmark="knn", values={"knn/top1": 12.3456})
    with pytest.raises(OSError, match="The result above was not written to"):
        kept(record, request, {}, {})
    assert "12.3456" in capsys.readouterr().out
