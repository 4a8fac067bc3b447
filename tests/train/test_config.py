import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from zoo.commands.distill.args import read_args
from zoo.train.config import Optim, differences, to_json
from zoo.train.device import device_of
from zoo.train.distill.config import Distill, Heads, Losses, TeacherSpec
from zoo.train.distill.recipes import RECIPES, unic
from zoo.train.distill.stages import stages_of
from zoo.train.fields import built
from zoo.train.run import Run


@pytest.mark.parametrize("name", RECIPES)
def test_a_config_survives_json(name):
    for config in stages_of(RECIPES[name]()).values():
        assert built(Distill, to_json(config)) == config


def test_an_unknown_field_in_a_config_file_is_refused():
    with pytest.raises(ValueError, match="stepz"):
        built(Distill, dict(to_json(Distill()), stepz=3))


def test_a_teacher_on_the_command_line_carries_its_weights():
    spec = TeacherSpec.parse("timm:vit_tiny_patch16_224@96,summary=0,spatial=2")
    assert spec == TeacherSpec(name="timm:vit_tiny_patch16_224@96", summary=0, spatial=2)
    assert TeacherSpec.parse(spec.describe()) == spec
    for wrong in ("timm:x,size=3", "timm:x,summary=much", "timm:x,summary=0,spatial=0"):
        with pytest.raises(ValueError, match=r"summary|number|weights"):
            TeacherSpec.parse(wrong)


def test_a_teacher_on_the_command_line_carries_its_rate_and_whether_it_follows():
    spec = TeacherSpec.parse("timm:x,rate=0.25,follow=1")
    assert spec == TeacherSpec(name="timm:x", rate=0.25, follow=True)
    assert (
        TeacherSpec.parse(spec.describe()) == spec
        and spec.describe() == "timm:x,rate=0.25,follow=1"
    )
    cut = TeacherSpec.parse("timm:x,place=shard")
    assert cut.place == "shard" and cut.describe() == "timm:x,place=shard"
    for wrong, match in (
        ("rate=0", "rate is 0; it is a share above 0"),
        ("place=remote", "place=remote; it is replicate (a whole copy on each process) or shard"),
        ("follow=2", "1 (yes) or 0 (no)"),
    ):
        with pytest.raises(ValueError, match=re.escape(match)):
            TeacherSpec.parse(f"timm:x,{wrong}")


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (lambda: Losses(teacher_drop=1.5), "teacher_drop is 1.5"),
        (lambda: Losses(shift=-1), "shift is -1"),
        (lambda: Optim(damp=-0.1), "damp is -0.1"),
        (lambda: Distill(sizes=(64, 64)), "different numbers of pixels"),
        (lambda: Distill(sizes=(64, 96), batches=(32,)), "one number for each of --sizes"),
        (lambda: Distill(sizes=(64, 96), batches=(32, 64)), "at most batch, which is 32"),
        (lambda: Distill(sizes=(64, 96), batches=(32, 6), slices=4), "splits into slices"),
        (lambda: Distill(losses=Losses(mesa=1.0), optim=Optim(ema=0.0)), "optim.ema is 0"),
    ],
)
def test_an_ingredient_that_cannot_be_is_refused_with_what_came(wrong, match):
    with pytest.raises(ValueError, match=match):
        wrong()


def test_teachers_of_one_name_get_two_labels():
    teachers = tuple(TeacherSpec(name=f"timm:vit@{size}") for size in (224, 96))
    assert Distill(teachers=teachers).labels == ["vit", "vit_2"]


def test_only_what_is_learnt_counts_as_a_difference():
    run = Distill()
    assert differences(run, replace(run, workers=4, device="cpu")) == {}
    changed = replace(run, steps=3, heads=Heads(kind="v1"))
    assert differences(run, changed) == {"steps": (1000, 3), "heads.kind": ("v2", "v1")}


TWO = (TeacherSpec(name="rule:colour"), TeacherSpec(name="rule:edges"))


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        (dict(slices=2), "slices: 4 there, 2 here"),
        (dict(batch=16), "batch: 32 there, 16 here"),
        (dict(seed=1), "seed: 0 there, 1 here"),
        (dict(data="a=0.5,b=0.5"), "data: a=0.7,b=0.3 there, a=0.5,b=0.5 here"),
        (dict(optim=Optim(lr=2e-3)), "optim.lr: 0.001 there, 0.002 here"),
        (dict(teachers=(TWO[0], replace(TWO[1], rate=0.5))),
         "teachers[rule:edges].rate: 1.0 there, 0.5 here"),
        (dict(teachers=TWO[:1]),
         "teachers: ['rule:colour', 'rule:edges'] there, ['rule:colour'] here"),
        (dict(teachers=TWO[::-1]),
         "teachers: ['rule:colour', 'rule:edges'] there, ['rule:edges', 'rule:colour'] here"),
    ],
)  # fmt: skip
def test_a_run_that_is_resumed_with_other_settings_is_told_in_a_line_what_differs(
    fields, text, tmp_path
):
    config = Distill(out=tmp_path / "run", slices=4, teachers=TWO, data="a=0.7,b=0.3")
    Run.create(config)
    with pytest.raises(ValueError) as error:
        Run.reopen(config.out, replace(config, **fields))
    assert f"cannot go on with other settings ({text})." in str(error.value)
    assert "\n" not in str(error.value)
    assert Run.reopen(config.out, replace(config, workers=2)).path == config.out


def test_a_recipe_that_is_not_the_runs_own_is_told_what_differs_before_anything_is_opened(tmp_path):
    run = replace(unic(), out=tmp_path / "run")
    Run.create(run)
    own = read_args(["unic", "--resume", str(run.out)]).stages[""]
    assert Run.reopen(run.out, own).path == run.out
    other = read_args(["theia", "--resume", str(run.out)]).stages[""]
    with pytest.raises(ValueError, match=r"other settings \(.*teachers: \["):
        Run.reopen(run.out, other)


@pytest.mark.parametrize("field", ["size", "batch", "steps"])
def test_a_number_that_cannot_be_is_refused_by_name(field):
    with pytest.raises(ValueError, match=field):
        Distill(**{field: 0})


def test_a_run_folder_of_before_the_fields_were_renamed_is_read():
    new = Distill(view_epochs=2, heads=Heads(num_inner=0))
    old = to_json(new)
    old["views"] = old.pop("view_epochs")
    old["heads"]["inner"] = old["heads"].pop("num_inner")
    assert built(Distill, old) == new


def test_a_device_that_is_not_there_or_lacks_what_a_run_needs_is_refused_by_name():
    with pytest.raises(ValueError, match="float64, which device mps does not have"):
        Distill(device="mps")
    if not torch.backends.mps.is_available():
        with pytest.raises(ValueError, match=r"no Apple GPU \(mps\) here"):
            device_of("mps")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (dict(teacher_precision="int8"), "the weights of timm:x are to be cut as they are"),
        (dict(cache=Path("features"), view_epochs=1), "nothing to gain by cutting timm:x"),
    ],
)
def test_a_teacher_is_cut_neither_in_8_bits_nor_behind_a_cache(changes, match):
    with pytest.raises(ValueError, match=match):
        Distill(teachers=(TeacherSpec(name="timm:x", place="shard"),), **changes)
