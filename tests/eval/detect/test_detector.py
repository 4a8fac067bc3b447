"""Detectors over our backbones and timm's: they learn, find, and come back from their files."""

import dataclasses
import json
import math

import pytest
import timm
import torch

from zoo.eval.detect.canvas import Samples, batches
from zoo.eval.detect.coco import open_coco
from zoo.eval.detect.detector import (
    build_detector,
    find_source,
    is_detector,
    load_detector,
    save_detector,
)
from zoo.eval.detect.spec import BackboneSource, DetectorSpec

SMALL = {
    "eradio_nano": {},
    "fastervit_0": dict(
        depths=(1, 1, 1, 1), dim=16, num_heads=(2, 2), stem_dim=8, drop_path_rate=0.0
    ),
    "mambavision_t": dict(
        depths=(1, 1, 2, 2), dim=16, num_heads=(2, 2), stem_dim=8, drop_path_rate=0.0
    ),
    "radio_vit_base_patch16": dict(depth=2, embed_dim=32, num_heads=2),
    "vit_tiny_patch16_224": dict(depth=2, embed_dim=32, num_heads=2),
    "vit_small_patch14_dinov2": dict(depth=2, embed_dim=32, num_heads=2),
    "resnet18": {},
    "convnext_atto": dict(depths=(1, 1, 1, 1), dims=(8, 16, 24, 32)),
}
CLASSES = ("disc", "square", "triangle")


def spec(kind="mask_rcnn", name="eradio_nano", size=64, **changes):
    source = find_source(name, size, options=dict(SMALL[name]))
    return DetectorSpec(kind=kind, source=source, classes=CLASSES, size=size, width=32, **changes)


def batch_of(shapes, size, *, masks=True, count=3):
    samples = Samples(open_coco(shapes, "train"), size, masks=masks)
    (batch,) = batches(samples, [[(i, i % 2 == 1) for i in range(count)]])
    return batch


def trains(made, batch):
    detector = build_detector(made).train()
    losses = detector.losses(batch)
    sum(losses.values()).backward()
    assert all(math.isfinite(loss.detach()) for loss in losses.values())
    without = [
        n
        for n, p in detector.named_parameters()
        if p.requires_grad and p.grad is None and "head.norm" not in n
    ]  # of older timm: unused for maps
    assert not without
    assert any(p.grad.abs().sum() > 0 for p in detector.backbone.parameters())
    return detector.eval()


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("size", [64, 96])
def test_mask_rcnn_learns_over_every_kind_of_backbone_at_any_size(shapes, name, size):
    batch = batch_of(shapes, size)
    found = trains(spec(name=name, size=size, score=0.0), batch).predict(batch)
    for prediction, (rows, cols) in zip(found, batch.originals, strict=True):
        assert len(prediction.boxes)
        assert (prediction.boxes >= 0).all()
        assert (prediction.boxes <= torch.tensor([cols, rows, cols, rows]) + 1e-3).all()
        assert prediction.masks.shape == (len(prediction.boxes), rows, cols)
        assert set(prediction.labels.tolist()) <= {0, 1, 2}
        assert (prediction.scores.diff() <= 0).all()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize("kind", ["faster_rcnn", "retinanet", "detr", "rt_detr_v2", "mask2former"])
def test_every_detector_learns_finds_and_comes_back_from_its_file(shapes, tmp_path, kind):
    pytest.importorskip("transformers", reason="transformers is not installed")
    made = spec(kind, score=0.0)
    batch = batch_of(shapes, 64, masks=made.has_masks)
    detector = trains(made, batch)
    save_detector(detector, tmp_path / "detector")
    again = load_detector(tmp_path)
    assert again.spec == detector.spec
    for ours, theirs in zip(detector.predict(batch), again.predict(batch), strict=True):
        assert torch.equal(ours.boxes, theirs.boxes)
        assert torch.equal(ours.scores, theirs.scores)


def test_a_detector_is_known_by_its_files(tmp_path):
    assert is_detector(tmp_path) is None
    with pytest.raises(ValueError, match="holds no trained detector"):
        load_detector(tmp_path)
    save_detector(build_detector(spec("faster_rcnn")), tmp_path / "detector")
    assert is_detector(tmp_path) == is_detector(tmp_path / "detector") == tmp_path / "detector"


def test_a_prediction_does_not_depend_on_its_neighbours(shapes):
    detector = build_detector(spec("faster_rcnn", score=0.0)).eval()
    samples = Samples(open_coco(shapes, "train"), 64, masks=False)
    (both,) = batches(samples, [[(0, False), (1, False)]])
    (alone,) = batches(samples, [[(1, False)]])
    torch.testing.assert_close(detector.predict(both)[1].boxes, detector.predict(alone)[0].boxes)


def test_low_precision_leaves_boxes_in_float32(shapes):
    detector = build_detector(spec("faster_rcnn", score=0.0)).eval()
    detector.precision = torch.bfloat16
    (found, *_) = detector.predict(batch_of(shapes, 64, masks=False))
    assert found.boxes.dtype == torch.float32
    # bfloat16 has 8 bits: no box of it lies between the multiples of a quarter from 32 to 64
    inside = found.boxes[(found.boxes > 33) & (found.boxes < 63)]
    assert ((inside * 4).frac() != 0).any()


def test_levels_are_those_of_the_strides_that_detectors_use():
    found = {name: find_source(name, 64, options=dict(SMALL[name])) for name in SMALL}
    assert found["resnet18"].levels == (1, 2, 3, 4)  # 0 is the stem, of stride 2
    assert found["eradio_nano"].levels == (0, 1, 2, 3)  # 4 is its dense map
    assert found["vit_tiny_patch16_224"].strides == (16,)
    assert found["eradio_nano"].options["img_size"] == 64
    assert found["vit_small_patch14_dinov2"].options["img_size"] == 56  # 4 x 4 patches
    assert "img_size" not in found["resnet18"].options


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: spec(size=80), "not a multiple of 32; the nearest is"),
        (lambda: find_source("resnet1", 64), "neither a registered model nor the folder"),
        (lambda: build_detector(spec("rt_detr_v2", "vit_tiny_patch16_224")), "needs 3 maps"),
        (lambda: build_detector(spec("detr", "vit_small_patch14_dinov2")), "needs 1 maps"),
        (lambda: find_source("resnet18", 64, options=dict(nothing=3)), "refuses its options"),
        (lambda: build_detector(dataclasses.replace(spec("mask2former"), width=16)), "of 32"),
    ],
)
def test_what_suits_no_detector_is_refused(make, message):
    pytest.importorskip("transformers", reason="transformers is not installed")
    with pytest.raises(ValueError, match=message):
        make()


def test_the_folder_of_a_model_is_a_backbone_with_its_weights_and_options(tmp_path):
    options = SMALL["fastervit_0"]
    model = timm.create_model("fastervit_0", num_classes=0, **options)
    timm.models.save_for_hf(model, str(tmp_path / "export"), model_args=dict(options))
    for target in (tmp_path, tmp_path / "export"):
        source = find_source(str(target), 64)
        assert source.options["dim"] == 16
        made = DetectorSpec(kind="faster_rcnn", source=source, classes=CLASSES, size=64, width=16)
        detector = build_detector(made, pretrained=True)
        theirs = model.state_dict()
        ours = {k.removeprefix("model."): v for k, v in detector.backbone.state_dict().items()}
        assert len(ours) > 50
        assert all(torch.equal(v, theirs[k]) for k, v in ours.items())


def test_a_spec_comes_back_from_json_and_a_wrong_type_in_it_is_named(tmp_path):
    from zoo.eval.detect.detector import read_spec

    made, file = spec(), tmp_path / "config.json"
    content = dataclasses.asdict(made)
    assert isinstance(made.source, BackboneSource)
    file.write_text(json.dumps(content))
    assert read_spec(file) == made
    for wrong, said in (
        (dict(content, size="512"), "field size"),
        (dict(content, classes=[1, 2]), "field classes"),
        (dict(content, kind="yolo"), "field kind"),
        (dict(content, source=[]), "field source"),
        (dict(content, source=dict(content["source"], strides=["4"])), "field strides"),
        ({k: v for k, v in content.items() if k != "classes"}, "classes"),
    ):
        file.write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=rf"config\.json.*{said}"):
            read_spec(file)
