"""`zoo embed`: shards that hold what the model says, and go on where they stopped."""

import json
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from zoo.cli import main
from zoo.commands.embed import Embed, embed
from zoo.commands.evaluate.run import evaluate
from zoo.eval.stored import about_features, load_features, read_part
from zoo.eval.subject import EvalRequest, open_subject
from zoo.train.interrupt import Interrupted


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("embed") / "images"
    draws = np.random.default_rng(0)
    for split, each in (("train", 7), ("val", 4)):
        for name in "ab":
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(each):
                pixels = draws.integers(0, 255, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


def asked(images, out, **changes):
    fields = dict(data=images, out=out, model="test_vit", size=64, batch=4, rows=6, kind="npz")
    return Embed(**fields | changes)


def test_shards_hold_what_the_model_says_in_the_order_of_the_data(images, tmp_path):
    embed(asked(images, tmp_path / "out", half=False))
    names = sorted(path.name for path in (tmp_path / "out").glob("*.npz"))
    assert names == [f"train-00000{i}.npz" for i in range(3)] + [
        f"val-00000{i}.npz" for i in (0, 1)
    ]
    subject = open_subject("test_vit", EvalRequest(size=64))
    stored = load_features(tmp_path / "out")
    for ours, theirs in zip(stored, subject.extracted(images), strict=True):
        assert ours.keys == theirs.keys
        assert torch.equal(ours.labels, theirs.labels)
        # batches of another length take other paths through the products
        torch.testing.assert_close(ours.summaries, theirs.summaries, rtol=1e-4, atol=1e-5)


def test_stored_features_score_like_the_images_that_they_came_from(images, tmp_path, capsys):
    out, results = tmp_path / "out", tmp_path / "r.jsonl"
    command = f"embed {images} {out} --model test_vit --size 64 --rows 5 --kind npz --no-half"
    main(command.split())
    main(["eval", "--features", str(out), "--on", "knn,linear", "--out", str(results)])
    capsys.readouterr()
    data = dict(knn=(images,), linear=(images,))
    records = evaluate(
        "test_vit", EvalRequest(on=("knn", "linear"), data=data, size=64), show=False
    )
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert [line["values"] for line in lines] == [record.values for record in records]
    for line, record in zip(lines, records, strict=True):
        assert line["weights_hash"] == record.weights_hash
        assert line["data_hash"] == record.data_hash
        assert line["features"] == str(out) and line["data"] == str(images)


def test_a_missing_shard_is_made_again_and_the_others_are_left_alone(images, tmp_path):
    out = tmp_path / "out"
    embed(asked(images, out))
    before = read_part(out, "train")
    written = {path: path.stat().st_mtime_ns for path in out.glob("*.npz")}
    (out / "train-000001.npz").unlink()
    with pytest.raises(ValueError, match="run the zoo embed command again"):
        read_part(out, "train")
    embed(asked(images, out))
    after = read_part(out, "train")
    assert torch.equal(before.summaries, after.summaries) and before.keys == after.keys
    again = {path: path.stat().st_mtime_ns for path in out.glob("*.npz")}
    assert [p.name for p in written if again[p] != written[p]] == ["train-000001.npz"]


def test_a_signal_keeps_the_full_shards_and_the_same_command_goes_on(images, tmp_path, monkeypatch):
    out = tmp_path / "out"
    from zoo.data import views as data

    evaluate_view = data.View.evaluate
    seen = []

    def interrupting(view, content):
        seen.append(None)
        if len(seen) == 9:  # inside the second shard
            os.kill(os.getpid(), signal.SIGINT)
        return evaluate_view(view, content)

    monkeypatch.setattr(data.View, "evaluate", interrupting)
    with pytest.raises(Interrupted, match="the same command continues"):
        embed(asked(images, out, batch=2))
    there = {path.name for path in out.glob("*.npz")}
    assert there == {"train-000000.npz"}
    monkeypatch.undo()
    embed(asked(images, out, batch=2))
    embed(asked(images, tmp_path / "whole", batch=2))
    for part in ("train", "val"):
        ours, theirs = (read_part(place, part) for place in (out, tmp_path / "whole"))
        assert ours.keys == theirs.keys and torch.equal(ours.summaries, theirs.summaries)


def test_another_model_or_setting_is_refused_in_the_same_folder(images, tmp_path):
    embed(asked(images, tmp_path / "out"))
    with pytest.raises(ValueError, match=r"other features \(.*weights_hash"):
        embed(asked(images, tmp_path / "out", model="test_convnext"))
    with pytest.raises(ValueError, match="rows: 6, not 5"):
        embed(asked(images, tmp_path / "out", rows=5))


def test_wrong_settings_are_refused_before_anything_is_written(images, tmp_path):
    with pytest.raises(ValueError, match="rows is 0"):
        asked(images, tmp_path / "out", rows=0)
    with pytest.raises(ValueError, match="There is no data"):
        embed(asked(tmp_path / "nowhere", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_parquet_without_pyarrow_is_refused_with_the_way_out(images, tmp_path, monkeypatch):
    monkeypatch.setattr("zoo.commands.embed_request.find_spec", lambda name: None)
    assert asked(images, tmp_path / "out").form == "npz"
    with pytest.raises(ValueError, match=r"backbone-zoo\[parquet\].*--kind npz does not"):
        asked(images, tmp_path / "out", kind="parquet")


def test_parquet_holds_the_same_as_npz(images, tmp_path):
    pytest.importorskip("pyarrow", reason="Parquet is written with it")
    for kind in ("npz", "parquet"):
        embed(asked(images, tmp_path / kind, kind=kind))
    assert about_features(tmp_path / "parquet")["form"] == "parquet"
    for part in ("train", "val"):
        ours, theirs = (read_part(tmp_path / kind, part) for kind in ("npz", "parquet"))
        assert ours.keys == theirs.keys and torch.equal(ours.labels, theirs.labels)
        assert torch.equal(ours.summaries, theirs.summaries)


def test_the_throughput_stands_beside_the_models_own(images, tmp_path, capsys):
    embed(asked(images, tmp_path / "out", bench=True))
    told = " ".join(capsys.readouterr().out.split())
    assert "img/s after each part's first shard" in told
    assert (
        "zoo bench, test_vit,num_classes=0 eager float32 4x64" in told
        and "embedding reaches" in told
    )


@pytest.mark.parametrize("kind", ["npz", "parquet"])
def test_unreadable_images_are_left_out_of_the_shards_and_counted(kind, tmp_path):
    pytest.importorskip("pyarrow")
    data, out = tmp_path / "images", tmp_path / "out"
    draws = np.random.default_rng(0)
    for split, name in ((s, n) for s in ("train", "val") for n in "ab"):
        (data / split / name).mkdir(parents=True)
        for i in range(8):
            pixels = draws.integers(0, 255, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(data / split / name / f"{i}.png")
    lost = ["a/1.png", "a/6.png", "b/0.png", "b/1.png", "b/2.png"]  # one shard has one left
    for name in lost:
        (data / "val" / name).write_bytes(b"no image")
    embed(asked(data, out, rows=4, batch=3, kind=kind))
    train, val = load_features(out)
    assert (len(train.keys), len(val.keys)) == (16, 11)
    assert list(val.unreadable) == lost and not set(val.keys) & set(lost)
    assert val.labels.tolist() == ["ab".index(key[0]) for key in val.keys]
    (record,) = evaluate(None, EvalRequest(on=("knn",), features=out, data=dict(knn=(out,))))
    assert record.unreadable == 5
    (out / f"val-000002.{kind}").unlink()
    embed(asked(data, out, rows=4, batch=3, kind=kind))
    assert read_part(out, "val").keys == val.keys


def test_a_shard_with_fewer_rows_than_images_is_refused(images, tmp_path):
    embed(asked(images, tmp_path))
    shard = tmp_path / "train-000001.npz"
    with np.load(shard) as file:
        some = {k: file[k][:-1] for k in file.files if k != "unreadable"}
    np.savez(shard, **some)
    with pytest.raises(ValueError, match=r"train-000001\.npz has 5 rows for 6 images"):
        read_part(tmp_path, "train")


@pytest.mark.parametrize(
    ("field", "value"),
    [("rows", 0), ("rows", "6"), ("parts", {"train": 3}), ("classes", "ab"), ("form", "csv")],
)
def test_a_damaged_index_of_features_is_refused_by_name(field, value, images, tmp_path):
    embed(asked(images, tmp_path))
    index = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps(index | {field: value}))
    with pytest.raises(ValueError, match=r"index\.json"):
        load_features(tmp_path)
