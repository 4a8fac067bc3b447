"""The loop: losses fall, runs repeat and resume exactly, rates are as asked."""

import math

import pytest
import torch

from zoo.eval.detect.canvas import Samples
from zoo.eval.detect.coco import open_coco
from zoo.eval.detect.detector import build_detector, find_source
from zoo.eval.detect.spec import DetectorSpec
from zoo.eval.detect.training import Trainee, Training, parameter_groups, rate, train_steps

CPU = torch.device("cpu")


def trainee(name="eradio_nano", kind="faster_rcnn", **settings):
    torch.manual_seed(0)
    made = DetectorSpec(
        kind=kind,
        source=find_source(name, 64),
        classes=("disc", "square", "triangle"),
        size=64,
        width=16,
    )
    how = dict(steps=4, batch=2, lr=1e-3) | settings
    return Trainee(build_detector(made), Training(**how))


def samples(shapes):
    return Samples(open_coco(shapes, "train"), 64, masks=False, keep=True)


def losses(run, shapes):
    return [float(row["loss"]) for row in train_steps(run, samples(shapes), device=CPU)]


@pytest.mark.slow
def test_a_run_repeats_itself(shapes):
    assert losses(trainee(), shapes) == losses(trainee(), shapes)
    assert losses(trainee(), shapes) != losses(trainee(seed=1), shapes)


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one(shapes):
    whole = trainee()
    expected = losses(whole, shapes)
    first = trainee()
    steps = train_steps(first, samples(shapes), device=CPU)
    begun = [float(next(steps)["loss"]) for _ in range(2)]
    state = first.state()
    second = trainee()
    second.load(state)
    assert begun + losses(second, shapes) == expected
    for ours, theirs in zip(second.detector.parameters(), whole.detector.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.slow
def test_the_loss_of_a_few_images_falls_by_half(shapes):
    found = losses(trainee(steps=24, batch=4, lr=3e-3), shapes)
    assert sum(found[-4:]) < 0.5 * sum(found[:4])


def test_the_rate_rises_and_falls_to_nothing():
    config = Training(steps=100, lr=1.0, warmup=0.1)
    values = [rate(step, config) for step in range(100)]
    assert max(values) == pytest.approx(1)
    assert values.index(max(values)) == 10
    assert values[0] == pytest.approx(1 / 11)
    assert values[99] < 0.001
    assert values[55] == pytest.approx(0.5)


def test_every_weight_is_in_one_group_and_biases_are_not_decayed():
    run = trainee()
    grouped = [id(p) for group in run.optimizer.param_groups for p in group["params"]]
    trained = [id(p) for p in run.detector.parameters() if p.requires_grad]
    assert sorted(grouped) == sorted(trained)
    for group in run.optimizer.param_groups:
        if group["weight_decay"]:
            assert all(p.ndim > 1 for p in group["params"])


@pytest.mark.parametrize("name", ["eradio_nano", "resnet18"])
def test_layer_decay_slows_the_first_layers_most(name):
    run = trainee(name, layer_decay=0.5, backbone_lr=0.1)
    scales = sorted({group["scale"] for group in parameter_groups(run.detector, run.config)})
    assert scales[-1] == 1  # the new parts
    assert scales[0] < scales[-2] <= 0.1
    backbone = {id(p) for p in run.detector.backbone.parameters()}
    for group in run.optimizer.param_groups:
        if group["scale"] < 1:
            assert {id(p) for p in group["params"]} <= backbone


@pytest.mark.slow
def test_frozen_norms_keep_their_statistics(shapes):
    for norms, still in (("frozen", True), ("trained", False)):
        run = trainee("resnet18", norms=norms, steps=1)
        before = {k: v.clone() for k, v in run.detector.backbone.state_dict().items()}
        losses(run, shapes)
        after = run.detector.backbone.state_dict()
        kept = [torch.equal(before[k], after[k]) for k in before if "running" in k]
        assert all(kept) if still else not any(kept)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(steps=0), "steps is 0"),
        (dict(lr=math.nan), "lr is nan"),
        (dict(layer_decay=1.5), "at most 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Training(**settings)
