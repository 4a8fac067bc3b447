"""COCO folders: what is read, and what is refused before any work."""

import json

import pytest
import torch
from PIL import Image

pytest.importorskip("faster_coco_eval", reason="faster-coco-eval is not installed; it is in [det]")

from zoo.eval.detect.canvas import Samples
from zoo.eval.detect.coco import open_coco, read_coco
from zoo.eval.detect.shapes import write_shapes


@pytest.fixture
def folder(tmp_path):
    write_shapes(tmp_path / "coco", train=4, val=3, side=48)
    return tmp_path / "coco"


def change(folder, edit, part="train"):
    file = folder / "annotations" / f"instances_{part}.json"
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


def test_category_ids_with_gaps_become_labels_without(folder):
    split = open_coco(folder, "train")
    assert split.classes == ("disc", "square", "triangle")
    assert split.category_ids == (3, 7, 8)
    labels = {split.label(a) for i in split.images for a in split.objects(i)}
    assert labels <= {0, 1, 2}


def test_crowds_and_boxes_without_area_are_not_learnt_from(folder):
    change(folder, lambda c: c["annotations"][1].update(bbox=[3, 3, 0, 9]))
    split = open_coco(folder, "train")
    annotations = [a for i in split.images for a in split.annotations[i.id]]
    learnt = [a for i in split.images for a in split.objects(i)]
    assert len(annotations) - len(learnt) == 2


def test_images_without_objects_stay(folder):
    split = open_coco(folder, "val")
    assert len(split) == 3
    assert split.objects(split.images[-1]) == []


def test_a_class_agnostic_split_has_one_class(folder):
    split = open_coco(folder, "train", class_agnostic=True)
    assert split.classes == ("object",)
    assert {split.label(a) for i in split.images for a in split.objects(i)} == {0}


def test_classes_are_matched_by_name_whatever_their_ids(folder):
    def renumbered(content):
        for entry in content["categories"]:
            entry["id"] += 40
        for entry in content["annotations"]:
            entry["category_id"] += 40

    change(folder, renumbered, "val")
    train = open_coco(folder, "train")
    val = open_coco(folder, "val").with_classes(("triangle", "disc", "square"))
    assert val.category_ids == (48, 43, 47)
    assert val.with_classes(train.classes).category_ids == (43, 47, 48)


def test_classes_with_other_names_are_refused(folder):
    change(folder, lambda c: c["categories"][0].update(name="ball"), "val")
    with pytest.raises(ValueError, match="only there: ball; not there: disc"):
        open_coco(folder, "val").with_classes(open_coco(folder, "train").classes)


@pytest.mark.parametrize(
    ("annotations", "images"),
    [
        ("annotations/instances_train2017.json", "train2017"),
        ("train/_annotations.coco.json", "train"),
        ("annotations/instances_train.json", "images/train"),
    ],
)
def test_common_layouts_are_known(folder, annotations, images):
    split = open_coco(folder, "train")
    (folder / images).parent.mkdir(exist_ok=True)
    (folder / "train").rename(folder / images)
    split.file.rename(folder / annotations)
    assert len(open_coco(folder, "train")) == len(split)


def _missing_image(content, folder):
    (folder / "train" / content["images"][1]["file_name"]).unlink()


def _wrong_size(content, folder):
    Image.new("RGB", (5, 6)).save(folder / "train" / content["images"][0]["file_name"])


def _no_image(content, folder):
    for image in content["images"]:
        (folder / "train" / image["file_name"]).write_text("no image")


BAD = {
    "is missing": (_missing_image, "1 of 4 images .* are missing"),
    "has another size": (_wrong_size, "has 6x5 pixels"),
    "all unreadable": (_no_image, "4 images in a row are unreadable"),
    "unknown image": (
        lambda c, _: c["annotations"][0].update(image_id=999), "image 999 is not in the file",
    ),
    "unknown category": (
        lambda c, _: c["annotations"][0].update(category_id=1), "category 1 is not in the file",
    ),
    "double annotation": (
        lambda c, _: c["annotations"].append(c["annotations"][0]), "occur twice: 1",
    ),
    "double class": (
        lambda c, _: c["categories"][0].update(name="square"), "classes need different names",
    ),
    "box of three": (lambda c, _: c["annotations"][0].update(bbox=[1, 2, 3]), "bbox is not x, y"),
    "negative box": (
        lambda c, _: c["annotations"][0].update(bbox=[1, 2, -3, 4]), "is not a box",
    ),
    "box outside": (
        lambda c, _: c["annotations"][0].update(bbox=[500, 2, 3, 4]), "lies outside the image",
    ),
    "short polygon": (
        lambda c, _: c["annotations"][0].update(segmentation=[[1, 2, 3, 4]]), "of 4 numbers",
    ),
    "runs of another image": (
        lambda c, _: c["annotations"][0].update(segmentation=dict(size=[9, 9], counts=[81])),
        "run lengths of size",
    ),
    "id of 400 digits": (
        lambda c, _: c["annotations"][0].update(id=10**400), "whole numbers of 64 bits",
    ),
    "list for an image": (
        lambda c, _: c["annotations"][0].update(image_id=[1]), r"image \[1\] is not in the file",
    ),
    "list for a class": (
        lambda c, _: c["categories"][0].update(name=["ball"]), "classes need different names",
    ),
    "box of 400 digits": (
        lambda c, _: c["annotations"][0].update(bbox=[1, 2, 10**400, 4]), "is not a box",
    ),
    "polygon of a giant": (
        lambda c, _: c["annotations"][0].update(segmentation=[[0, 0, 1e9, 0, 0, 1e9]]),
        "far outside of the image",
    ),
    "no list of images": (lambda c, _: c.pop("images"), "it needs the lists images"),
    "no image at all": (lambda c, _: c.update(images=[], annotations=[]), "lists no image"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_refused_with_its_reason(folder, case):
    edit, message = BAD[case]
    change(folder, lambda content: edit(content, folder))
    with pytest.raises(ValueError, match=message):
        open_coco(folder, "train")


def test_a_folder_without_annotations_names_the_layouts(tmp_path):
    with pytest.raises(ValueError, match=r"instances_train\.json with train/"):
        open_coco(tmp_path, "train")


def test_text_that_is_no_json_is_refused(tmp_path):
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        read_coco(tmp_path / "a.json", tmp_path)


def test_nothing_to_learn_is_said(folder):
    change(folder, lambda c: c.update(annotations=[]))
    with pytest.raises(ValueError, match="has no object in its 4 images"):
        open_coco(folder, "train").require_objects()


def test_a_detector_with_masks_asks_for_masks(folder):
    change(folder, lambda c: c["annotations"][1].pop("segmentation"))
    with pytest.raises(ValueError, match=r"1 objects of .* have no mask"):
        open_coco(folder, "train").require_masks()


def test_boxes_refer_to_the_stored_pixels_of_a_turned_photograph(folder):
    split = open_coco(folder, "train")
    plain = Samples(split, 64, masks=False)[0, False].images
    for image in split.images:
        exif = Image.Exif()
        exif[0x0112] = 6
        with Image.open(image.path) as opened:
            opened.save(image.path.with_suffix(".png"), exif=exif)
        image.path.with_suffix(".png").replace(image.path)
    split = open_coco(folder, "train")  # COCO's json has the stored height and width
    assert torch.equal(Samples(split, 64, masks=False)[0, False].images, plain)
