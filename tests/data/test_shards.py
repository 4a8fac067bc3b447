"""Tar shards: what is damaged, cut or compressed is refused by name, and nothing is lost."""

import gzip
import io
import os
import tarfile

import pytest

from zoo.data.shards import entries
from zoo.data.sources import open_source


def write(path, files):
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


FILES = {f"{i}.{end}": data for i in range(4) for end, data in (("png", b"x" * 700), ("cls", b"1"))}


def test_files_have_webdatasets_keys(tmp_path):
    shard = write(tmp_path / "a.tar", {"a/b.seg.PNG": b"12", "c": b"", "d.cls": b"7\n"})
    found = list(entries(shard))
    assert [(e.key, e.extension, e.size) for e in found] == [
        ("a/b", "seg.png", 2), ("c", "", 0), ("d", "cls", 2),
    ]  # fmt: skip
    assert found[0].read() == b"12" and found[2].label() == 7


def test_a_shard_that_was_cut_anywhere_is_refused(tmp_path):
    whole = write(tmp_path / "whole.tar", FILES).read_bytes()
    content = 4 * (512 + 1024 + 512 + 512)
    shard = tmp_path / "cut.tar"
    for size in [*range(0, content, 256), *range(1, content, 512)]:
        shard.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"cut\.tar (is not a readable|ends without)"):
            list(entries(shard))
    shard.write_bytes(whole[: content + 512])  # one block of the end mark is enough
    assert len(list(entries(shard))) == 8


def test_what_follows_the_end_mark_or_a_damaged_header_is_not_lost_in_silence(tmp_path):
    data = write(tmp_path / "a.tar", FILES).read_bytes()
    (tmp_path / "two.tar").write_bytes(data + data)
    with pytest.raises(ValueError, match=r"two\.tar goes on behind tar's end mark.*8 files"):
        list(entries(tmp_path / "two.tar"))
    (tmp_path / "bad.tar").write_bytes(data[:2560] + b"\xff" * 512 + data[3072:])
    with pytest.raises(ValueError, match=r"bad\.tar is damaged, after 2 files"):
        list(entries(tmp_path / "bad.tar"))


def test_a_compressed_shard_says_how_to_unpack_it(tmp_path):
    shard = tmp_path / "a.tar"
    shard.write_bytes(gzip.compress(write(tmp_path / "b.tar", FILES).read_bytes()))
    with pytest.raises(ValueError, match=r"a\.tar is compressed by gzip.*gzip -d"):
        open_source(shard)


@pytest.mark.parametrize("kind", [b"x", b"g", b"L", b"K"])
def test_a_header_that_declares_gigabytes_is_not_believed(kind, tmp_path):
    info = tarfile.TarInfo("pax")
    info.size, info.type = 3 * 2**30, kind
    shard = tmp_path / "a.tar"
    shard.write_bytes(info.tobuf(tarfile.USTAR_FORMAT) + bytes(4096))
    with pytest.raises(ValueError, match=r"a\.tar is not .*declares 3221225472 bytes; at most"):
        list(entries(shard))


@pytest.mark.parametrize("label", [b"cat", b"-1", b"", b"1" * 40, b"1.5"])
def test_a_label_that_is_no_number_is_refused_by_its_file(label, tmp_path):
    shard = write(tmp_path / "a.tar", {"0.png": b"x", "0.cls": label})
    with pytest.raises(ValueError, match=r"a\.tar/0\.cls holds .* number of a class"):
        open_source(shard)


def test_a_huge_label_costs_no_memory(tmp_path):
    source = open_source(write(tmp_path / "a.tar", {"0.png": b"x", "0.cls": b"30000000"}))
    assert list(source.classes) == ["30000000"] and source.label(0) == 0


def test_images_without_a_label_are_counted(tmp_path, caplog):
    source = open_source(write(tmp_path / "a.tar", FILES | {"9.png": b"x"}))
    assert not source.classes and source.label(0) is None
    assert "1 of 5 images have no .cls" in caplog.text and "a.tar/9.png first" in caplog.text


def test_hidden_files_and_pipes_are_no_shards(tmp_path):
    write(tmp_path / "a.tar", FILES)
    (tmp_path / "._a.tar").write_bytes(b"of another system")
    os.mkfifo(tmp_path / "b.tar")
    assert len(open_source(tmp_path)) == 4
