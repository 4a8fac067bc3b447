"""Every number that a person can set has a range, and one sentence says which."""

import math
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest

from zoo.commands import embed_request, openmmlab
from zoo.commands.bench import distill_args, models_args
from zoo.commands.evaluate.args import EvalArgs
from zoo.eval import settings
from zoo.eval.detect.config import Detect, DetectSettings
from zoo.eval.subject import EvalRequest
from zoo.experiments.phi_s.config import PhiSExperiment
from zoo.experiments.students.config import StudentsExperiment
from zoo.teachers.name import MOST_PIXELS, TeacherName
from zoo.train import ranges
from zoo.train.config import Augment, Every, Optim
from zoo.train.distill.config import Distill, Heads, Losses, TeacherSpec
from zoo.train.distill.mask_config import Mask, MaskImages
from zoo.train.distill.token_config import DistillText, TokenLosses
from zoo.train.ranges import ranges_of

CONFIGS = (
    Optim, Every, Augment, Heads, Losses, TeacherSpec, Distill, TokenLosses, DistillText, Mask,
    MaskImages,
    Detect,
    DetectSettings, EvalRequest,
    PhiSExperiment, StudentsExperiment, embed_request.Embed, EvalArgs,
    openmmlab.DetectConfigArgs, openmmlab.SegmentConfigArgs,
    models_args.ModelArgs, distill_args.StepArgs,
    *(kind for name, kind in vars(settings).items() if name.endswith("Settings")),
)  # fmt: skip


NUMBERS = (math.nan, math.inf, -1, -math.inf, 10**400)


def _numbers(hint) -> bool:
    """Tell whether a field of this type holds numbers."""
    if get_origin(hint) is Literal:
        return False
    return hint in (int, float) or any(map(_numbers, get_args(hint)))


@pytest.mark.parametrize("kind", CONFIGS, ids=lambda kind: kind.__name__)
def test_every_number_that_can_be_set_has_a_range(kind):
    hints = get_type_hints(kind)
    numbers = {field.name for field in fields(kind) if _numbers(hints[field.name])}
    assert numbers == set(ranges_of(kind))


@pytest.mark.parametrize("kind", CONFIGS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(
    "wrong", [math.nan, math.inf, -1, -math.inf, 10**400], ids=lambda n: str(n)[:4]
)
def test_nan_infinity_minus_one_and_a_number_of_400_digits_are_in_no_config(kind, wrong):
    needed: dict[str, Any] = dict(name="timm:x") if kind is TeacherSpec else {}
    if kind is embed_request.Embed:
        needed = dict(data="", out="", model="")
    if kind.__module__ == openmmlab.__name__:
        needed = dict(backbone="", data="", config="")
        needed |= dict(detector="") if kind is openmmlab.DetectConfigArgs else {}
    for name, hint in get_type_hints(kind).items():
        if _numbers(hint):
            value: Any = (wrong, wrong) if get_origin(hint) is tuple else wrong
            with pytest.raises(ValueError, match=rf"{name} is .*(it|each) is"):
                kind(**needed, **{name: value})


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda: Optim(clip=-1), "optim.clip is -1; it is 0 (off) or more."),
        (lambda: Optim(ema=2.0), "optim.ema is 2; it is 0 (off) or more and below 1."),
        (lambda: Optim(warmup=5.0), "optim.warmup is 5; it is a share from 0 to 1."),
        (lambda: Optim(betas=(0.9, 2.0)), "optim.betas is (0.9, 2.0); each is 0 or more"),
        (lambda: Optim(lr=1e-7), "optim.min_lr is 1e-06, above optim.lr, which is 1e-07"),
        (lambda: Every(log=0), "every.log is 0; it is 1 or more."),
        (lambda: Augment(flip=7.0), "augment.flip is 7; it is a chance from 0 to 1."),
        (lambda: Augment(scale=(5.0, 9.0)), "augment.scale is (5.0, 9.0); each is a share"),
        (lambda: Augment(scale=(1.0, 0.5)), "its first number is the smaller share"),
        (lambda: Augment(ratio=(2.0, 1.0)), "its first number is the smaller ratio"),
        (lambda: Heads(num_inner=100_000), "heads.num_inner is 100000; it is 0 to 64."),
        (lambda: Distill(batch=10**8), "batch is 100000000; it is 1 to 1,048,576."),
        (lambda: Distill(calibration=10**9), "calibration is 1000000000; it is 1 to 1,000,000."),
        (lambda: Distill(probe_images=0), "probe_images is 0; it is 1 or more."),
        (lambda: TeacherSpec.parse("timm:x,summary=nan"), "summary is nan; it is 0 (off) or more."),
        (lambda: TeacherSpec.parse("timm:x,spatial=inf"), "spatial is inf; it is 0 (off) or more."),
        (lambda: TeacherName.parse("timm:x@100000"), "resolution is 1 to 8,192 pixels"),
        (lambda: TeacherName.parse("timm:x@0"), "asks for images of 0 px"),
    ],
)  # fmt: skip
def test_a_message_says_what_came_and_what_may_come(wrong, said):
    with pytest.raises(ValueError) as refused:
        wrong()
    assert said in str(refused.value)


def test_teachers_and_students_may_look_at_images_of_the_same_size():
    assert MOST_PIXELS == ranges.MOST_PIXELS
