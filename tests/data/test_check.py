"""Every way in which a shard can be wrong is listed with its place, and nothing else is."""

import gzip
import io
import os
import struct
import tarfile
import zlib

import numpy as np
import pytest
from PIL import Image

from zoo.cli import main
from zoo.data.check import IMAGE_BYTES


def png(mode="RGB", kind="PNG") -> bytes:
    buffer = io.BytesIO()
    pixels = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    Image.fromarray(pixels).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def bomb() -> bytes:
    """A PNG of a few bytes that declares 60,000 x 60,000 pixels."""
    parts = [b"\x89PNG\r\n\x1a\n"]
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")):
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        parts.append(struct.pack(">I", len(data)) + kind + data + checksum)
    return b"".join(parts)


GOOD = [("0.png", png()), ("0.cls", b"1"), ("d/1.png", png()), ("d/1.cls", b"0")]


def write(path, files):
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def link(kind) -> tarfile.TarInfo:
    info = tarfile.TarInfo("x.png")
    info.type, info.linkname = kind, "/etc/passwd"
    return info


def check(capsys, *words) -> tuple[int, list[str]]:
    """Return the exit code of `zoo data check` and what it printed, line by line."""
    code = 0
    try:
        main(["data", "check", *map(str, words)])
    except SystemExit as stop:
        code = stop.code
    return code, capsys.readouterr().out.splitlines()


def test_good_shards_and_folders_have_no_problem(tmp_path, capsys):
    segmentation = [("2.jpg", png()), ("2.png", png("F", "TIFF"))]
    for name in ("a", "b"):
        write(tmp_path / f"{name}.tar", GOOD + segmentation)
    main(["data", "index", str(tmp_path)])
    capsys.readouterr()
    assert check(capsys, tmp_path) == (0, ["6 images can be read; 0 problems."])
    assert check(capsys, tmp_path / "a.tar", "--workers", "1")[0] == 0


@pytest.mark.parametrize(
    ("files", "place", "reason"),
    [
        ([("2.png", png()[:-40])], "2.png", "It cannot be read"),
        ([("2.jpg", b"nothing")], "2.jpg", "it is none of"),
        ([("2.png", bomb())], "2.png", "3600000000 pixels"),
        ([("0.png", png())], "0.png", "comes twice in the shard"),
        ([("0.seg.png", png())], "0.seg.png", "stands apart from the other files of its sample, 0"),
        ([("../2.png", png())], "../2.png", "leads out of the folder"),
        ([("/2.png", png())], "/2.png", "leads out of the folder"),
        ([("d/../../2.txt", b"")], "d/../../2.txt", "leads out of the folder"),
        ([(link(tarfile.SYMTYPE), b"")], "x.png", "is a link"),
        ([(link(tarfile.LNKTYPE), b"")], "x.png", "is a link"),
        ([(link(tarfile.FIFOTYPE), b"")], "x.png", "is no plain file"),
        ([("2.cls", b"cat")], "2.cls", "a .cls file holds the number of a class"),
    ],
)  # fmt: skip
def test_a_member_that_is_wrong_is_listed_alone(files, place, reason, tmp_path, capsys):
    write(tmp_path / "good.tar", GOOD)
    shard = write(tmp_path / "bad.tar", [*GOOD, *files])
    code, lines = check(capsys, tmp_path)
    assert code == 1 and len(lines) == 2
    assert lines[0].startswith(f"{shard}/{place}: ") and reason in lines[0]
    assert lines[1].endswith("; 1 problems.")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: data[:520], "more than there are"),
        (lambda data: data[:3072], "ends without tar's end mark"),
        (lambda data: data[:2048] + b"\xff" * 512 + data[2560:], "is damaged, after 2 files"),
        (lambda data: data + data, "goes on behind tar's end mark"),
        (gzip.compress, "is compressed by gzip"),
        (lambda data: b"", "is not a readable tar file"),
    ],
)
def test_a_damaged_shard_is_listed_and_the_others_are_read(damage, reason, tmp_path, capsys):
    data = write(tmp_path / "good.tar", GOOD).read_bytes()
    (tmp_path / "bad.tar").write_bytes(damage(data))
    code, lines = check(capsys, tmp_path)
    assert code == 1 and len(lines) == 2 and lines[0].startswith(f"{tmp_path / 'bad.tar'}: ")
    assert reason in lines[0]


def test_an_image_that_declares_gigabytes_is_not_read(tmp_path, capsys):
    info = tarfile.TarInfo("2.png")
    info.size = IMAGE_BYTES + 1
    with (tmp_path / "a.tar").open("wb") as file:
        file.write(info.tobuf())
        file.truncate(512 + info.size + 4096 - info.size % 512)  # takes no place on the disk
    code, lines = check(capsys, tmp_path)
    assert code == 1 and "2.png: declares 536,870,913 bytes" in lines[0] and len(lines) == 2


def test_what_stands_beside_shards_must_fit_them(tmp_path, capsys):
    for name in ("a", "b", "c"):
        write(tmp_path / f"{name}.tar", GOOD)
    main(["data", "index", str(tmp_path)])
    capsys.readouterr()
    os.utime(tmp_path / "a.tar", ns=(0, 5))
    (tmp_path / "b.tar").unlink()
    (tmp_path / "classes.json").write_text('["cat"]')
    code, lines = check(capsys, tmp_path)
    assert code == 1 and len(lines) == 5
    assert f"{tmp_path / 'a.tar'}: changed, or came, after index.safetensors" in lines[0]
    assert f"{tmp_path / 'b.tar'}: is missing, and index.safetensors lists it" in lines[1]
    assert all("names 1 classes, and a .cls file holds 1" in line for line in lines[2:4])
    (tmp_path / "index.safetensors").write_bytes(b"nothing")
    assert "is not a readable safetensors file" in check(capsys, tmp_path)[1][0]


def test_unreadable_images_of_a_folder_are_listed(tmp_path, capsys):
    (tmp_path / "a").mkdir()
    for number in range(5):
        (tmp_path / "a" / f"{number}.png").write_bytes(png())
    (tmp_path / "a" / "3.png").write_bytes(b"nothing")
    code, lines = check(capsys, tmp_path)
    assert code == 1 and lines[0].startswith("a/3.png: It cannot be read")
    assert lines[1] == "4 images can be read; 1 problems."
