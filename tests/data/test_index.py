"""The index beside shards: the same images as their headers give, mapped, and never a stale one."""

import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from zoo.cli import main
from zoo.data.index import INDEX, ShardIndex
from zoo.data.plan import mix
from zoo.data.sources import _by_hash, open_labelled, open_source, open_splits
from zoo.files import load_tensors, save_tensors


def write(path, files):
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def content(source):
    """Return the name, the class and the bytes of each image."""
    names = source.classes
    return [
        (source.key(i), names and names[source.label(i)], source.read(i))
        for i in range(len(source))
    ]


@pytest.fixture
def shards(tmp_path):
    for number, name in enumerate(("test-0", "train-0", "train-1", "val-0", "z")):
        files = {"a\udcff.tif": b"tif", "deep/b.seg.png": b"no picture of its own"}
        for i in range(number + 2):
            files |= {f"{name}/{i}.jpg": bytes([number, i]), f"{name}/{i}.cls": str(7 * i).encode()}
        files["a\udcff.cls"] = b"70"
        write(tmp_path / f"{name}.tar", files)
    return tmp_path


def test_an_indexed_folder_has_the_same_images_names_and_labels(shards, caplog, capsys):
    before = [open_source(shards), open_source(shards / "z.tar"), *open_splits(shards, 0.5)]
    main(["data", "index", str(shards)])
    assert "25 images in 5 shards" in capsys.readouterr().out
    after = [open_source(shards), open_source(shards / "z.tar"), *open_splits(shards, 0.5)]
    for ours, theirs in zip(after, before, strict=True):
        assert ours.index.mapped and not theirs.index.mapped
        assert content(ours) == content(theirs) and ours.classes == theirs.classes
    assert content(pickle.loads(pickle.dumps(after[2]))) == content(before[2])
    assert not caplog.text


def test_an_index_is_mapped_and_a_worker_is_told_where_it_lies(tmp_path):
    rows = np.zeros((10**6, 6), np.int64)
    write(tmp_path / "a.tar", {"a.jpg": b"x"})
    made = ShardIndex.scan([tmp_path / "a.tar"])
    fields = {name: getattr(made, name) for name in ("folder", "shards", "stamps", "names")}
    ShardIndex(**fields, rows=rows).save()
    source = open_source(tmp_path)
    assert len(source) == 10**6 and len(pickle.dumps(source)) < 2000
    again = pickle.loads(pickle.dumps(source))
    assert again.index.rows.shape == rows.shape
    if (maps := Path("/proc/self/maps")).exists():
        assert INDEX in maps.read_text()


@pytest.mark.parametrize("change", ["size", "time", "new"])
def test_a_stale_index_is_not_used_and_it_is_said(change, shards, caplog):
    main(["data", "index", str(shards)])
    path = shards / ("new.tar" if change == "new" else "z.tar")
    if change == "time":
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    else:
        write(path, {"other.jpg": b"other", "other.cls": b"7"})
    source = open_source(shards)
    assert source.index.mapped is None
    assert f"1 of {5 + (change == 'new')} shards changed or came since ({path.name}" in caplog.text
    assert f"zoo data index {shards} writes it anew" in caplog.text
    caplog.clear()
    assert len(open_splits(shards, 0.5)[0]) == 4 + 5 and not caplog.text  # those did not change
    main(["data", "index", str(shards)])
    assert content(open_source(shards)) == content(source) and not caplog.text


def test_a_damaged_index_or_one_of_something_else_is_not_used(shards, caplog):
    main(["data", "index", str(shards)])
    path, count = shards / INDEX, len(open_source(shards))
    good = load_tensors(path)
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    bad = [bytes(damaged), bytes(damaged[:-9]), b"", b"no tensors" * 99]
    rows = good["rows"].clone()
    rows[0, 0] = 9
    for other in (
        {"weight": torch.zeros(3)},
        good | {"rows": good["rows"][:, :5].contiguous()},
        good | {"rows": good["rows"].float()},
        good | {"rows": rows},
        good | {"stamps": good["stamps"][:2]},
    ):
        save_tensors(other, path)
        bad.append(path.read_bytes())
    for data in bad:
        path.write_bytes(data)
        caplog.clear()
        source = open_source(shards)
        assert len(source) == count and source.index.mapped is None
        assert "index.safetensors is not used" in caplog.text


def test_shards_in_train_and_val_get_an_index_each(tmp_path, capsys):
    for part in ("train", "val"):
        (tmp_path / part).mkdir()
        write(tmp_path / part / "0.tar", {"0.jpg": b"x", "0.cls": b"3"})
    main(["data", "index", str(tmp_path)])
    assert capsys.readouterr().out.count("1 images in 1 shards") == 2
    assert all(part.index.mapped for part in open_labelled(tmp_path, 0.5))


def test_names_of_classes_beside_shards_take_the_place_of_numbers(tmp_path):
    write(tmp_path / "a.tar", {"0.jpg": b"x", "0.cls": b"2", "1.jpg": b"y", "1.cls": b"0"})
    assert open_source(tmp_path).classes == ("0", "2")
    (tmp_path / "classes.json").write_text('["cat", "dog", "emu"]')
    source = open_source(tmp_path)
    assert [source.classes[source.label(i)] for i in range(2)] == ["emu", "cat"]
    (tmp_path / "classes.json").write_text('["cat", "dog"]')
    with pytest.raises(ValueError, match=r"names 2 classes, and a \.cls file holds 2"):
        open_source(tmp_path)


def test_held_out_names_are_those_with_the_least_hash():
    names = [f"{'x' * (i % 5)}{i}".encode() for i in range(300)] + [b"same", b"same"]
    assert _by_hash(names).tolist() == sorted(range(302), key=lambda i: mix(*names[i]))


@pytest.mark.parametrize("indexed", [False, True])
def test_damaged_shards_are_refused_or_left_out_by_name_and_the_rest_is_as_before(
    indexed, shards, caplog
):
    if indexed:
        main(["data", "index", str(shards)])
    train, val = (content(part) for part in open_splits(shards, 0.5))
    cut = shards / "train-1.tar"
    cut.write_bytes(cut.read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"train-1\.tar (is not a readable|ends without)"):
        open_splits(shards, 0.5)
    lost: dict[str, str] = {}
    parts = open_splits(shards, 0.5, lost)
    assert content(parts[0]) == [one for one in train if one[0].startswith("train-0.tar")]
    assert content(parts[1]) == val
    assert list(lost) == [str(cut)] and "train-1.tar" in lost[str(cut)]
    assert caplog.text.count("A shard is left out: ") == 1
    (shards / "train-0.tar").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="No shard can be read: "):
        open_splits(shards, 0.5, {})


def test_a_shard_that_the_index_lists_and_that_is_gone_is_refused_or_left_out(shards, caplog):
    main(["data", "index", str(shards)])
    train, val = (content(part) for part in open_splits(shards, 0.5))
    (shards / "train-0.tar").unlink()
    for opened in (open_source, lambda path: open_splits(path, 0.5)):
        with pytest.raises(
            ValueError, match=r"1 shards are missing in .*train-0\.tar first.* lists"
        ):
            opened(shards)
    assert len(open_source(shards / "train-1.tar")) == 5  # named, so the others do not matter
    lost: dict[str, str] = {}
    parts = open_splits(shards, 0.5, lost)
    assert content(parts[0]) == [one for one in train if one[0].startswith("train-1.tar")]
    assert content(parts[1]) == val and parts[0].index.mapped
    assert list(lost) == [str(shards / "train-0.tar")] and "train-0.tar is missing" in caplog.text
    main(["data", "index", str(shards)])
    assert content(open_splits(shards, 0.5)[0]) == content(parts[0])
