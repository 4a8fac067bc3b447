"""What `mmseg_config` refuses before it asks for mmseg; test_mmseg.py has the rest."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from zoo.eval.openmmlab.mmseg_config import mmseg_config

NAMES = ("ground", "red", "green")


def encoded(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def pictures(values=(0, 1, 2, 1)):
    mask = np.array(values, np.uint8).reshape(2, 2).repeat(8, 0).repeat(8, 1)
    return encoded(np.stack([60 * mask] * 3, -1)), encoded(mask)


@pytest.fixture
def folder(tmp_path):
    for split in ("train", "val"):
        for kind, content in zip(("images", "masks"), pictures(), strict=True):
            (tmp_path / kind / split).mkdir(parents=True)
            (tmp_path / kind / split / "a.png").write_bytes(content)
    (tmp_path / "classes.json").write_text(json.dumps(NAMES))
    return tmp_path


def test_tar_files_are_refused_with_the_command_that_reads_them(tmp_path):
    for split in ("train", "val"):
        with tarfile.open(tmp_path / f"{split}-000.tar", "w") as tar:
            for ending, content in zip(("jpg", "png"), pictures(), strict=True):
                entry = tarfile.TarInfo(f"a.{ending}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    (tmp_path / "classes.json").write_text(json.dumps(NAMES))
    with pytest.raises(ValueError, match=r"tar files.*zoo eval BACKBONE --on segment"):
        mmseg_config("eradio_nano", tmp_path)


BAD_NUMBERS = {
    "batch 1 is too small": dict(batch=1),
    "must be positive": dict(steps=0),
    "the longer side, then the shorter": dict(size=(512, 2048)),
    "there are whole, slide": dict(inference="tiles"),
    "no layout 'coco'": dict(layout="coco"),
}


@pytest.mark.parametrize("message", BAD_NUMBERS)
def test_numbers_that_cannot_be_are_refused(message, folder):
    with pytest.raises(ValueError, match=message):
        mmseg_config("eradio_nano", folder, **BAD_NUMBERS[message])


def test_a_backbone_without_four_maps_is_refused(folder):
    with pytest.raises(ValueError, match=r"has 3 maps, at out_indices \[1, 2, 3\]"):
        mmseg_config(dict(name="eradio_nano", out_indices=(1, 2, 3)), folder)
    shallow = dict(depth=2, embed_dim=32, num_heads=2)
    with pytest.raises(ValueError, match="UPerNet needs 4"):
        mmseg_config(dict(name="radio_vit_base_patch16", options=shallow), folder)


def test_data_that_cannot_be_trained_on_are_refused(folder):
    (folder / "classes.json").write_text(json.dumps(["ground"]))
    with pytest.raises(ValueError, match="has the value"):
        mmseg_config("eradio_nano", folder)
    (folder / "classes.json").write_text(json.dumps(["void", "red", "void"]))
    with pytest.raises(ValueError, match=r"one class \(red\)"):
        mmseg_config("eradio_nano", folder)
    with pytest.raises(ValueError, match="There is no data at"):
        mmseg_config("eradio_nano", folder / "lost")
