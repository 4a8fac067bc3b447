"""The images below a folder: each real file once, whatever links and names there are."""

import os
import sys

import pytest

from zoo.data.sources import open_source, open_splits
from zoo.data.walk import image_files


@pytest.fixture
def folder(tmp_path):
    for name in ("cat/1.png", "cat/2.png", "dog/1.png", "dog/2.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"image")
    return tmp_path


FOUR = ["cat/1.png", "cat/2.png", "dog/1.png", "dog/2.png"]


def test_circles_of_links_are_named_and_left_out(folder, caplog):
    (folder / "cat" / "up").symlink_to("..")
    (folder / "dog" / "cat").symlink_to("../cat")
    (folder / "dog" / "self").symlink_to("self")
    (folder / "above").symlink_to(folder.parent)
    assert image_files(folder) == FOUR
    assert caplog.text.count("leads back to") == 3


def test_a_linked_folder_is_read_under_the_name_of_its_link(folder, tmp_path_factory):
    away = tmp_path_factory.mktemp("away")
    for name in ("1.png", "below/2.png"):
        (away / name).parent.mkdir(exist_ok=True)
        (away / name).write_bytes(b"image")
    (folder / "fish").symlink_to(away)
    (folder / "zander").symlink_to(away / "below")
    assert image_files(folder) == [*FOUR, "fish/1.png", "fish/below/2.png"]


def test_a_linked_image_is_listed_once(folder, caplog, tmp_path_factory):
    away = tmp_path_factory.mktemp("away") / "3.png"
    away.write_bytes(b"image")
    (folder / "cat" / "0.png").symlink_to("1.png")
    (folder / "cat" / "3.png").symlink_to(away)
    (folder / "dog" / "3.png").symlink_to(away)
    (folder / "dog" / "gone.png").symlink_to("nowhere.png")
    assert image_files(folder) == sorted([*FOUR, "cat/3.png"])
    assert "2 links" in caplog.text and "cat/0.png first" in caplog.text


def test_hidden_folders_pipes_and_folders_called_like_images_are_none(folder):
    (folder / ".ipynb_checkpoints").mkdir()
    (folder / ".ipynb_checkpoints" / "1-checkpoint.png").write_bytes(b"image")
    (folder / "cat" / "._1.png").write_bytes(b"of another system")
    (folder / "cat" / "odd.png").mkdir()
    os.mkfifo(folder / "cat" / "pipe.png")
    source = open_source(folder)
    assert source.files == tuple(FOUR) and source.classes == ("cat", "dog")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_a_name_that_is_no_utf8_is_shown_by_its_bytes_and_read(folder):
    odd = folder / os.fsdecode(b"caf\xe9")
    odd.mkdir()
    (odd / os.fsdecode(b"\xff.png")).write_bytes(b"odd")
    source = open_source(folder)
    assert source.classes == ("caf\\xe9", "cat", "dog")
    assert source.key(0) == "caf\\xe9/\\xff.png" and source.label(0) == 0
    assert source.read(0) == b"odd"
    assert len(open_splits(folder, 0.5)[1]) == 2
