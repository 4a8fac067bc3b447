"""Shards that are read from front to back: webdataset's own order, gone on with anywhere."""

import gc
import io
import pickle
import shlex
import tarfile
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import zoo.data.stream as module
from zoo.data.feed import plan_of
from zoo.data.loader import PlanSampler, train_batches
from zoo.data.stream import StreamPlan, StreamSource, open_stream, samples_of
from zoo.data.views import View
from zoo.train.distill.config import Distill
from zoo.train.distill.setup import open_data

wds = pytest.importorskip("webdataset", reason="webdataset is an extra")


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), value, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_shard(path, values):
    with tarfile.open(path, "w") as tar:
        for value in values:
            for end, data in (("txt", b"a caption"), ("png", png(value)), ("seg.png", png(0))):
                info = tarfile.TarInfo(f"{value:04d}.{end}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    for number in range(3):
        write_shard(folder / f"s-{number}.tar", range(1 + 7 * number, 8 + 7 * number))
    return folder


def value_of(data: bytes) -> int:
    return Image.open(io.BytesIO(data)).getpixel((0, 0))[0]


def test_images_come_in_the_order_in_which_webdataset_reads_them(shards):
    urls = [str(shards / f"s-{number}.tar") for number in (2, 0)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset closes none of its files
        theirs = [sample["png"] for sample in wds.WebDataset(urls, shardshuffle=False)]
        gc.collect()
    ours = list(samples_of(urls))
    assert [sample.data for sample in ours] == theirs and len(theirs) == 14
    assert ours[0].key == "s-2.tar/0015.png"


@pytest.mark.parametrize("form", ["{0}/s-{{0..2}}.tar", "pipe:cat {0}/s-{{0..2}}.tar",
                                  "file:{0}/s-{{0..1}}.tar::pipe:gzip -c {0}/s-2.tar"])  # fmt: skip
def test_files_and_commands_give_the_same_stream_and_its_first_images_are_held_out(
    form, shards, monkeypatch
):
    monkeypatch.setattr(module, "HELD_OUT", 4)
    train, val = open_stream("stream:" + form.format(shlex.quote(str(shards))))
    assert [value_of(val.read(i)) for i in range(len(val))] == [1, 2, 3, 4]
    assert [value_of(train.read(i)) for i in range(20)] == [*range(5, 22), 5, 6, 7]


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 99), block=st.integers(1, 40), num_slices=st.sampled_from([1, 2, 4, 6]),
    each=st.integers(1, 4), steps=st.integers(1, 12), data=st.data(),
)  # fmt: skip
def test_ranks_slices_and_resumes_together_read_every_place_of_the_stream_once(
    seed, block, num_slices, each, steps, data
):
    plan = StreamPlan(2**62, num_slices * each, seed, block=block)
    stops = sorted(data.draw(st.lists(st.integers(0, steps), max_size=3)))
    seen: list[tuple[int, int]] = []
    for start, end in zip([0, *stops], [*stops, steps], strict=True):
        world = data.draw(st.sampled_from([w for w in range(1, 7) if num_slices % w == 0]))
        share = num_slices // world
        for rank in range(world):
            slices = range(rank * share, (rank + 1) * share)
            seen += [s for part in PlanSampler(plan, start, end, num_slices, slices) for s in part]
    seen.sort()
    total = steps * num_slices * each
    assert [position for position, _ in seen] == list(range(total))
    indices = [index for _, index in seen]
    for begin in range(0, total, block):
        here = indices[begin : begin + block]
        assert set(here) <= set(range(begin, begin + block)) and len(set(here)) == len(here)


@settings(deadline=None, max_examples=10)
@given(start=st.integers(0, 50), jumps=st.lists(st.integers(0, 70), max_size=4))
def test_a_place_has_one_image_however_it_is_reached(shards, start, jumps):
    source = StreamSource((str(shards / "s-0.tar"), str(shards / "s-1.tar")), held=3, block=4)
    for index in (start, *jumps):
        assert value_of(source.read(index)) == 4 + index % 11


@pytest.mark.parametrize("workers", [0, 2])
def test_two_ranks_and_then_one_show_each_image_once_a_pass(workers, shards):
    source = StreamSource((f"pipe:cat {shlex.quote(str(shards / 's-0.tar'))}",), held=1, block=3)
    plan, view = plan_of(source, 4, 0), View(size=4)

    def seen(slices, start, steps):
        parts = train_batches(source, view, plan, start=start, steps=steps, workers=workers,
                              num_slices=2, slices=slices)  # fmt: skip
        rows = (zip(b["positions"], b["images"], b["keys"], strict=True) for b in parts)
        return [(place, int(image[0, 0, 0]), key) for row in rows for place, image, key in row]

    found = sorted(seen([0], 0, 2) + seen([1], 0, 2) + seen([0, 1], 2, 3))
    assert [position for position, *_ in found] == list(range(12))
    for begin in (0, 6):
        assert sorted(value for _, value, _ in found[begin : begin + 6]) == [2, 3, 4, 5, 6, 7]
    assert all(key == f"s-0.tar/{value:04d}.png" for _, value, key in found)


def test_a_source_that_is_sent_to_a_worker_begins_anew(shards):
    source = StreamSource((str(shards / "s-0.tar"),), held=1, block=3)
    source.read(4)
    again = pickle.loads(pickle.dumps(source))
    assert value_of(again.read(0)) == 2 and again.key(1) == "s-0.tar/0003.png"
    assert again.key(40) == "image 40 of the stream"


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda data: data[:512], "after 7 images of the stream: .*end"),
        (lambda data: data[:-10240], "ends without tar's end mark|unexpected end of data"),
        (lambda data: b"", "ends without tar's end mark|empty"),
        (lambda data: b"nothing" * 999, "after 7 images"),
        (lambda data: data + data, "goes on behind tar's end mark"),
    ],
)
def test_a_shard_that_is_cut_or_damaged_stops_the_stream(spoil, reason, shards, tmp_path):
    good, bad = shards / "s-0.tar", tmp_path / "bad.tar"
    bad.write_bytes(spoil((shards / "s-1.tar").read_bytes()))
    with pytest.raises(ValueError, match=reason) as error:
        list(samples_of([str(good), str(bad)]))
    assert str(bad) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("pipe:cat {0}/s-0.tar; exit 3", "exit 3"),
        ("pipe:false", "broke off after 0 images"),
        ("{0}/s-9.tar", "No such file"),
        ("nowhere://x/s.tar", "nowhere"),
        ("", "names no shards"),
    ],
)
def test_what_cannot_be_opened_is_refused_in_a_line(name, reason, shards):
    with pytest.raises(ValueError, match=reason) as error:
        open_stream("stream:" + name.format(shards))
    assert "\n" not in str(error.value)


def test_a_pass_of_another_length_is_refused(shards, tmp_path):
    path = write_shard(tmp_path / "a.tar", [1, 2, 3, 4])
    source = StreamSource((str(path),), held=1, block=2)
    source.read(5)
    write_shard(path, [1, 2, 3])
    with pytest.raises(ValueError, match="gave 2 images, and the one before 3"):
        source.read(10)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (dict(view_epochs=1), "leave out --cache and --view-epochs"),
        (dict(teachers=("pretext:gradients",)), "pretext:gradients is trained on the images first"),
        (dict(data="a=1,stream:b.tar=2"), "has no place in a mixture"),
    ],
)
def test_what_needs_images_in_any_order_refuses_a_stream(fields, reason):
    from zoo.train.distill.config import TeacherSpec

    teachers = tuple(map(TeacherSpec.parse, fields.get("teachers", ())))
    with pytest.raises(ValueError, match=reason):
        Distill(**dict(data="stream:a.tar") | fields | dict(teachers=teachers))


def test_a_run_on_a_stream_has_images_of_its_own_to_be_measured_on(shards, monkeypatch):
    monkeypatch.setattr(module, "HELD_OUT", 4)
    train, val, labelled = open_data(Distill(data=f"stream:{shards}/s-{{0..2}}.tar"))
    assert isinstance(train, StreamSource) and len(val) == 4 and labelled is None
