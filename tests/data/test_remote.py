"""Shards behind a URL are the shards of the folder: in memory, and from a server of files."""

from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from PIL import Image

from zoo.cli import main
from zoo.data.loader import train_batches
from zoo.data.plan import Plan
from zoo.data.sources import open_labelled, open_source
from zoo.data.views import View

fsspec = pytest.importorskip("fsspec", reason="fsspec is in the extra [remote]")


class Server(SimpleHTTPRequestHandler):
    """Python's own server of files, with parts of them; it counts what it sends."""

    sent = 0
    busy = 0
    """Reads that are still to be answered by an error."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        wanted = self.headers.get("Range")
        path = Path(self.translate_path(self.path))
        if not wanted or not path.is_file():
            super().do_GET()
            return
        if Server.busy:
            Server.busy -= 1
            self.send_error(503)
            return
        first, last = map(int, wanted.removeprefix("bytes=").split("-"))
        data = path.read_bytes()[first : last + 1]
        Server.sent += len(data)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{path.stat().st_size}")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def served(folder):
    """Serve a folder; give its URL."""
    pytest.importorskip("aiohttp", reason="aiohttp is in the extra [remote]")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Server, directory=str(folder))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def shards(tmp_path, monkeypatch):
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "cache"))
    for part, count in (("train", 4), ("val", 3)):
        for number in range(2 * count):
            path = tmp_path / "photos" / part / ("cat", "dog")[number % 2] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(number).integers(0, 256, (300, 300, 3), np.uint8)
            Image.fromarray(pixels).save(path)
    main(["data", "pack", str(tmp_path / "photos"), str(tmp_path / "shards"), "--shard-mb", "1"])
    return tmp_path / "shards"


@pytest.fixture(params=["memory", "http"])
def url(request, shards):
    if request.param == "memory":
        files = fsspec.filesystem("memory")
        files.put(str(shards), "/kept", recursive=True)
        yield "memory://kept"
        files.rm("/kept", recursive=True)
        return
    with served(shards) as address:
        yield address


def content(source):
    return [
        (source.key(i), source.classes[source.label(i)], source.read(i)) for i in range(len(source))
    ]


def test_a_url_has_the_images_names_and_classes_of_the_folder(url, shards):
    for ours, theirs in zip(open_labelled(url, 0.5), open_labelled(shards, 0.5), strict=True):
        assert content(ours) == content(theirs)
    assert content(open_source(url)) == content(open_source(shards))
    Server.sent = 0
    size = len(open_source(url).read(2))
    assert Server.sent in (0, size)  # of a shard, the bytes of the image alone


def test_workers_read_from_a_server_what_one_process_reads_from_the_disk(shards):
    plan, view = Plan(14, 4, 0), View(size=8)
    theirs = train_batches(open_source(shards), view, plan, steps=3)
    with served(shards) as address:
        ours = train_batches(open_source(address), view, plan, steps=3, workers=2)
        for one, other in zip(ours, theirs, strict=True):
            assert torch.equal(one["images"], other["images"]) and one["keys"] == other["keys"]


def test_a_read_that_fails_is_tried_again_before_an_image_is_given_up(shards, monkeypatch):
    monkeypatch.setattr("zoo.data.remote.PAUSES", (0.0, 0.0))
    with served(shards) as address:
        source = open_source(address)
        Server.busy = 2
        assert source.read(0) == open_source(shards).read(0) and not Server.busy
        Server.busy = 3
        with pytest.raises(OSError, match=r"train-000000\.tar cannot be read: .*503"):
            source.read(0)
        assert not Server.busy


def test_missing_and_changed_shards_behind_a_url_are_refused_or_left_out(shards, caplog):
    files = fsspec.filesystem("memory")
    files.put(str(shards), "/broken", recursive=True)
    whole = content(open_source("memory://broken"))
    files.rm("/broken/train-000000.tar")
    files.pipe("/broken/val-000000.tar", b"short")
    with pytest.raises(
        ValueError, match=r"2 of \d shards: memory://broken/train-000000\.tar is mis"
    ):
        open_source("memory://broken")
    lost: dict[str, str] = {}
    gone = ("train-000000.tar/", "val-000000.tar/")
    left = content(open_source("memory://broken", lost))
    assert left == [one for one in whole if not one[0].startswith(gone)]
    assert [name.rpartition("/")[2] + "/" for name in lost] == list(gone)
    assert "val-000000.tar has 5 bytes" in caplog.text
    files.rm("/broken", recursive=True)


@pytest.mark.parametrize(
    ("url", "reason"),
    [("memory://nothing", "no index.safetensors at"), ("nosuch://place", "Protocol not known")],
)
def test_a_url_without_an_index_or_of_an_unknown_kind_is_refused(url, reason):
    with pytest.raises(ValueError, match=reason):
        open_source(url)
