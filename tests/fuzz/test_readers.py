"""Every reader of files, with damaged and odd ones: a value, or an error that names the file.

`make fuzz` tries FUZZ_INPUTS=100000 in all, with seeds that it prints; CI some hundreds. An input
that breaks the promise is kept in `cases/READER/`, and from then on tried each time.
"""

import hashlib
import io
import json
import os
import resource
import signal
import struct
import tarfile
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from PIL import Image

from zoo.data.images import EncodedImage
from zoo.data.sources import open_source
from zoo.data.views import View
from zoo.eval.dense.correspondence import read_spair
from zoo.eval.dense.depth import DepthSet
from zoo.eval.dense.segment_data import Place, own_classes, read_indices
from zoo.eval.detect.coco import read_coco
from zoo.eval.detect.coco_metric import read_results
from zoo.eval.detect.detector import read_spec
from zoo.eval.report.maps import load_maps
from zoo.eval.report.run_folder import read_run
from zoo.eval.results import Record, read, write
from zoo.eval.retrieval import read_captions
from zoo.eval.stored import StoredShard, about_features, read_shard, write_shard
from zoo.features import Features
from zoo.files import load_tensors, read_json, save_tensors
from zoo.students.export import read_heads
from zoo.teachers.cache import Cache, CacheManifest, _open_shard
from zoo.train.config import to_json
from zoo.train.distill.config import Distill
from zoo.train.distill.recipes import quickstart
from zoo.train.run import Run
from zoo.weights import read_checkpoint

INPUTS = int(os.environ.get("FUZZ_INPUTS", "500"))
"""Inputs over all readers."""
SEED = int(os.environ.get("FUZZ_SEED", "1"))
SECONDS = 20
"""Most time for one input of some kilobytes; the slowest takes a tenth of a second."""
MEBIBYTES = 1536
"""Most memory that a reader's inputs may add: an image of 179 million pixels takes 0.9 GiB."""
CASES = Path(__file__).parent / "cases"
ODD = (
    None, True, 0, -1, 1.5, 2**31, 2**63, 10**400, 1e308, float("nan"), float("inf"), "", "x",
    "\ud800", "../x", "a\0b", [], {}, [[]], {"": None}, [None] * 3, [0] * 99,
)  # fmt: skip
ODD_ARRAYS = (
    np.zeros(0), np.zeros((2, 2)), np.array(3), np.array(["x", "y"]), np.array([-1, 5, 2]),
    np.array([0, 2**62]), np.array([1.5, np.nan]), np.array([1j]), np.array(["2020"], "M8[D]"),
    np.zeros(2, [("a", "u1")]), np.array([True]), np.array([b"x"]),
)  # fmt: skip


@dataclass(frozen=True)
class Reader:
    """A reader, whole files for it, and the name that its errors must hold."""

    read: Callable[[Path], Any]
    name: str
    """Of the file that is damaged, in a folder that `around` fills."""
    seeds: Callable[[], list[bytes]]
    around: Callable[[Path], None] = lambda folder: None
    mend: Callable[[bytes], bytes] = bytes
    """Makes checksums right again, so that damage behind them is reached."""


# ---------------------------------------------------------------- damage


@st.composite
def damaged_bytes(draw, seeds: list[bytes]) -> bytes:
    """Flip, cut, insert, repeat and overwrite bytes of a whole file."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 5))):
        at, span = draw(st.integers(0, len(data))), draw(st.integers(1, 64))
        kind = draw(st.integers(0, 6))
        if kind == 0:
            data[at : at + 1] = bytes([draw(st.integers(0, 255))])
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            del data[at : at + span]
        elif kind == 3:
            data[at:at] = data[at : at + span]
        elif kind == 4:
            data[at:at] = draw(st.binary(max_size=16))
        else:
            number = draw(st.sampled_from((0, 1, 2**15, 2**16 - 1, 2**31 - 1, 2**32 - 1)))
            data[at : at + 4] = struct.pack("<I" if kind == 5 else ">I", number)
    return bytes(data)


def places(tree: Any) -> list[tuple[Any, Any]]:
    """List every value of a JSON tree as (container, key)."""
    keys = tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    return [place for key in keys for place in ((tree, key), *places(tree[key]))]


@st.composite
def odd_json(draw, seeds: list[bytes]) -> bytes:
    """Replace, remove or repeat values of a whole JSON file, or of one line of several."""
    lines = draw(st.sampled_from(seeds)).decode().split("\n{")
    which = draw(st.integers(0, len(lines) - 1))
    tree = json.loads("{" * bool(which) + lines[which])
    for _ in range(draw(st.integers(1, 3))):
        if not (known := places(tree)):
            break
        inside, key = draw(st.sampled_from(known))
        kind = draw(st.integers(0, 3))
        if kind == 0:
            del inside[key]
        elif kind == 1 and isinstance(inside, list):
            inside.append(inside[key])
        else:
            inside[key] = deepcopy(draw(st.sampled_from(ODD)))
    lines[which] = json.dumps(tree)[bool(which) :]
    text = "\n{".join(lines)
    if draw(st.integers(0, 30)) == 0:
        text = text.replace("1", "[" * 100_000, 1)
    return text.encode()


@st.composite
def odd_arrays(draw, seeds: list[bytes]) -> bytes:
    """Replace, remove or rename arrays of a whole `.npz` file."""
    arrays = dict(np.load(io.BytesIO(draw(st.sampled_from(seeds)))))
    for _ in range(draw(st.integers(1, 2))):
        name = draw(st.sampled_from(sorted(arrays))) if arrays else "x"
        kind = draw(st.integers(0, 4))
        if kind == 0:
            arrays.pop(name, None)
        elif kind == 1 and name in arrays:
            arrays[name] = arrays[name][..., :-1] if arrays[name].ndim else arrays[name]
        else:
            arrays[name] = draw(st.sampled_from(ODD_ARRAYS))
    return packed(**arrays)


def strategy(reader: Reader) -> st.SearchStrategy[bytes]:
    seeds = reader.seeds()
    kinds = [damaged_bytes(seeds).map(reader.mend), st.binary(max_size=300)]
    if ".json" in reader.name:
        kinds += [odd_json(seeds)] * 6
    if reader.name.endswith(".npz"):
        kinds += [odd_arrays(seeds)] * 2
    return st.one_of([kinds[0], *kinds])


def mend_png(data: bytes) -> bytes:
    """Write the checksums of a PNG's chunks anew."""
    out, at = bytearray(data), 8
    while data.startswith(b"\x89PNG") and at + 12 <= len(data):
        end = at + 8 + struct.unpack(">I", data[at : at + 4])[0]
        out[end : end + 4] = struct.pack(">I", zlib.crc32(data[at + 4 : end]))
        at = end + 4
    return bytes(out[: len(data)])


def mend_tar(data: bytes) -> bytes:
    """Write the checksums of a tar's headers anew."""
    out = bytearray(data)
    for at in range(0, len(data) - 511, 512):
        if data[at + 257 : at + 262] == b"ustar":
            block = out[at : at + 148] + b" " * 8 + out[at + 156 : at + 512]
            out[at + 148 : at + 156] = b"%06o\0 " % sum(block)
    return bytes(out)


# ---------------------------------------------------------------- whole files


def packed(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def text_of(content: Any) -> bytes:
    return json.dumps(content).encode()


def image(kind: str, mode: str = "RGB", **options: Any) -> bytes:
    pixels = np.arange(12 * 10 * 3, dtype=np.uint8).reshape(10, 12, 3)
    picture = Image.fromarray(pixels)
    if mode == "I;16":
        picture = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    buffer = io.BytesIO()
    picture.convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


@cache
def images() -> list[bytes]:
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "PPM", "GIF")
    grey = [image(kind, "I;16") for kind in ("PNG", "TIFF")]
    return [image(k) for k in kinds] + [image("JPEG", exif=exif), image("PNG", "P")] + grey


def masks() -> list[bytes]:
    return [image("PNG", mode) for mode in ("L", "P", "I;16", "1")] + [image("TIFF", "L")]


def shards() -> list[bytes]:
    found = []
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
            for name, data in {
                "a.png": image("PNG"),
                "a.cls": b"3",
                "b" * 90 + ".jpg": b"",
            }.items():
                info = tarfile.TarInfo(name if form == tarfile.USTAR_FORMAT else "é" * 40 + name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        found.append(buffer.getvalue()[:4096] + bytes(1024))
    return found


def encoded_set() -> list[bytes]:
    data = image("PNG")
    return [
        packed(
            data=np.frombuffer(data * 2, np.uint8),
            offsets=np.array([0, len(data), 2 * len(data)]),
            labels=np.array([1, 4]),
        )
    ]


ROWS = StoredShard(["a", "b"], np.array([0, 1]), np.ones((2, 4), np.float16), ["c"])


def stored(form: str, folder: Path | None = None) -> list[bytes]:
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "shard"
        write_shard(path, ROWS, form)  # type: ignore[arg-type]
        return [path.read_bytes()]


INDEX = dict(
    model=dict(target="test_vit", name="test_vit", size=64, parameters=9, macs=None),
    weights_hash="ab", data="images", data_hash="cd", precision="float32", dtype="float16",
    form="npz", rows=6, parts=dict(train=3, val=3), classes=["a"], labels="by name", command=None,
)  # fmt: skip
BOX = dict(id=1, image_id=10, category_id=3, bbox=[1, 2, 3, 4], area=12.0, iscrowd=0)
COCO = dict(
    images=[dict(id=10, file_name="a.png", width=12, height=10)],
    categories=[dict(id=3, name="cat")],
    annotations=[
        BOX | dict(segmentation=[[1, 1, 5, 1, 5, 5]]),
        BOX | dict(id=2, segmentation=dict(size=[10, 12], counts=[20, 30, 70])),
        BOX | dict(id=3, segmentation=dict(size=[10, 12], counts="P164000000000l0")),
    ],
)
SPAIR = dict(
    category="cat", src_imname="a.png", trg_imname="a.png", src_kps=[[1, 2]], trg_kps=[[3, 4]],
    src_imsize=[12, 10, 3], trg_imsize=[12, 10, 3], trg_bndbox=[0, 0, 5, 5], mirror=0,
)  # fmt: skip
CAPTIONS = dict(
    images=[dict(id=10, file_name="a.png")], annotations=[dict(image_id=10, caption=" a cat ")]
)
MANIFEST = CacheManifest(
    images=2, data="ab", seed=0, views=1, view=dict(size=8), normalise="phi_s", stored="int8",
    shard=2, teachers=dict(t=dict(
        name="x", fingerprint="y", precision="float32", size=[8, 8], grid=[2, 2], summary_dim=4,
        spatial_dim=4,
    )),
)  # fmt: skip
HEADS = dict(
    student="test_vit", size=96, teachers=dict(a=[24, None]), head=dict(kind="v2", hidden=8),
    options=dict(depth=1), own_heads={}, tokens={}, about=dict(licenses=dict(a=None)),
)  # fmt: skip
DETECTOR = dict(
    kind="retinanet", classes=["a", "b"], size=96, width=32, class_agnostic=False, score=0.05,
    source=dict(name="resnet10t", options={}, levels=[2, 3], strides=[8, 16], mean=[0.5], std=[1.0],
                getter=True, weights=None),
)  # fmt: skip
METRICS = [
    dict(kind="train", step=1, loss=0.5), dict(kind="eval", step=2, arm="student", knn=9.0),
]  # fmt: skip


def beside(folder: Path, **files: bytes) -> None:
    """Write files into a folder; `__` in a name is a folder, `_` before the ending a dot."""
    for name, data in files.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


with_image = partial(beside, a_png=image("PNG"))


def in_folder(make: Callable[[Path], Any], name: str) -> list[bytes]:
    with tempfile.TemporaryDirectory() as place:
        make(Path(place))
        return [(Path(place) / name).read_bytes()]


def make_cache(folder: Path) -> None:
    made = Cache.prepare(folder / "cache", MANIFEST, {})
    made.write(0, dict(t=Features(torch.ones(2, 4), torch.ones(2, 2, 2, 4))))


def make_results(folder: Path) -> None:
    for number in range(2):
        write(folder / "r.jsonl", Record(target="m", benchmark="knn", values={"a": number}), {}, {})


def make_checkpoint(folder: Path) -> None:
    torch.save(dict(model=dict(w=torch.ones(3)), args=dict(lr=1.0)), folder / "w.pth")


def read_shards(path: Path) -> None:
    source = open_source(path)
    for i in range(len(source)):
        source.key(i), source.label(i), source.read(i)


def tables(suffix: str) -> list[bytes]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    features = dict(i={"_type": "Image"}, n={"_type": "ClassLabel", "names": ["a", "b"]})
    content = pa.table(
        dict(i=[dict(bytes=image("PNG"), path=None), dict(bytes=b"", path="x")] * 2, n=[0, 1] * 2),
        metadata=dict(huggingface=json.dumps(dict(info=dict(features=features)))),
    )
    if suffix == "parquet":
        return in_folder(lambda p: pq.write_table(content, p / "x"), "x")
    found = []
    for kind in (pa.ipc.new_stream, pa.ipc.new_file):
        sink = pa.BufferOutputStream()
        with kind(sink, content.schema) as writer:
            writer.write_table(content, max_chunksize=3)
        found.append(sink.getvalue().to_pybytes())
    return found


def read_table(path: Path) -> None:
    # the cache is for what is written of Parquet
    with tempfile.TemporaryDirectory() as cache, mock.patch.dict(os.environ, ZOO_CACHE=cache):
        read_shards(path)


def read_image(path: Path) -> None:
    EncodedImage(path).rgb()
    View(size=8).evaluate(path.read_bytes())


def read_coco_results(path: Path) -> None:
    beside(path.parent, coco_json=text_of(COCO))
    read_results(path, read_coco(path.parent / "coco.json", path.parent))


def read_cache_shard(path: Path) -> None:
    _open_shard.cache_clear()
    Cache(path.parent, MANIFEST).read("t", [0, 1])


def depth(path: Path) -> None:
    DepthSet(((path, path),), 0.001, 10.0).target(0)


READERS = {
    "image": Reader(read_image, "x.jpg", images, mend=mend_png),
    "shard": Reader(read_shards, "x.tar", shards, mend=mend_tar),
    "images, arrow": Reader(read_table, "x.arrow", partial(tables, "arrow")),
    "images, parquet": Reader(read_table, "x.parquet", partial(tables, "parquet")),
    "npz of images": Reader(read_shards, "x.npz", encoded_set),
    "features, npz": Reader(read_shard, "x.npz", partial(stored, "npz")),
    "features, parquet": Reader(read_shard, "x.parquet", partial(stored, "parquet")),
    "features, index": Reader(
        lambda p: about_features(p.parent), "index.json", lambda: [text_of(INDEX)]
    ),
    "coco": Reader(
        lambda p: read_coco(p, p.parent), "x.json", lambda: [text_of(COCO)], with_image
    ),
    "coco results": Reader(
        read_coco_results, "x.json", lambda: [text_of([BOX | dict(score=0.5)])], with_image
    ),
    "captions": Reader(
        lambda p: read_captions(p.parent), "captions.json", lambda: [text_of(CAPTIONS)], with_image
    ),
    "spair": Reader(
        lambda p: read_spair(p.parents[2], "test"), "PairAnnotation/test/x.json",
        lambda: [text_of(SPAIR)], partial(beside, JPEGImages__cat__a_png=image("PNG")),
    ),
    "classes": Reader(
        lambda p: own_classes(p.parent), "classes.json", lambda: [text_of(["sky", "road", "void"])]
    ),
    "mask": Reader(lambda p: read_indices(Place(p)), "x.png", masks, mend=mend_png),
    "depth, png": Reader(depth, "x.png", masks, mend=mend_png),
    "depth, npy": Reader(
        depth, "x.npy", lambda: in_folder(lambda p: np.save(p / "x", np.ones((9, 8))), "x.npy")
    ),
    "scores": Reader(
        lambda p: Record(target="m", benchmark="b", values={}, scores_file=p.name, place=p.parent)
        .scores(), "x.npz",
        lambda: [packed(**{"keys/a": np.array(["x", "y"]), "top/a": np.array([1, 0])})],
    ),
    "maps": Reader(
        load_maps, "maps.npz",
        lambda: [packed(images=np.ones((2, 4, 4, 3), "u1"), **{
            f"{side}/t": np.ones((2, 2, 2, 4), np.float16) for side in ("ours", "theirs")
        })],
    ),
    "cache": Reader(
        lambda p: Cache.open(p.parent), "cache.json", lambda: [text_of(MANIFEST.as_json())]
    ),
    "cache shard": Reader(
        read_cache_shard, "shard_00000.safetensors",
        lambda: in_folder(make_cache, "cache/shard_00000.safetensors"),
    ),
    "tensors": Reader(
        load_tensors, "x.safetensors",
        lambda: in_folder(lambda p: save_tensors(dict(w=torch.ones(3)), p / "x"), "x"),
    ),
    "weights": Reader(read_checkpoint, "w.pth", lambda: in_folder(make_checkpoint, "w.pth")),
    "json": Reader(read_json, "x.json", lambda: [text_of(INDEX)]),
    "results": Reader(read, "r.jsonl", lambda: in_folder(make_results, "r.jsonl")),
    "run config": Reader(
        lambda p: Run(p.parent).config(Distill), "config.json",
        lambda: [text_of(dict(kind="distill", **to_json(quickstart())))],
    ),
    "heads": Reader(lambda p: read_heads(p.parent), "heads.json", lambda: [text_of(HEADS)]),
    "detector": Reader(read_spec, "config.json", lambda: [text_of(DETECTOR)]),
    "run": Reader(
        lambda p: read_run(p.parent), "metrics.jsonl",
        lambda: [b"".join(text_of(line) + b"\n" for line in METRICS)],
    ),
}  # fmt: skip


# ---------------------------------------------------------------- the property


class TooSlow(BaseException):
    """No Exception: a reader may not take it for its file's fault."""


@dataclass
class Tally:
    """What the inputs of a reader did and cost."""

    values: int = 0
    refused: int = 0
    seconds: float = 0.0
    """The longest."""
    mebibytes: int = 0
    """By which the process grew at most."""
    bad: bytes | None = field(default=None, repr=False)


TALLIES: dict[str, Tally] = {}


def peak(*, afresh: bool = False) -> int:
    """Return the most MiB that the process has held, on Linux since this was asked `afresh`.

    Where the peak cannot be set back (some containers refuse it), only what goes beyond it is seen.
    """
    if afresh:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    try:  # not getrusage first: its peak outlives an exec, so the two must not be mixed
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) // 1024
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def try_one(reader: Reader, folder: Path, data: bytes, tally: Tally) -> None:
    """Read one input; fail if the promise is broken."""
    path = folder / reader.name
    path.unlink(missing_ok=True)  # what has mapped the one before keeps it
    path.write_bytes(data)
    before, memory, began = {*folder.rglob("*")}, peak(afresh=True), time.process_time()
    signal.signal(signal.SIGALRM, _too_slow)
    signal.alarm(SECONDS)
    tally.bad = data
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow speaks of damage in warnings too
            reader.read(path)
        tally.values += 1
    except (ValueError, OSError) as error:
        tally.refused += 1
        named = path.name in str(error) or path.name in str(getattr(error, "filename", ""))
        assert named, f"the error does not name the file: {error!r}"
    finally:
        signal.alarm(0)
    tally.seconds = max(tally.seconds, time.process_time() - began)
    tally.mebibytes = max(tally.mebibytes, peak() - memory)
    assert tally.mebibytes < MEBIBYTES, f"it took {tally.mebibytes} MiB"
    written = {*folder.rglob("*")} - before
    assert all(p.name.startswith("coco") for p in written), f"it wrote {written}"
    tally.bad = None


def _too_slow(*_: Any) -> None:
    raise TooSlow(f"more than {SECONDS} s")


@pytest.fixture(scope="module", autouse=True)
def _summary():
    yield
    print(f"\nFUZZ_SEED={SEED}")
    for name, t in TALLIES.items():
        print(
            f"{name:20}{t.values + t.refused:8} inputs{t.values:8} read{t.refused:8} refused"
            f"{t.seconds:8.2f} s{t.mebibytes:6} MiB at most"
        )


@pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisWarning")
@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_read_or_refused_by_its_name(name, tmp_path):
    reader, tally = READERS[name], TALLIES.setdefault(name, Tally())
    if reader.name.endswith((".arrow", ".parquet")):
        pytest.importorskip("pyarrow", reason="pyarrow is in the extra [parquet]")
    if name.startswith("coco"):
        pytest.importorskip("faster_coco_eval", reason="faster-coco-eval is in the extra [det]")
    (tmp_path / reader.name).parent.mkdir(parents=True, exist_ok=True)
    reader.around(tmp_path)
    for whole in reader.seeds():
        try_one(reader, tmp_path, whole, tally)
    kept = CASES / name.replace(", ", "-").replace(" ", "-")
    for case in sorted(kept.glob("*")):
        try_one(reader, tmp_path, case.read_bytes(), tally)

    @hypothesis.seed(SEED)
    @settings(
        max_examples=max(1, INPUTS // len(READERS)), deadline=None, database=None,
        suppress_health_check=[*HealthCheck], phases=(Phase.generate, Phase.shrink),
    )  # fmt: skip
    @given(strategy(reader))
    def property_holds(data: bytes) -> None:
        try_one(reader, tmp_path, data, tally)

    try:
        property_holds()
    except BaseException:
        if tally.bad is not None:  # the last one that was tried is the smallest
            kept.mkdir(parents=True, exist_ok=True)
            (kept / hashlib.sha256(tally.bad).hexdigest()[:12]).write_bytes(tally.bad)
        raise


def test_the_whole_files_are_read():
    assert not [name for name, tally in TALLIES.items() if not tally.values]


def take_memory(mebibytes: int) -> None:
    """Hold more and more until the peak has risen by so much, 16 GiB at most."""
    before, taken = peak(), []
    while peak() < before + mebibytes and len(taken) < 512:
        taken.append(bytearray(b"x" * 2**25))


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        (lambda path: {}["labels"], KeyError),
        (lambda path: int("cat"), AssertionError),
        (lambda path: path.with_suffix(".new").write_bytes(b""), AssertionError),
        (lambda path: take_memory(64), AssertionError),
    ],
)
def test_a_reader_that_breaks_the_promise_is_found(fault, found, tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "MEBIBYTES", 32)
    tally = Tally()
    with pytest.raises(found):
        try_one(Reader(fault, "x.bin", lambda: [b""]), tmp_path, b"damaged", tally)
    assert tally.bad == b"damaged"
