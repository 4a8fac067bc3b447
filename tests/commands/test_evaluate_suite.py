"""Named protocols, suites and repeated lines of `zoo eval`, end to end on small images."""

import numpy as np
import pytest
from PIL import Image

from zoo.cli import main
from zoo.commands.evaluate.suite import read_suite
from zoo.eval.protocols import PROTOCOLS, departures_of
from zoo.eval.results import read


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root, draws = tmp_path_factory.mktemp("suite") / "photos", np.random.default_rng(0)
    for split, each in (("train", 6), ("val", 3)):
        for number, name in enumerate(("dark", "light")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(each):
                noise = draws.normal(0, 4, (32, 32, 3))
                pixels = np.clip(20 + 200 * number + noise, 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def streets(tmp_path_factory):
    root = tmp_path_factory.mktemp("suite") / "streets"
    for part in ("train", "val"):
        for kind in ("images", "masks"):
            (root / kind / part).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (64, 64), (i, 0, 0)).save(root / "images" / part / f"{i}.png")
            mask = np.arange(64 * 64, dtype=np.uint8).reshape(64, 64) % 2
            Image.fromarray(mask).save(root / "masks" / part / f"{i}.png")
    (root / "classes.json").write_text('["a", "b"]')
    return root


def test_two_protocols_run_and_say_what_departs(images, streets, tmp_path, capsys):
    out = tmp_path / "r.jsonl"
    words = ["eval", "test_vit", "--protocol", "imagenet-knn,radio-ade20k", "--size", "64"]
    words += ["--data", str(images), "--data", f"segment={streets}", "--out", str(out)]
    short = "--segment.steps 2 --segment.batch 2 --segment.crop 64 --segment.stride 48"
    main([*words, *short.split(), "--segment.warmup", "0"])
    told = capsys.readouterr().out
    assert "imagenet-knn (DINO" in told and "images of 64 px instead of 224" in told
    assert "steps 2 instead of 80000" in told and "photometric distortion" in told
    knn, segment = read(out)
    assert knn.settings["k"] == 20 and knn.settings["temperature"] == 0.07
    assert knn.settings["folds"] == 0 and "DINO" in (knn.protocol or "")
    assert segment.settings["weight_decay"] == 0 and "crop 64 instead of 512" in segment.protocol
    assert knn.values["knn/top1"] == 100


def test_every_protocol_is_listed_with_its_source_and_departures(capsys):
    main(["list", "protocols"])
    told = capsys.readouterr().out
    for name, make in PROTOCOLS.items():
        protocol = make()
        assert name in told and protocol.source in told and protocol.departures
        assert departures_of(protocol, protocol.settings) == list(protocol.departures)
    with pytest.raises(SystemExit):
        main(["eval", "test_vit", "--protocol", "imagenet-kn", "--data", "x"])
    assert "Did you mean imagenet-knn?" in capsys.readouterr().err


def test_a_suite_is_one_evaluation_for_each_target_seed_and_size(images, tmp_path, capsys):
    suite, out = tmp_path / "suite.toml", tmp_path / "r.jsonl"
    suite.write_text(
        'targets = ["test_vit"]\n[[eval]]\non = ["knn"]\n'
        f'data = "{images}"\nsize = [32, 64]\nseed = [0, 1]\n"knn.k" = 3\n"knn.confusion" = false\n'
    )
    main(["eval", "--suite", str(suite), "--out", str(out)])
    found = read(out)
    assert [(r.size, r.seed) for r in found] == [(32, 0), (32, 1), (64, 0), (64, 1)]
    assert all(r.settings["k"] == 3 for r in found)
    assert "4/4  zoo eval test_vit --on knn" in capsys.readouterr().out


def test_a_wrong_line_of_a_suite_is_said_before_the_first_is_measured(images, tmp_path, capsys):
    suite, out = tmp_path / "suite.toml", tmp_path / "r.jsonl"
    good = f'[[eval]]\ntarget = "test_vit"\non = "knn"\ndata = "{images}"\nsize = 32\n'
    suite.write_text(good + good.replace('"knn"', '"knnn"'))
    with pytest.raises(SystemExit):
        main(["eval", "--suite", str(suite), "--out", str(out)])
    assert "no benchmark 'knnn'" in capsys.readouterr().err and not out.exists()
    suite.write_text("on = 3\n")
    with pytest.raises(ValueError, match="a suite has targets"):
        read_suite(suite)


def test_an_evaluation_of_a_suite_that_fails_does_not_end_it(images, tmp_path, capsys):
    suite, out = tmp_path / "suite.toml", tmp_path / "r.jsonl"
    for part in ("train/a", "train/b", "val/a", "val/b"):
        (images.parent / "torn" / part).mkdir(parents=True)
        (images.parent / "torn" / part / "0.png").write_bytes(b"no picture")
    good = f'[[eval]]\ntarget = "test_vit"\non = "knn"\ndata = "{images}"\nsize = 32\n'
    suite.write_text(good.replace("photos", "torn") + good)
    with pytest.raises(SystemExit) as stop:
        main(["eval", "--suite", str(suite), "--out", str(out)])
    told = capsys.readouterr().err
    assert stop.value.code and "1 of 2 evaluations failed" in told and "FAILED zoo eval" in told
    assert [r.data for r in read(out)] == [str(images)]
    suite.write_text(good + good.replace("photos", "nowhere"))  # found before any work
    out.unlink()
    with pytest.raises(SystemExit):
        main(["eval", "--suite", str(suite), "--out", str(out)])
    assert "no data at" in capsys.readouterr().err and not out.exists()


def test_a_line_is_measured_again_to_the_same_number(images, tmp_path, capsys):
    out, later = tmp_path / "r.jsonl", tmp_path / "later.jsonl"
    words = ["--on", "knn", "--size", "32", "--seed", "3", "--data", str(images), "--knn.k", "3"]
    main(["eval", "test_vit", *words, "--out", str(out)])
    main(["eval", "--again", f"{out}:1", "--out", str(later)])
    told = capsys.readouterr().out
    (first,), (second,) = read(out), read(later)
    assert first.identity == second.identity and dict(first.values) == dict(second.values)
    assert "recorded" in told and "not the same" not in told
    (images / "val" / "dark" / "more.png").write_bytes(
        (images / "val" / "dark" / "0.png").read_bytes()
    )
    main(["eval", "--again", str(out)])
    assert "not the same data" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["eval", "--again", f"{out}:9"])
    assert "no line 9" in capsys.readouterr().err
