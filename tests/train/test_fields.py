"""Changing a config by the names of its fields, with plain values."""

from pathlib import Path

import pytest

from zoo.eval.detect.config import Detect
from zoo.train.config import Optim
from zoo.train.distill.config import Distill, TeacherSpec
from zoo.train.fields import built, changed, with_new_names


def test_plain_values_become_what_the_fields_hold():
    run = changed(
        Distill(optim=Optim(warmup=0.5)),
        dict(
            teachers=["timm:test_vit/random@64,summary=0", TeacherSpec(name="rule:edges")],
            data=Path("photos"),
            out="runs/x",
            sizes=[64, 96],
            cache=None,
            optim=dict(lr=1, betas=[0.9, 0.95]),
        ),
    )
    assert run.teachers[0] == TeacherSpec(name="timm:test_vit/random@64", summary=0)
    assert run.teachers[1].name == "rule:edges"
    assert (run.data, run.out, run.sizes) == ("photos", Path("runs/x"), (64, 96))
    assert run.optim == Optim(warmup=0.5, lr=1.0, betas=(0.9, 0.95))


def test_a_whole_part_takes_the_place_of_the_old_one():
    run = changed(Distill(optim=Optim(warmup=0.5)), dict(optim=Optim(lr=3e-4)))
    assert run.optim == Optim(lr=3e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(step=3), r"no field step\. Did you mean steps\?"),
        (dict(optim=dict(lrr=3)), r"no field optim\.lrr\. Did you mean optim\.lr\?"),
        (dict(views=3), r"views is called view_epochs now"),
        (dict(heads=dict(inner=3)), r"heads\.inner is called heads\.num_inner now"),
        (dict(normalise="phis"), r"normalise is 'phis'; it must be 'phi_s' or"),
        (dict(steps="many"), r"steps is 'many'; it must be int"),
        (dict(steps=True), r"steps is True; it must be int"),
        (dict(teachers="timm:resnet18"), r"must be a list of TeacherSpec"),
        (dict(cache=3), r"cache is 3; it must be Path or None"),
        (dict(optim=3), r"optim is 3; it must be Optim"),
        (dict(teachers=["timn:resnet18"]), r"Did you mean timm"),
    ],
)
def test_what_a_field_cannot_take_is_refused_with_its_name(changes, message):
    with pytest.raises(ValueError, match=message):
        changed(Distill(), changes)


@pytest.mark.parametrize(
    "old",
    [dict(layer_decay=0.8, optim=dict(lr=1.0)), dict(optim=dict(lr=1.0), layer_decay=0.8)],
)
def test_a_field_that_moved_into_a_part_is_read_from_an_older_run(old):
    found = with_new_names(Detect, dict(old, steps=3))
    assert found == dict(optim=dict(lr=1.0, layer_decay=0.8), steps=3)


def test_an_integer_that_no_float_holds_is_refused_by_name():
    with pytest.raises(ValueError, match=r"optim\.lr is larger than any number"):
        built(Distill, {"optim": {"lr": 10**400}})
