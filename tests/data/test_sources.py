import gc
import io
import tarfile
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from zoo.data.loader import eval_batches, train_batches
from zoo.data.plan import Plan
from zoo.data.sources import (
    FolderSource,
    TarSource,
    open_labelled,
    open_source,
    open_splits,
    spread,
)
from zoo.data.views import View, Views, collate


def picture(seed: int, size=(40, 32), kind="PNG") -> bytes:
    draws = np.random.default_rng(seed)
    buffer = io.BytesIO()
    pixels = draws.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def write_folder(root, classes=("cat", "dog"), each=3):
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(each):
            (root / name / f"{i}.png").write_bytes(picture(10 * number + i))
    return root


def write_shard(path, count=5, start=0, labels=True):
    with tarfile.open(path, "w") as tar:
        for i in range(start, start + count):
            entries = {f"{i:04d}.png": picture(i)}
            if labels:
                entries[f"{i:04d}.cls"] = str(i % 2).encode()
            for name, data in entries.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def test_a_folder_has_its_subfolders_as_classes(tmp_path):
    source = open_source(write_folder(tmp_path))
    assert isinstance(source, FolderSource)
    assert source.classes == ("cat", "dog")
    assert [source.label(i) for i in range(6)] == [0, 0, 0, 1, 1, 1]
    assert source.key(4) == "dog/1.png"


def test_shards_have_the_bytes_and_labels_that_webdataset_reads(tmp_path):
    wds = pytest.importorskip("webdataset", reason="webdataset is an extra")
    write_shard(tmp_path / "a-000.tar")
    write_shard(tmp_path / "a-001.tar", start=5)
    source = open_source(tmp_path)
    urls = sorted(str(p) for p in tmp_path.glob("*.tar"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset closes none of its files
        theirs = list(wds.WebDataset(urls, shardshuffle=False))
        gc.collect()
    assert isinstance(source, TarSource) and len(source) == len(theirs) == 10
    for i, sample in enumerate(theirs):
        assert source.read(i) == sample["png"]
        assert source.label(i) == int(sample["cls"])


def test_a_segmentation_sample_is_one_image(tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name in ("x.jpg", "x.png"):
            data = picture(0, kind="JPEG" if name.endswith("jpg") else "PNG")
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    source = open_source(tmp_path / "s.tar")
    assert len(source) == 1 and source.key(0) == "s.tar/x.jpg"


def test_train_and_val_parts_are_taken_as_they_are(tmp_path):
    write_folder(tmp_path / "train", each=4)
    write_folder(tmp_path / "val", each=2)
    train, val = open_splits(tmp_path, 0.5)
    assert (len(train), len(val)) == (8, 4)
    shards = tmp_path / "shards"
    shards.mkdir()
    write_shard(shards / "train-000.tar")
    write_shard(shards / "val-000.tar", count=3)
    train, val = open_splits(shards, 0.5)
    assert (len(train), len(val)) == (5, 3)


def test_held_out_images_are_no_training_images_and_stay_held_out(tmp_path):
    write_folder(tmp_path, each=10)
    train, val = open_splits(tmp_path, 0.25)
    ours, theirs = ({s.key(i) for i in range(len(s))} for s in (train, val))
    assert len(theirs) == 5 and len(ours) == 15 and not ours & theirs
    again = open_splits(tmp_path, 0.25)[1]
    assert {again.key(i) for i in range(len(again))} == theirs


def test_a_few_samples_of_a_sorted_folder_are_of_all_its_classes(tmp_path):
    source = open_source(write_folder(tmp_path, classes=("ant", "bee", "cat", "dog"), each=5))
    few = spread(source, 8)
    assert [few.label(i) for i in range(len(few))] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert spread(source, 20) is source


def test_an_empty_folder_and_a_missing_one_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no image in"):
        open_source(tmp_path)
    with pytest.raises(ValueError, match="no data at"):
        open_source(tmp_path / "gone")
    (tmp_path / "broken.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(ValueError, match="not a readable tar"):
        open_source(tmp_path)


@pytest.mark.parametrize("size", [(300, 200), (17, 90), (8, 8)])
def test_views_are_square_bytes_of_the_given_size(size):
    view = View(size=24)
    data = picture(0, size, "JPEG")
    for seed in range(20):
        pixels = view.train(data, np.random.default_rng(seed))
        assert pixels.shape == (3, 24, 24) and pixels.dtype == np.uint8
    assert view.evaluate(data).shape == (3, 24, 24)


def test_a_crop_of_a_reduced_jpeg_is_that_of_the_full_one():
    ramp = np.linspace(0, 255, 1024, dtype=np.uint8)
    image = np.stack([np.tile(ramp, (768, 1)), np.tile(ramp[:768, None], (1, 1024))], -1)
    image = np.concatenate([image, np.zeros_like(image[..., :1])], -1)
    packed = {}
    for kind in ("JPEG", "PNG"):  # only a JPEG can be decoded at a fraction of its size
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, kind, quality=98)
        packed[kind] = buffer.getvalue()
    view = View(size=32)
    for seed in range(5):
        jpeg, png = (view.train(packed[k], np.random.default_rng(seed)).astype(int) for k in packed)
        assert np.abs(jpeg - png).max() <= 6


def test_an_unreadable_image_is_named_and_replaced_by_its_neighbour(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "cat" / "1.png").write_bytes(b"\x89PNG broken")
    (tmp_path / "cat" / "2.png").write_bytes(picture(2)[:-200])
    source = open_source(tmp_path)
    views = Views(source, View(size=8), Plan(len(source), 2, 0))
    item = views[(0, 1)]
    assert item["skipped"] == ["cat/1.png", "cat/2.png"]
    assert item["key"] == "dog/0.png" and item["label"] == 1
    assert collate([item, views[(1, 0)]])["skipped"] == ["cat/1.png", "cat/2.png"]


def test_a_folder_of_unreadable_files_is_an_error(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"nothing")
    source = open_source(tmp_path)
    with pytest.raises(ValueError, match=r"unreadable, from a\.jpg"):
        Views(source, View(size=8), Plan(1, 1, 0))[(0, 0)]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_that_starts_later_gives_the_same_batches(tmp_path, workers):
    source = open_source(write_folder(tmp_path, each=5))
    plan, view = Plan(len(source), 4, 1), View(size=16)
    whole = list(train_batches(source, view, plan, steps=6, start=0, workers=workers))
    later = list(train_batches(source, view, plan, steps=6, start=4, workers=workers))
    assert len(whole) == 6 and len(later) == 2
    for ours, theirs in zip(later, whole[4:], strict=True):
        assert torch.equal(ours["images"], theirs["images"]) and ours["keys"] == theirs["keys"]


def test_evaluation_batches_are_in_order_and_end_at_the_limit(tmp_path):
    source = open_source(write_folder(tmp_path, each=4))
    batches = list(eval_batches(source, 16, 3, limit=7))
    assert [len(b.keys) for b in batches] == [3, 3, 1]
    assert batches[2].labels.tolist() == [1]


def test_a_npz_of_encoded_images_is_split_labelled_and_read(tmp_path):
    for split, count in (("train", 4), ("val", 2)):
        encoded = []
        for i in range(count):
            buffer = io.BytesIO()
            Image.fromarray(np.full((8, 8, 3), 40 * i, np.uint8)).save(buffer, format="PNG")
            encoded.append(buffer.getvalue())
        np.savez(
            tmp_path / f"{split}.npz",
            data=np.frombuffer(b"".join(encoded), np.uint8),
            offsets=np.cumsum([0, *map(len, encoded)]),
            labels=np.arange(count, dtype=np.uint8) % 2,
        )
    train, val = open_splits(tmp_path, 0.5)
    assert (len(train), len(val)) == (4, 2) and list(train.classes) == ["0", "1"]
    assert [train.label(i) for i in range(4)] == [0, 1, 0, 1]
    assert View(size=8).evaluate(train.read(3)).max() == 120
    assert len({train.key(i) for i in range(4)}) == 4


def test_a_npz_of_something_else_is_refused(tmp_path):
    np.savez(tmp_path / "weights.npz", weight=np.zeros(3))
    with pytest.raises(ValueError, match="no data, offsets and labels"):
        open_source(tmp_path / "weights.npz")


@pytest.mark.parametrize(
    "damage",
    [
        dict(offsets=np.array([0, 9, 5])),
        dict(offsets=np.array([0, 5, 99])),
        dict(offsets=np.array([-1, 5, 9])),
        dict(offsets=np.array([0.0, 5, 9])),
        dict(labels=np.array([0, -1])),
        dict(labels=np.array(["cat", "dog"])),
        dict(labels=np.zeros((2, 2), int)),
        dict(data=np.zeros(9, np.float32)),
    ],
)
def test_a_npz_whose_parts_do_not_fit_together_is_refused_by_name(damage, tmp_path):
    parts = dict(data=np.zeros(9, np.uint8), offsets=np.array([0, 5, 9]), labels=np.array([3, 8]))
    np.savez(tmp_path / "good.npz", **parts)
    assert open_source(tmp_path / "good.npz").classes == ("3", "8")
    np.savez(tmp_path / "bad.npz", **parts | damage)
    with pytest.raises(ValueError, match=r"bad\.npz"):
        open_source(tmp_path / "bad.npz")


def test_labels_of_both_parts_are_matched_by_name(tmp_path, caplog):
    write_folder(tmp_path / "train", ("cat", "dog", "fish"))
    write_folder(tmp_path / "val", ("dog", "fish", "zebra"))
    train, val = open_labelled(tmp_path, 0.5)
    assert list(train.classes) == list(val.classes) == ["cat", "dog", "fish", "zebra"]
    for part in (train, val):
        names = [part.key(i).split("/")[0] for i in range(len(part))]
        assert [part.classes[part.label(i)] for i in range(len(part))] == names
    assert "val of" in caplog.text and "lacks 1 classes: cat" in caplog.text
    assert "train of" in caplog.text and "lacks 1 classes: zebra" in caplog.text


def test_numbers_of_shards_are_matched_as_names(tmp_path):
    write_shard(tmp_path / "train-0.tar", 4)
    write_folder(tmp_path / "val", ("1", "10"))
    train, val = open_labelled(tmp_path, 0.5)
    assert list(train.classes) == list(val.classes) == ["0", "1", "10"]
    assert [val.label(i) for i in range(6)] == [1, 1, 1, 2, 2, 2]


def test_parts_without_a_common_class_have_none_and_it_is_said(tmp_path, caplog):
    write_folder(tmp_path / "train", ("cat", "dog"))
    write_folder(tmp_path / "val", ("a", "b"))
    train, val = open_labelled(tmp_path, 0.5)
    assert not train.classes and not val.classes and train.label(0) is None
    assert "no class in common" in caplog.text
    assert open_splits(tmp_path, 0.5)[0].classes == ("cat", "dog")


@pytest.mark.parametrize("name", ["train", "val"])
def test_one_part_alone_keeps_its_classes_and_is_split(name, tmp_path):
    write_folder(tmp_path / name, each=10)
    train, val = open_splits(tmp_path, 0.2)
    assert list(train.classes) == list(val.classes) == ["cat", "dog"]
    assert (len(train), len(val)) == (16, 4)


def test_a_class_may_be_called_train(tmp_path):
    write_folder(tmp_path, ("bus", "train"))
    assert open_splits(tmp_path, 0.5)[0].classes == ("bus", "train")


def test_unreadable_images_are_left_out_of_an_evaluation_and_named_once(tmp_path, caplog):
    source = open_source(write_folder(tmp_path, each=15))
    for i in (0, 3, 4, 5, 20):
        (tmp_path / source.key(i)).write_bytes(b"nothing")
    unreadable: set[str] = set()
    for _ in range(2):
        batches = list(eval_batches(source, 8, 3, unreadable=unreadable))
        assert sum(len(b.keys) for b in batches) == 25
        assert [len(b.images) for b in batches] == [len(b.labels) for b in batches]
        assert all(
            k.split("/")[0] == source.classes[b.labels[i]]
            for b in batches
            for i, k in enumerate(b.keys)
        )
    assert unreadable == {source.key(i) for i in (0, 3, 4, 5, 20)}
    assert caplog.text.count("is left out of the evaluation") == 5


def test_an_evaluation_of_unreadable_files_is_an_error_that_says_why(tmp_path):
    write_folder(tmp_path)
    for file in tmp_path.rglob("*.png"):
        file.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"6 images in a row .* cat/0\.png .*it is none of"):
        list(eval_batches(open_source(tmp_path), 8, 4))
