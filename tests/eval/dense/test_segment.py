"""Segmentation: planted answers, the head's training, and UPerNet against transformers'."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from zoo.eval.dense.segment import LinearHead, SegmentSettings, panel, pixel_loss, segment
from zoo.eval.dense.training import HeadTraining
from zoo.eval.dense.upernet import BackbonePyramid, UPerNet
from zoo.eval.examples import Example
from zoo.eval.registry import Picture, Scores, Subject
from zoo.features import Batch
from zoo.students.build import build_student
from zoo.train.optim import learning_rate

COLOURS = np.array([[200, 20, 20], [20, 200, 20], [20, 20, 200]], np.uint8)
NAMES = ["red", "green", "blue"]
QUICK = SegmentSettings(crop=32, stride=16, steps=40, batch=4, lr=0.1, pictures=1)


def every(step):
    """See every so manieth pixel as it is."""
    return lambda x: x[..., ::step, ::step]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Images whose pixels have the colour of their class; a stripe of each belongs to none."""
    root = tmp_path_factory.mktemp("blocks")
    draws = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 3)):
        for kind in ("images", "masks"):
            (root / kind / split).mkdir(parents=True)
        for i in range(count):
            truth = draws.integers(3, size=(4, 6)).repeat(8, axis=0).repeat(8, axis=1)
            Image.fromarray(COLOURS[truth]).save(root / "images" / split / f"{i}.png")
            truth[:, :2] = 255
            Image.fromarray(truth.astype(np.uint8)).save(root / "masks" / split / f"{i}.png")
    (root / "classes.json").write_text(json.dumps(NAMES))
    return root


def measured(who, data, settings):
    found = dict(segment(who, data, settings))
    pictures = {name: value for name, value in found.items() if isinstance(value, Picture)}
    numbers = {
        name: value.value if isinstance(value, Scores) else value
        for name, value in found.items()
        if name not in pictures and not isinstance(value, Example)
    }
    return numbers, pictures


def test_a_planted_segmenter_scores_100(planted, data):
    numbers, pictures = measured(planted(), data, QUICK)
    assert numbers == dict.fromkeys(numbers, 100.0)
    assert {f"segment/class/{name}" for name in NAMES} <= set(numbers)
    (shown,) = pictures.values()
    assert shown.pixels.shape[1:] == (3 * 48, 3) and shown.pixels.dtype == np.uint8
    assert shown.pixels.shape[0] > 32 and "worst 1 of" in shown.caption  # the legend is below


@pytest.mark.gpu
def test_on_a_gpu_a_planted_segmenter_scores_100_in_bf16_and_twice_the_same(planted, data):
    device = torch.device("cuda")
    for settings in (QUICK, replace(QUICK, steps=5, lr=0.01)):
        runs = []
        for _ in range(2):
            who = planted(device=device, precision="amp")
            who.made = who.student.to(device)
            runs.append(measured(who, data, settings)[0])
        assert runs[0] == runs[1]
        assert settings is not QUICK or runs[0] == dict.fromkeys(runs[0], 100.0)


def test_a_blind_one_scores_what_the_commonest_class_is_worth(planted, data):
    numbers, _ = measured(planted(lambda x: x * 0), data, QUICK)
    truth = [np.asarray(Image.open(p)) for p in sorted((data / "masks" / "val").iterdir())]
    shares = [(np.stack(truth) == i).sum() / (np.stack(truth) != 255).sum() for i in range(3)]
    assert numbers["segment/miou"] in [pytest.approx(100 * share / 3) for share in shares]
    assert numbers["segment/mean_accuracy"] == pytest.approx(100 / 3)


def test_the_same_seed_gives_the_same_numbers_and_leaves_the_callers_draws_alone(planted, data):
    settings = replace(QUICK, steps=3, lr=0.01)
    before = torch.get_rng_state()
    first, _ = measured(planted(every(4)), data, settings)
    assert torch.equal(torch.get_rng_state(), before)
    assert measured(planted(every(4)), data, settings)[0] == first
    assert measured(planted(every(4), seed=1), data, settings)[0] != first


def test_crops_of_another_size_leave_the_student_as_it_was(data):
    who = Subject(name="vit", made=build_student("vit_tiny_patch16_224", {}, size=64).eval())
    before = {k: v.clone() for k, v in who.student.state_dict().items()}
    measured(who, data, replace(QUICK, steps=1, crop=32, stride=32))
    assert who.student.size == (64, 64)
    assert all(torch.equal(v, before[k]) for k, v in who.student.state_dict().items())


def test_a_size_that_the_model_cannot_look_at_names_the_option(data):
    who = Subject(name="vit", made=build_student("vit_tiny_patch16_224", {}, size=64).eval())
    with pytest.raises(
        ValueError, match=r"vit_tiny\S+ cannot process 40 px: .* --segment\.crop 32 or 48"
    ):
        measured(who, data, replace(QUICK, crop=40))


@pytest.mark.parametrize("rate", [0.0, 1e-3])
def test_upernet_learns_on_frozen_or_tuned_features(data, rate):
    backbone = build_student("eradio_nano", {}, size=64).eval()
    who = Subject(name="eradio", made=backbone)
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    settings = SegmentSettings(
        head="upernet", crop=64, stride=64, steps=3, batch=2, hidden=8, backbone_lr=rate
    )
    numbers, _ = measured(who, data, settings)
    assert 0 <= numbers["segment/miou"] <= 100
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())


def test_upernet_equals_that_of_transformers_with_the_same_weights():
    hf = pytest.importorskip("transformers", reason="transformers is in the extra [teachers]")
    from transformers.models.upernet.modeling_upernet import UperNetHead

    widths, classes = [4, 6, 8, 10], 5
    config = hf.UperNetConfig(
        backbone_config=hf.ResNetConfig(),
        hidden_size=12,
        num_labels=classes,
        use_auxiliary_head=False,
    )
    theirs, ours = UperNetHead(config, widths), UPerNet(widths, classes, hidden=12)
    for part in theirs.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias)
    names = (
        (r"^psp_modules\.(\d)\.\d\.", r"context.\1."), (r"^bottleneck", "top"),
        (r"^lateral_convs", "lateral"), (r"^fpn_convs", "smooth"), (r"^fpn_bottleneck", "join"),
        (r"\.conv\.", ".0."), (r"\.batch_norm\.", ".1."),
    )  # fmt: skip
    state = {}
    for key, value in theirs.state_dict().items():
        for old, new in names:
            key = re.sub(old, new, key)
        state[key] = value
    ours.load_state_dict(state)
    maps = [torch.randn(2, c, 48 // 2**i, 64 // 2**i) for i, c in enumerate(widths)]
    with torch.no_grad():
        got, want = ours.eval()(maps), theirs.eval()(maps)
    # resized by matrix products here, by sampling there: float32's last digits
    torch.testing.assert_close(got.permute(0, 3, 1, 2), want, rtol=1e-4, atol=1e-5)


def test_a_pyramid_has_strides_4_to_32_for_a_hierarchy_and_for_patches_of_16():
    for name in ("eradio_nano", "vit_tiny_patch16_224", "resnet18"):
        student = build_student(name, {}, size=64).eval()
        maps = BackbonePyramid(student.backbone, student.mean, student.std)(
            Batch(torch.rand(1, 3, 64, 64))
        )
        assert [m.shape[-1] for m in maps] == [16, 8, 4, 2], name


def test_the_loss_is_the_mean_over_pixels_that_are_scored():
    logits, target = torch.randn(2, 4, 4, 3), torch.randint(3, (2, 4, 4)).byte()
    target[0, 0] = 255
    known = target != 255
    want = nn.functional.cross_entropy(logits[known], target[known].long())
    torch.testing.assert_close(pixel_loss(logits, target), want)
    none = pixel_loss(logits.requires_grad_(), torch.full_like(target, 255))
    none.backward()
    assert none == 0 and not logits.grad.any()


@pytest.mark.parametrize(
    ("steps", "rates"),
    [(100, {0: 0.1, 9: 0.91, 50: 0.5, 99: 0.01}), (40_000, {0: 1 / 1500, 1499: 0.962525})],
)
def test_the_rate_rises_over_the_warm_up_and_falls_to_nothing(steps, rates, tmp_path):
    optim = HeadTraining.of(SegmentSettings(steps=steps, lr=1.0), 0, tmp_path).optim
    for step, rate in rates.items():
        assert learning_rate(step, steps, optim) == pytest.approx(rate)


def test_the_linear_head_is_batch_norm_and_one_layer():
    head = LinearHead(6, 4).eval()
    x = torch.randn(2, 3, 5, 6)
    torch.testing.assert_close(head(x), head.classifier(x / (1 + 1e-5) ** 0.5))


def test_a_panel_shows_what_is_not_scored_in_black():
    truth = torch.tensor([[0, 255], [1, 1]])
    drawn = panel(torch.full((3, 2, 2), 100, dtype=torch.uint8), truth, truth * 0, COLOURS)
    assert (drawn[0, 3] == 0).all() and (drawn[0, 5] != 0).any()  # the prediction is shown there
    assert (drawn[0, 5] == drawn[1, 5]).all()
    assert (drawn[:, :2] == 100).all() and (drawn[1, 2] != drawn[1, 4]).any()


def test_settings_that_contradict_each_other_are_refused():
    for wrong, message in (
        (dict(stride=600), "gaps between windows of 512"),
        (dict(batch=1), "segment.batch is 1; it is 2 to"),
        (dict(backbone_lr=1e-4), "linear head is for frozen features"),
        (dict(lr=0.0), "segment.lr is 0"),
        (dict(steps=0), "steps is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            SegmentSettings(**wrong)
