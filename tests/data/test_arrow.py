"""Tables as `datasets` writes them: written here with pyarrow, in the layout of `save_to_disk`."""

import io
import json
import pickle

import numpy as np
import pytest
from PIL import Image

from zoo.data.check import units
from zoo.data.loader import train_batches
from zoo.data.plan import Plan
from zoo.data.sources import open_source, open_splits
from zoo.data.text import open_text
from zoo.data.views import View
from zoo.files import cache_dir
from zoo.language.tokenizers import open_tokenizer

pa = pytest.importorskip("pyarrow", reason="pyarrow is an extra")
import pyarrow.parquet as pq  # noqa: E402


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "cache"))


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), value, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


FEATURES = dict(
    image={"_type": "Image"}, label={"names": ["cat", "dog", "owl"], "_type": "ClassLabel"}
)


def table(start: int, count: int, *, features=FEATURES, **columns):
    rows = range(start, start + count)
    data = dict(
        image=pa.array([dict(bytes=png(i), path=None) for i in rows],
                       pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        label=pa.array([i % 3 for i in rows], pa.int64()),
    )  # fmt: skip
    info = json.dumps(dict(info=dict(features=features)))
    return pa.table(data | columns, metadata=dict(huggingface=info) if features else None)


def write_stream(file, content, rows=2):
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, content.schema) as writer:
        writer.write_table(content, max_chunksize=rows)
    return file


def saved(folder, files=(5, 4), split="train"):
    """Write what `Dataset.save_to_disk` does."""
    folder.mkdir(parents=True)
    names, start = [], 0
    for number, count in enumerate(files):
        names.append(f"data-{number:05d}-of-{len(files):05d}.arrow")
        write_stream(folder / names[-1], table(start, count))
        start += count
    (folder / "state.json").write_text(
        json.dumps(dict(_data_files=[dict(filename=name) for name in names], _split=split))
    )
    splits = {split: dict(name=split, num_examples=start)}
    (folder / "dataset_info.json").write_text(json.dumps(dict(splits=splits, features=FEATURES)))
    return folder


def whole(source):
    return [source.read(i) for i in range(len(source))]


def test_a_saved_data_set_is_read_row_by_row_in_any_order(tmp_path):
    write_stream(saved(tmp_path / "d") / "cache-1a2b.arrow", table(50, 3))
    source = open_source(tmp_path / "d")
    assert source.classes == ("cat", "dog", "owl") and len(source) == 9
    for i in np.random.default_rng(0).permutation(9).tolist():
        assert source.read(i) == png(i) and source.label(i) == i % 3
    keys = [source.key(i) for i in range(9)]
    assert len(set(keys)) == 9 and keys[6] == "data-00001-of-00002.arrow/1"


@pytest.mark.parametrize("kind", ["stream", "file", "parquet", "bytes alone"])
def test_every_kind_of_table_holds_the_same_images(kind, tmp_path):
    content, folder = table(0, 7), tmp_path / "d"
    folder.mkdir()
    if kind == "bytes alone":
        content = pa.table(dict(jpg=[png(i) for i in range(7)], label=[i % 3 for i in range(7)]))
    if kind == "parquet":
        pq.write_table(content, folder / "a.parquet", row_group_size=3)
    elif kind == "file":
        place = str(folder / "a.arrow")
        with pa.OSFile(place, "wb") as sink, pa.ipc.new_file(sink, content.schema) as writer:
            writer.write_table(content, max_chunksize=2)
    else:
        write_stream(folder / "a.arrow", content)
    (file,) = folder.iterdir()
    for source in (open_source(folder), open_source(file)):
        assert whole(source) == [png(i) for i in range(7)]
        assert [source.label(i) for i in range(7)] == [i % 3 for i in range(7)]


def test_parquet_is_written_as_arrow_once_and_anew_when_it_changes(tmp_path):
    file = tmp_path / "a.parquet"
    pq.write_table(table(0, 3), file)
    for _ in range(2):
        assert whole(open_source(file)) == [png(i) for i in range(3)]
    assert len(list((cache_dir() / "arrow").glob("*.arrow"))) == 1
    pq.write_table(table(7, 4), file)
    assert whole(open_source(file)) == [png(i) for i in range(7, 11)]


def test_a_plan_shows_each_row_once_an_epoch_also_from_spawned_workers(tmp_path):
    source = open_source(saved(tmp_path / "d"))
    assert len(pickle.dumps(source)) < 1000  # a path and counts, not the images
    again = pickle.loads(pickle.dumps(source))
    seen = [
        (key, int(image[0, 0, 0]))
        for batch in train_batches(again, View(size=4), Plan(9, 3, 0), steps=3)
        for key, image in zip(batch["keys"], batch["images"], strict=True)
    ]
    assert sorted(seen) == [(source.key(i), i) for i in range(9)]


def test_parts_of_a_dataset_dict_and_of_a_hub_folder_are_train_and_val(tmp_path):
    saved(tmp_path / "d" / "train", split="train")
    saved(tmp_path / "d" / "test", files=(2,), split="test")
    (tmp_path / "d" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    hub = tmp_path / "hub"
    hub.mkdir()
    for name, start, count in (("train", 0, 5), ("train", 5, 4), ("test", 0, 2)):
        pq.write_table(table(start, count), hub / f"{name}-{start:05d}-of-00009.parquet")
    for folder in (tmp_path / "d", hub):
        train, val = open_splits(folder, 0.5)
        assert whole(train) == [png(i) for i in range(9)] and whole(val) == [png(0), png(1)]


def test_an_image_may_lie_in_a_file_beside_the_table(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "0.png").write_bytes(png(0))
    images = pa.array([dict(bytes=None, path="0.png"), dict(bytes=None, path="/dev/zero"),
                       dict(bytes=None, path=None), dict(bytes=png(3), path="3.png")],
                      pa.struct([("bytes", pa.binary()), ("path", pa.string())]))  # fmt: skip
    source = open_source(write_stream(tmp_path / "d" / "a.arrow", table(0, 4, image=images)))
    assert (source.read(0), source.read(3)) == (png(0), png(3))
    for index, reason in ((1, "/dev/zero, which is no file"), (2, "a.arrow/2 is empty")):
        with pytest.raises((OSError, ValueError), match=reason):
            source.read(index)


def test_images_without_a_label_have_no_classes(tmp_path, caplog):
    content = table(0, 3, label=pa.array([0, None, 2], pa.int64()))
    source = open_source(write_stream(tmp_path / "a.arrow", content))
    assert source.classes == () and source.label(0) is None
    assert "1 of 3 images" in caplog.text


def cut(folder):
    file = folder / "data-00001-of-00002.arrow"
    content = file.read_bytes()
    file.write_bytes(content[: content.index(png(6)) - 400])


def rewrite(folder, content):
    write_stream(folder / "data-00001-of-00002.arrow", content)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda d: (d / "data-00000-of-00002.arrow").unlink(), "is missing, which .*state.json"),
        (lambda d: rewrite(d, table(5, 3)), "has 8 rows, and 9 when it was saved"),
        (lambda d: (d / "data-00000-of-00002.arrow").write_bytes(b"nothing"), "not a readable tab"),
        (lambda d: (d / "data-00000-of-00002.arrow").write_bytes(b""), "not a readable table"),
        (cut, "not a readable table|has 5 rows|has [67] rows"),
        (lambda d: rewrite(d, table(5, 4, label=pa.array([0, 1, 2, 3]))), "label 3, and names 3"),
        (lambda d: rewrite(d, table(5, 4).drop_columns("image")), "has other columns"),
        (lambda d: (d / "state.json").write_text("{}"), "_data_files"),
    ],
)
def test_a_damaged_data_set_is_refused_in_a_line(damage, reason, tmp_path):
    damage(saved(tmp_path / "d"))
    with pytest.raises(ValueError, match=reason) as error:
        open_source(tmp_path / "d")
    assert "\n" not in str(error.value)


def test_a_table_that_is_none_of_images_is_refused_and_says_what_it_has(tmp_path):
    twice = table(0, 2, other=pa.array([b"", b""]), features={})
    texts = pa.table(dict(text=["a", "b"]))
    (tmp_path / "dict").mkdir()
    (tmp_path / "dict" / "dataset_dict.json").write_text('{"splits": ["en", "fr"]}')
    for name, content, reason in (
        ("twice", twice, r"2 columns of images \(image, other\)"),
        ("texts", texts, "There is no image in"),
        ("dict", None, "has the parts en, fr"),
    ):
        place = tmp_path / name if content is None else tmp_path / f"{name}.arrow"
        if content is not None:
            write_stream(place, content)
        with pytest.raises(ValueError, match=reason):
            open_source(place)
    with pytest.raises(ValueError, match="has the parts en, fr"):
        open_text(tmp_path / "dict", open_tokenizer("bytes"), 4)


def test_a_check_lists_the_rows_that_cannot_be_decoded_and_no_others(tmp_path):
    images = pa.array([png(0), b"nothing", png(2)[:-40]], pa.binary())
    write_stream(tmp_path / "a.arrow", table(0, 3, image=images))
    found = [unit() for unit in units(tmp_path / "a.arrow")]
    problems = [problem for one in found for problem in one.problems]
    assert [problem.place for problem in problems] == ["a.arrow/1", "a.arrow/2"]
    assert sum(one.images for one in found) == 1


def test_a_table_of_texts_has_the_tokens_of_its_lines(tmp_path):
    documents = ["one", "two words", "", "a third document"]
    lines = "\n".join(json.dumps(dict(text=text)) for text in documents)
    (tmp_path / "a.jsonl").write_text(lines)
    content = pa.table(dict(number=[1, 2, 3, 4], text=documents))
    write_stream(tmp_path / "a.arrow", content)
    pq.write_table(content, tmp_path / "a.parquet")
    opened = [open_text(tmp_path / f"a.{kind}", open_tokenizer("bytes"), 4)
              for kind in ("jsonl", "arrow", "parquet")]  # fmt: skip
    for text in opened[1:]:
        assert text.tokens.tolist() == opened[0].tokens.tolist()
        assert text.starts.tolist() == opened[0].starts.tolist()
    write_stream(tmp_path / "b.arrow", pa.table(dict(words=documents)))
    with pytest.raises(ValueError, match="no column of texts called text; it has words"):
        open_text(tmp_path / "b.arrow", open_tokenizer("bytes"), 4)


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_a_column_whose_name_is_no_text_is_refused_by_the_file(suffix, tmp_path):
    """pyarrow decodes names when they are asked for, with an error of Python's."""
    path = tmp_path / f"x{suffix}"
    table = pa.table({"imagename": [b"x"]})
    if suffix == ".parquet":
        pq.write_table(table, path, store_schema=False)
    else:
        with path.open("wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    path.write_bytes(path.read_bytes().replace(b"imagename", b"\x80magename"))
    with pytest.raises(ValueError, match=rf"x{suffix} is not a readable table: .* codec"):
        open_source(path)
