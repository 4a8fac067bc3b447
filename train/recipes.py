"""Recipes: functions that return a run. A variant is a `replace` of another one."""

from collections.abc import Callable
from dataclasses import replace

from zoo.train.config import Distill, Every, Optim, TeacherSpec


def custom() -> Distill:
    """Your data, your teachers, your student."""
    return Distill()


def quickstart() -> Distill:
    """Three teachers made on the spot, one small E-RADIO, five minutes on two CPU cores."""
    teachers = ("classifier", "autoencoder", "gradients")
    return replace(
        custom(),
        data="embedded",
        teachers=tuple(TeacherSpec(name=f"pretext:{name}") for name in teachers),
        student="eradio_nano",
        size=128,
        batch=32,
        steps=240,
        calibration=16,
        compare=("none",),
        optim=Optim(lr=2e-3, ema=0.98),
        every=Every(log=20, checkpoint=120, evaluate=120),
    )


RECIPES: dict[str, Callable[[], Distill]] = {"custom": custom, "quickstart": quickstart}
