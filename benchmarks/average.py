"""Averaged weights against those of the last step, after runs of several lengths.

    python3 benchmarks/average.py PHOTOS --labelled FOLDER --workers 14 --out average.json

One training of each length keeps several averages at once: none (`raw`), a constant decay of 0.999
(`0.999`, as the default once was), and the running mean of `zoo.train.average` (`auto`) with other
mean ages beside it. Each is compared with the teachers on held-out images, and by kNN where the
folder has classes. On one H200, with two EfficientNet-Lites out of the package index as teachers
and MambaVision-T at 160 px, batch 256, steps 100, 1000 and 1600, a run takes about 8 minutes where
16 cores decode. `--tiny` needs no data and no GPU.
"""

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from timm.utils import ModelEmaV3
from torch import nn

from zoo.commands.distill.run import evaluated, held_out, probe
from zoo.data.feed import ImageFeed
from zoo.data.plan import Plan
from zoo.eval.fidelity import fidelity
from zoo.files import written_whole
from zoo.train import average
from zoo.train.average import Average
from zoo.train.config import Every, Optim
from zoo.train.distill.calibrate import Calibration, fit_normalizers
from zoo.train.distill.config import Distill, TeacherSpec
from zoo.train.distill.fold import folded
from zoo.train.distill.setup import Setup, new_student, prepare
from zoo.train.distill.task import DistillTask
from zoo.train.loop import train
from zoo.train.run import Run
from zoo.train.state import TrainState

TEACHERS = ("timm:tf_efficientnet_lite0/wheel", "timm:tf_efficientnet_lite2/wheel")
AGES = (1 / 40, 1 / 20, 1 / 10)
"""Mean ages as shares of the run; the default is among them."""


class Aged(Average):
    """The running mean with another mean age."""

    def __init__(self, model: nn.Module, age: float):
        super().__init__(model)
        self.age = age

    def get_decay(self, step: int | None = None) -> float:
        assert step is not None
        return (step - 1) / (step - 1 + 1 / self.age - 1)


class Several(Average):
    """Many averages of one model, which are brought on together."""

    def __init__(self, model: nn.Module):
        super().__init__(model)
        self.others: dict[str, ModelEmaV3] = {"0.999": ModelEmaV3(model, decay=0.999)}
        self.others |= {f"age 1/{1 / age:g}": Aged(model, age) for age in AGES}

    def update(self, model: nn.Module, step: int | None = None) -> None:
        for other in self.others.values():
            other.update(model, step)


def trained(
    config: Distill, setup: Setup, run: Run, calibration: Calibration
) -> dict[str, nn.Module]:
    """Train once; return the weights of the last step and every average."""
    student = new_student(setup, calibration.normalizers)
    plan = Plan(len(setup.train), config.batch, config.seed)
    feed = ImageFeed(setup.train, setup.view, plan, setup.device, 1, (), setup.workers)
    task = DistillTask.of(config, student, plan, setup.teachers, calibration, setup.grids)
    state = TrainState.of(student, config.optim, parts=dict(weighting=task.weighting))
    state.ema = several = Several(student)
    train(task, state, feed, config, run, title=f"{config.steps} steps")
    return dict(raw=student, **{name: other.module for name, other in several.others.items()})


def measures(student: Any, setup: Setup, normalizers: Mapping[str, Any]) -> Iterator[Any]:
    """Yield the geometric mean of the fidelities, the mean summary cosine, and kNN accuracy."""
    with evaluated(student), setup.autocast():
        shown = folded(student, normalizers)
        found = dict(fidelity(shown, setup.teachers, held_out(setup)))
        accuracy = next(probe(student.features, setup), None)  # kNN; the linear probe takes longer
    cosines = [value for key, value in found.items() if key.endswith("/summary")]
    yield "fidelity/geomean", found["fidelity/geomean"]
    yield "cosine/summary", sum(cosines) / max(1, len(cosines))
    if accuracy:
        yield accuracy


def main(argv: list[str] | None = None) -> None:
    """Run as the words say; print a table, and write the numbers where they are wanted."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("data", nargs="?", default="embedded")
    parser.add_argument("--labelled", help="photos with classes, for kNN; DATA if it has them")
    parser.add_argument("--teachers", nargs="+", default=TEACHERS)
    parser.add_argument("--student", default="mambavision_t")
    parser.add_argument("--size", type=int, default=160)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, nargs="+", default=(100, 1000, 1600))
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--tiny", action="store_true", help="a laptop's teachers, student and steps"
    )
    args = parser.parse_args(argv)
    if args.tiny:
        args.teachers, args.student, args.size = ("timm:test_vit/random@64",), "eradio_nano", 64
        args.batch, args.steps = 8, (10, 20)
    config = Distill(
        data=args.data,
        labelled=args.labelled,
        teachers=tuple(map(TeacherSpec.parse, args.teachers)),
        student=args.student,
        size=args.size,
        batch=args.batch,
        workers=args.workers,
        seed=args.seed,
        calibration=4 if args.tiny else 32,
        probe_images=200 if args.tiny else 5000,
        optim=Optim(lr=1e-3),
        every=Every(log=50, checkpoint=10**6, evaluate=10**6),
    )
    found: dict[str, dict[str, Any]] = {}
    with TemporaryDirectory() as place:
        setup, calibration = prepare(config), None
        for steps in args.steps:
            config = replace(config, steps=steps, out=Path(place) / str(steps))
            run, setup = Run.create(config), replace(setup, config=config)
            calibration = calibration or fit_normalizers(run, setup)[config.normalise]
            forms = trained(config, setup, run, calibration)
            found[str(steps)] = {
                name: dict(measures(student, setup, calibration.normalizers))
                for name, student in forms.items()
            }
    print(table(found))
    if args.out:
        with written_whole(args.out) as temporary:
            told = dict(vars(args), out=None, found=found, default=f"age 1/{1 / average.AGE:g}")
            temporary.write_text(json.dumps(told, indent=2, default=str) + "\n")


def table(found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Return a table with a row for each length and average."""
    names = list(next(iter(next(iter(found.values())).values())))
    lines = [
        f"| steps | weights | {' | '.join(names)} |",
        "| ---: | --- |" + " ---: |" * len(names),
    ]
    for steps, forms in found.items():
        for form, values in forms.items():
            lines.append(
                f"| {steps} | {form} | {' | '.join(f'{values[name]:.3f}' for name in names)} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
