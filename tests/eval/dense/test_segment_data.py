"""Layouts of masks: what is found, what the values mean, and what is refused before work."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from zoo.eval.dense.segment_classes import CAMVID, CITYSCAPES, VOC
from zoo.eval.dense.segment_data import IGNORE, open_segments

NAMES = ["sky", "road", "void"]


def picture(file, size=(6, 4)):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (10, 20, 30)).save(file)


def mask(file, values, mode=None, size=(6, 4)):
    """Write a mask whose first pixels hold `values` and whose others hold the first of them."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full(size[::-1], values[0], np.uint16 if mode == "16" else np.uint8)
    pixels.flat[: len(values)] = values
    image = Image.fromarray(pixels)
    if mode == "P":
        image.putpalette([c for i in range(256) for c in (i, 255 - i, 7)])
    image.save(file)


def folder(root, *, values=(0, 1, 2), names=NAMES, mode=None, size=(6, 4)):
    for split in ("train", "val"):
        for name in ("a", "b"):
            picture(root / "images" / split / f"{name}.jpg")
            mask(root / "masks" / split / f"{name}.png", values, mode, size)
    if names is not None:
        (root / "classes.json").write_text(json.dumps(names))
    return root


@pytest.mark.parametrize("mode", [None, "P", "16"])
def test_grey_palette_and_16_bit_masks_mean_the_same(tmp_path, mode):
    train, val = open_segments(folder(tmp_path, values=(0, 1, 2, 255), mode=mode))
    assert train.classes == ("sky", "road") and len(train) == len(val) == 2
    got = train.target(0)
    assert got.dtype == np.uint8
    assert got.flat[:5].tolist() == [0, 1, IGNORE, IGNORE, 0]


def test_65535_is_no_class_in_16_bits(tmp_path):
    train, _ = open_segments(folder(tmp_path, values=(1, 65535), mode="16"))
    assert train.target(0).flat[:3].tolist() == [1, IGNORE, 1]


def test_a_class_in_the_middle_that_is_void_moves_the_later_ones(tmp_path):
    train, _ = open_segments(folder(tmp_path, names=["sky", "Unlabelled", "road"]))
    assert train.classes == ("sky", "road")
    assert train.target(0).flat[:3].tolist() == [0, IGNORE, 1]


def test_train_images_beside_train_masks_is_a_folder_too(tmp_path):
    for split in ("training", "test"):
        picture(tmp_path / split / "images" / "x" / "a.png")
        mask(tmp_path / split / "labels" / "x" / "a.png", (0, 1))
    (tmp_path / "classes.json").write_text(json.dumps(NAMES))
    train, val = open_segments(tmp_path)
    assert (len(train), len(val)) == (1, 1)


def shard(file, pairs):
    with tarfile.open(file, "w") as tar:
        for key, values in pairs:
            for extension, pixels in (
                ("jpg", np.zeros((4, 6, 3), np.uint8)),
                ("png", values),
            ):
                if pixels is None:
                    continue
                buffer = io.BytesIO()
                Image.fromarray(pixels).save(buffer, "PNG" if extension == "png" else "JPEG")
                entry = tarfile.TarInfo(f"{key}.{extension}")
                entry.size = buffer.tell()
                buffer.seek(0)
                tar.addfile(entry, buffer)


def test_shards_hold_pictures_and_masks_under_one_key(tmp_path):
    values = np.zeros((4, 6), np.uint8)
    values[0, 0] = 1
    shard(tmp_path / "train-000.tar", [("a", values), ("b", values)])
    shard(tmp_path / "val-000.tar", [("c", values)])
    (tmp_path / "classes.json").write_text(json.dumps(NAMES))
    train, val = open_segments(tmp_path)
    assert (train.layout, len(train), len(val)) == ("tar", 2, 1)
    assert val.target(0).flat[:2].tolist() == [1, 0] and val.image(0).size == (6, 4)
    assert val.key(0).endswith("val-000.tar/c.jpg")
    shard(tmp_path / "val-000.tar", [("c", None)])
    with pytest.raises(ValueError, match=r"1 of 1 images in .* have no mask"):
        open_segments(tmp_path)


def test_ade20k_counts_from_one_and_reads_its_names(tmp_path):
    for split in ("training", "validation"):
        picture(tmp_path / "images" / split / "A_1.jpg")
        mask(tmp_path / "annotations" / split / "A_1.png", (0, 1, 150))
    train, _ = open_segments(tmp_path)
    assert train.layout == "ade20k" and train.classes[149] == "class 150"
    assert train.target(0).flat[:4].tolist() == [IGNORE, 0, 149, IGNORE]
    rows = [f"{i}\t0.1\t1\t1\t0\t{'screen' if i > 148 else f'n{i}, m{i}'}" for i in range(1, 151)]
    (tmp_path / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio", *rows]))
    train, _ = open_segments(tmp_path)
    assert train.classes[:2] == ("n1", "n2") and train.classes[148:] == ("screen 149", "screen 150")


def test_voc_reads_its_lists_and_cityscapes_its_ids(tmp_path):
    voc = tmp_path / "voc"
    for name in ("a", "b", "unused"):
        picture(voc / "JPEGImages" / f"{name}.jpg")
    for name in ("a", "b"):
        mask(voc / "SegmentationClass" / f"{name}.png", (0, 20, 255), "P")
    (voc / "ImageSets" / "Segmentation").mkdir(parents=True)
    (voc / "ImageSets" / "Segmentation" / "train.txt").write_text("a\n")
    with pytest.raises(ValueError, match=r"val\.txt is missing"):
        open_segments(voc)
    (voc / "ImageSets" / "Segmentation" / "val.txt").write_text("b\n")
    train, val = open_segments(voc)
    assert (len(train), len(val), train.classes) == (1, 1, VOC)
    assert train.target(0).flat[:4].tolist() == [0, 20, IGNORE, 0]

    city = tmp_path / "city"
    for split in ("train", "val"):
        picture(city / "leftImg8bit" / split / "ulm" / "u_1_leftImg8bit.png")
        mask(city / "gtFine" / split / "ulm" / "u_1_gtFine_labelIds.png", (7, 33, 0, 6))
    train, _ = open_segments(city)
    assert train.classes == CITYSCAPES
    assert train.target(0).flat[:4].tolist() == [0, 18, IGNORE, IGNORE]


def test_camvid_in_the_folders_of_segnet(tmp_path):
    for split in ("train", "val"):
        picture(tmp_path / split / "0001.png")
        mask(tmp_path / f"{split}annot" / "0001.png", (0, 10, 11))
    train, _ = open_segments(tmp_path)
    assert train.classes == CAMVID
    assert train.target(0).flat[:3].tolist() == [0, 10, IGNORE]


def test_values_beyond_the_list_of_classes_are_refused_before_work(tmp_path):
    with pytest.raises(ValueError, match=r"has the value 7, but there are 2 classes .* 0 to 1"):
        open_segments(folder(tmp_path, values=(0, 7)))


def test_parts_that_name_their_classes_differently_are_refused(tmp_path):
    root = folder(tmp_path, names=None)
    (root / "masks" / "train" / "classes.json").write_text(json.dumps(NAMES))
    (root / "masks" / "val" / "classes.json").write_text(json.dumps(["road", "sky", "void"]))
    with pytest.raises(ValueError, match=r"do not have the same classes: train has 2 .sky, road"):
        open_segments(root)


def test_what_does_not_fit_is_refused_with_what_came(tmp_path):
    with pytest.raises(ValueError, match=r"There is no data at"):
        open_segments(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no images with masks in a known layout .ade20k"):
        open_segments(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"no layout 'coco'; there are ade20k"):
        open_segments(tmp_path / "empty", "coco")
    with pytest.raises(ValueError, match=r"classes\.json is missing"):
        open_segments(folder(tmp_path / "unnamed", names=None))
    with pytest.raises(ValueError, match=r"names 2 classes, 1 of them different"):
        open_segments(folder(tmp_path / "twice", names=["sky", "sky", "void"]))
    with pytest.raises(ValueError, match=r"6x4 pixels and its mask 6x5"):
        open_segments(folder(tmp_path / "sizes", size=(6, 5)))
    with pytest.raises(ValueError, match=r"No mask of the train part .* has a pixel of a class"):
        open_segments(folder(tmp_path / "void", values=(2, 255)))
    root = folder(tmp_path / "colour")
    picture(root / "masks" / "val" / "a.png")
    with pytest.raises(ValueError, match=r"is a colour image .mode RGB."):
        open_segments(root)
    for name in ("a", "b"):
        (root / "masks" / "val" / f"{name}.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"2 images in a row .*mask .*a\.png cannot be read"):
        open_segments(root)
    (root / "masks" / "val" / "a.png").unlink()
    with pytest.raises(ValueError, match=r"1 of 2 images have no mask in .*masks/val"):
        open_segments(root)


def test_a_mask_lies_on_the_stored_pixels_of_a_turned_photograph(tmp_path):
    folder(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (6, 4), (1, 2, 3)).save(tmp_path / "images" / "train" / "a.jpg", exif=exif)
    train, _ = open_segments(tmp_path)
    assert train.image(0).size == (6, 4)


def test_masks_may_be_links_to_one_file_and_images_may_not(tmp_path):
    folder(tmp_path)
    second = tmp_path / "masks" / "train" / "b.png"
    second.unlink()
    second.symlink_to("a.png")
    assert len(open_segments(tmp_path)[0]) == 2


@pytest.mark.parametrize("text", ["[" * 100_000, "{}", "[1, 2]", "[", "\xff"])
def test_a_list_of_classes_that_is_none_is_refused_by_name(text, tmp_path):
    folder(tmp_path)
    (tmp_path / "classes.json").write_text(text, "latin-1")
    with pytest.raises(ValueError, match=r"classes\.json"):
        open_segments(tmp_path)
