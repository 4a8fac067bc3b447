"""Detection on the training loop: losses fall, runs repeat and resume, rates are as asked."""

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from zoo.data.plan import Plan
from zoo.eval.detect.canvas import Samples
from zoo.eval.detect.coco import open_coco
from zoo.eval.detect.config import Detect
from zoo.eval.detect.training import DetectFeed, DetectTask, start, train_detector
from zoo.train.config import Every
from zoo.train.loop import train
from zoo.train.optim import learning_rate
from zoo.train.run import Run
from zoo.train.task import Loss

CLASSES = ("disc", "square", "triangle")
CPU = torch.device("cpu")


def config(out, *, lr=1e-3, layer_decay=1.0, **changes):
    first = Detect(
        backbone="eradio_nano", out=out, detector="faster_rcnn", size=64, width=16, device="cpu",
        steps=4, batch=2, every=Every(log=1, checkpoint=2),
    )  # fmt: skip
    optim = replace(first.optim, lr=lr, layer_decay=layer_decay)
    return replace(first, optim=optim, **changes)


def trained(asked, shapes):
    """Train from the newest checkpoint; the state that comes of it, and the losses."""
    run = Run.begin(asked)
    state = start(asked, CLASSES, run)
    train_detector(state, asked, open_coco(shapes, "train"), run)
    rows = map(json.loads, (run.path / "metrics.jsonl").read_text().splitlines())
    return state, [row["loss"] for row in rows if row["kind"] == "train"]


def assert_same_weights(ours, theirs):
    for key, value in ours.model.state_dict().items():
        assert torch.equal(value, theirs.model.state_dict()[key]), key


@pytest.mark.slow
def test_a_run_repeats_itself(shapes, tmp_path):
    first, losses = trained(config(tmp_path / "first"), shapes)
    second, again = trained(config(tmp_path / "second"), shapes)
    assert losses == again
    assert_same_weights(first, second)
    assert trained(config(tmp_path / "other", seed=1), shapes)[1] != losses


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_a_resumed_run_equals_an_uninterrupted_one(shapes, tmp_path, workers):
    whole, expected = trained(config(tmp_path / "whole", workers=workers), shapes)
    begun = config(tmp_path / "parts", workers=workers)
    trained(begun, shapes)
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "step_00000004")
    resumed, losses = trained(begun, shapes)
    assert losses == expected
    assert_same_weights(resumed, whole)


@pytest.mark.slow
def test_the_loss_of_a_few_images_falls_by_half(shapes, tmp_path):
    _, found = trained(config(tmp_path / "run", steps=24, batch=4, lr=3e-3), shapes)
    assert sum(found[-4:]) < 0.5 * sum(found[:4])


@pytest.mark.slow
def test_slices_have_batch_statistics_of_their_own_and_move_the_running_ones_once(shapes, tmp_path):
    """With S slices of one image a step counts once, and by the mean of the losses."""
    asked = config(tmp_path / "run", steps=1, batch=4, slices=4)
    state, (loss,) = trained(asked, shapes)
    assert math.isfinite(loss)
    counted = [b for n, b in state.model.named_buffers() if n.endswith("num_batches_tracked")]
    assert counted and all(count == 1 for count in counted)
    _, (whole,) = trained(config(tmp_path / "whole", steps=1, batch=4), shapes)
    assert loss == pytest.approx(whole, rel=0.2)


@pytest.mark.slow
def test_an_image_that_cannot_be_decoded_is_replaced_and_named(shapes, tmp_path):
    split = open_coco(shapes, "train")
    broken = tmp_path / "broken.png"
    broken.write_bytes(split.images[2].path.read_bytes()[:60])
    images = [replace(i, path=broken) if i is split.images[2] else i for i in split.images]
    asked = config(tmp_path / "run")
    run = Run.begin(asked)
    train_detector(start(asked, CLASSES), asked, replace(split, images=tuple(images)), run)
    assert run.skipped() == [str(broken)]


@pytest.mark.slow
def test_a_loss_that_is_no_number_stops_the_run_and_names_the_images(shapes, tmp_path):
    class Sick(DetectTask):
        def losses(self, state, batch, targets, step):
            losses = super().losses(state, batch, targets, step)
            return {
                name: Loss(loss.total * (math.nan if step > 1 else 1), loss.count)
                for name, loss in losses.items()
            }

    asked = config(tmp_path / "run")
    run, state = Run.begin(asked), start(asked, CLASSES)
    feed = DetectFeed.of(asked, open_coco(shapes, "train"), state)
    with pytest.raises(ValueError, match=r"step 2 is not finite.*step_00000002"):
        train(Sick(), state, feed, asked, run)
    keys = run.read_json("nan_batch.json")["keys"]
    assert len(keys) == 2 and all(key.endswith(".png") for key in keys)


def feed(shapes, num_slices=1, **plan):
    samples = Samples(open_coco(shapes, "train"), 64, masks=False)
    how = dict(samples=6, batch=4, seed=0) | plan
    return DetectFeed(samples, Plan(**how), CPU, range(num_slices), num_slices)


def test_an_epoch_shows_every_image_once(shapes):
    indices = [i for part in feed(shapes).order(0, 3) for i, _ in part]
    assert sorted(indices[:6]) == sorted(indices[6:]) == list(range(6))
    assert indices[:6] != indices[6:]


def test_the_order_is_that_of_the_plan_wherever_it_begins_and_however_it_is_cut(shapes):
    whole = list(feed(shapes).order(0, 8))
    assert list(feed(shapes).order(5, 8)) == whole[5:]
    assert list(feed(shapes, seed=4).order(0, 8)) != whole
    halves = list(feed(shapes, num_slices=2).order(0, 8))
    assert [a + b for a, b in zip(halves[::2], halves[1::2], strict=True)] == whole
    plan = Plan(6, 4, 0)
    assert [[i for i, _ in part] for part in whole] == [plan.indices(s).tolist() for s in range(8)]


def test_half_of_the_images_are_mirrored_each_as_its_position_says(shapes):
    mirrored = [m for part in feed(shapes).order(0, 200) for _, m in part]
    assert 0.42 < np.mean(mirrored) < 0.58
    assert mirrored[7] == (Plan(6, 4, 0).draws(7).random() < 0.5)


def test_the_rate_rises_and_falls_to_nothing():
    asked = Detect()
    optim = replace(asked.optim, lr=1.0, warmup=0.1)
    values = [learning_rate(step, 100, optim) for step in range(100)]
    assert max(values) == pytest.approx(1)
    assert values.index(max(values)) == 10
    assert values[99] < 0.001


def test_every_weight_is_in_one_group_and_biases_are_not_decayed(tmp_path):
    state = start(config(tmp_path), CLASSES)
    grouped = [id(p) for group in state.optimizer.param_groups for p in group["params"]]
    learned = [id(p) for p in state.model.parameters() if p.requires_grad]
    assert sorted(grouped) == sorted(learned)
    for group in state.optimizer.param_groups:
        if group["weight_decay"]:
            assert all(p.ndim > 1 for p in group["params"])


@pytest.mark.parametrize("name", ["eradio_nano", "resnet18"])
def test_layer_decay_slows_the_first_layers_most(name, tmp_path):
    asked = config(tmp_path, backbone=name, layer_decay=0.5, backbone_lr=0.1)
    state = start(asked, CLASSES)
    scales = sorted({group["scale"] for group in state.optimizer.param_groups})
    assert scales[-1] == 1  # the new parts
    assert scales[0] < scales[-2] <= 0.1
    backbone = {id(p) for p in state.model.backbone.parameters()}
    for group in state.optimizer.param_groups:
        if group["scale"] < 1:
            assert {id(p) for p in group["params"]} <= backbone


@pytest.mark.slow
def test_frozen_norms_keep_their_statistics_also_after_an_evaluation(shapes, tmp_path):
    for norms, still in (("frozen", True), ("trained", False)):
        asked = config(
            tmp_path / norms, backbone="resnet18", norms=norms, steps=2, every=Every(evaluate=1)
        )
        state, run = start(asked, CLASSES), Run.begin(asked)
        before = {k: v.clone() for k, v in state.model.backbone.state_dict().items()}
        train_detector(
            state, asked, open_coco(shapes, "train"), run, evaluate=lambda model, _: model.eval()
        )
        assert state.model.training
        after = state.model.backbone.state_dict()
        kept = [torch.equal(before[k], after[k]) for k in before if "running" in k]
        assert all(kept) if still else not any(kept)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(steps=0), "steps is 0"),
        (dict(lr=math.nan), "lr is nan"),
        (dict(layer_decay=1.5), "at most 1"),
        (dict(width=0), "width is 0"),
        (dict(precision="float64"), "float32 or bf16"),
        (dict(slices=4), "does not split into 4"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **settings)
