"""Torn files: an evaluation has the numbers of the others, and counts what it left out."""

import json

import numpy as np
import pytest
from PIL import Image

from zoo.commands.evaluate.run import evaluate, table_of
from zoo.eval.dense.correspondence import CorrespondenceSettings, correspondence
from zoo.eval.dense.depth import DepthSettings, depth
from zoo.eval.dense.segment import SegmentSettings, segment
from zoo.eval.examples import Example
from zoo.eval.registry import Picture, Scores
from zoo.eval.results import Record
from zoo.eval.subject import EvalRequest

CROPS = dict(crop=32, stride=16, steps=8, batch=2, lr=0.1)
BENCHMARKS = dict(
    segment=(segment, SegmentSettings(**CROPS)),
    depth=(depth, DepthSettings(**CROPS, max_depth=9.0)),
    correspondence=(correspondence, CorrespondenceSettings()),
)


def noise(path, size=(40, 36)):
    """Write a picture that takes many bytes, so that half of them decode to less than all of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(str(path))).integers(256, size=(*size[::-1], 3))
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return path


def cut(path):
    """Cut the second half off: the header is whole, and the size in it."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def dense(root, kind):
    """Write four pairs of pictures with targets for training, and five for the validation."""
    for split, count in (("train", 4), ("val", 5)):
        (root / kind / split).mkdir(parents=True)
        for i in range(count):
            picture = noise(root / "images" / split / f"{i}.png")
            target = np.asarray(Image.open(picture))[:, :, 0] % 3
            target = target.astype(np.uint8) if kind == "masks" else (target + 1) * np.uint16(1000)
            Image.fromarray(target).save(root / kind / split / f"{i}.png")
    (root / "classes.json").write_text(json.dumps(["red", "green", "blue"]))
    return [root / "images" / "val" / f"{i}.png" for i in range(5)]


def spair(root, _):
    """Write four pairs of pictures, each of two of its own."""
    (root / "PairAnnotation" / "test").mkdir(parents=True)
    for i in range(4):
        for side in "st":
            noise(root / "JPEGImages" / "cat" / f"{i}{side}.png")
        about = dict(
            category="cat", src_imname=f"{i}s.png", trg_imname=f"{i}t.png",
            src_kps=[[16, 16], [30, 20]], trg_kps=[[24, 16], [9, 20]],
            src_imsize=[40, 36, 3], trg_imsize=[40, 36, 3], trg_bndbox=[4, 4, 36, 30],
        )  # fmt: skip
        (root / "PairAnnotation" / "test" / f"{i}.json").write_text(json.dumps(about))
    return [root / "JPEGImages" / "cat" / f"{i}t.png" for i in range(4)]


def without(root, files, name):
    """Remove the torn files, as somebody would who knew of them."""
    for file in files:
        if name == "correspondence":
            (root / "PairAnnotation" / "test" / f"{file.name[0]}.json").unlink()
        else:
            file.unlink()


def numbers(found):
    return {
        n: x.value if isinstance(x, Scores) else x
        for n, x in found
        if not isinstance(x, Picture | Example)
    }


@pytest.mark.parametrize("name", BENCHMARKS)
def test_torn_images_are_in_no_number_and_counted(name, planted, tmp_path):
    run, settings = BENCHMARKS[name]
    build = spair if name == "correspondence" else dense
    files = build(tmp_path, dict(segment="masks", depth="depth").get(name))
    for file in files[:2]:
        cut(file)
    who = planted(lambda x: x[..., ::4, ::4])
    got = numbers(run(who, tmp_path, settings))
    assert who.unreadable == {str(file) for file in files[:2]}
    without(tmp_path, files[:2], name)
    who = planted(lambda x: x[..., ::4, ::4])
    assert got == numbers(run(who, tmp_path, settings)) and not who.unreadable
    for file in files[2:]:
        cut(file)
    count = len(files) - 2
    said = rf"{count} images (in a row are unreadable|cannot be read)"
    with pytest.raises(ValueError, match=said):
        numbers(run(who, tmp_path, settings))


@pytest.mark.parametrize("name", ["segment", "depth"])
def test_a_torn_image_of_a_heads_training_is_replaced_and_counted(name, planted, tmp_path):
    run, settings = BENCHMARKS[name]
    dense(tmp_path, dict(segment="masks", depth="depth")[name])
    torn = tmp_path / "images" / "train" / "1.png"
    cut(torn)
    who = planted(lambda x: x[..., ::4, ::4])
    assert numbers(run(who, tmp_path, settings)) and who.unreadable == {str(torn)}


def test_a_torn_mask_or_depth_takes_its_image_with_it(planted, tmp_path):
    dense(tmp_path / "a", "masks")
    cut(tmp_path / "a" / "masks" / "val" / "1.png")
    dense(tmp_path / "b", "depth")
    for split, count in (("train", 4), ("val", 5)):
        for i in range(count):
            file = tmp_path / "b" / "depth" / split / f"{i}.png"
            np.save(file.with_suffix(".npy"), np.asarray(Image.open(file)) / np.float32(1000))
            file.unlink()
    cut(tmp_path / "b" / "depth" / "val" / "1.npy")
    for folder, name in (("a", "segment"), ("b", "depth")):
        run, settings = BENCHMARKS[name]
        who = planted(lambda x: x[..., ::4, ::4])
        assert numbers(run(who, tmp_path / folder, settings))
        assert who.unreadable == {str(tmp_path / folder / "images" / "val" / "1.png")}


def test_each_benchmark_of_an_evaluation_counts_its_own(tmp_path):
    """A folder of both kinds: kNN lacks one image, the segmentation two."""
    files = dense(tmp_path, "masks")
    for split in ("train", "val"):
        for i in range(2):
            noise(tmp_path / "own" / split / "cat" / f"{i}.png")
            noise(tmp_path / "own" / split / "dog" / f"{i}.png")
    cut(tmp_path / "own" / "val" / "dog" / "1.png")
    for file in files[:2]:
        cut(file)
    data = dict(knn=(tmp_path / "own",), segment=(tmp_path,), linear=(tmp_path / "own",))
    request = EvalRequest(
        on=tuple(data), data=data, size=32, settings=dict(segment=BENCHMARKS["segment"][1])
    )
    records = evaluate("test_vit", request, show=False)
    assert [record.unreadable for record in records] == [1, 2, 1]


def test_the_terminal_says_what_was_left_out(capsys):
    from rich.console import Console

    record = Record(target="mine", benchmark="segment", values={"segment/miou": 50.0}, unreadable=3)
    Console(width=120).print(table_of([record]))
    assert "unreadable images, left out" in capsys.readouterr().out
