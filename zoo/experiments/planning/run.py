"""The students of the planning experiment, and how they drive."""

import itertools
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zoo.experiments.bookkeeping import append_row, begin_rows, device_name
from zoo.experiments.planning.config import PlanningExperiment
from zoo.experiments.planning.result import BEST, BLIND, report
from zoo.experiments.planning.scenes import scenes, write_scenes
from zoo.features import Batch
from zoo.library import distill
from zoo.students.export import load_export
from zoo.teachers.planning import Scores, drive, judge
from zoo.train.config import Augment, Every, Optim
from zoo.train.device import device_of
from zoo.train.distill.config import Distill, SummaryLoss, TeacherSpec
from zoo.train.run import Run

ARMS: dict[str, tuple[str, ...]] = {
    "imitation": (),
    "rules": tuple(Scores._fields),
}
"""What a student learns beside what the driver did."""
LEARN, CHOOSE, MEASURE = 1, 2, 3
"""Seeds of the scenes: to learn from, to choose weights on, to measure on."""
WEIGHTS = (0.02, 0.1, 0.5, 1.0)
"""Of each part of the cost that are tried on held-out scenes (2406.06978, section 3.3)."""
KEPT = ("scenes", "held", "size", "student", "steps", "batch", "rate", "weight")
"""Fields in which a resumed experiment is as it was begun."""
FREE = ("resume", "dry_run", "seconds", "workers")
"""Fields that no result depends on."""


def distillation(config: PlanningExperiment, arm: str, seed: int) -> Distill:
    """Return the run of a student: `zoo distill` with rules for teachers."""

    def teacher(rule: str, loss: SummaryLoss, weight: float) -> TeacherSpec:
        name = f"rule:plan-{rule}@{config.size}"
        return TeacherSpec(name=name, summary=weight, spatial=0.0, loss=loss)

    rules = [teacher(rule, "bce", config.weight) for rule in ARMS[arm]]
    teachers = (teacher("human", "cross_entropy", 1.0), *rules)
    return Distill(
        data=str(config.out / "scenes.tar"),
        teachers=teachers,
        student=config.student,
        size=config.size,
        steps=config.steps,
        batch=config.batch,
        seed=seed,
        device=config.device,
        workers=config.workers,
        calibration=min(16, max(1, config.scenes // config.batch)),
        # scenes stay whole: in a crop the car is elsewhere; mirrored ones are scenes too
        augment=Augment(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.5),
        optim=Optim(lr=config.rate),
        every=Every(
            log=max(1, config.steps // 20),
            evaluate=10**9,
            checkpoint=max(1, config.steps // 4),
        ),
        eval_images=min(256, config.held),
        out=config.out / f"{arm}-{seed}",
    )


class Answers(NamedTuple):
    """What a student says of every trajectory, in scenes whose true scores are known."""

    log_human: Tensor
    """[B, K], log of its share."""
    rules: Mapping[str, Tensor]
    """By rule, in [0, 1], [B, K]."""
    truth: Scores


@torch.no_grad()
def answers(config: PlanningExperiment, arm: str, seed: int, part: int) -> Answers:
    """Ask a finished student about held-out scenes."""
    device = device_of(config.device)
    student = load_export(config.out / f"{arm}-{seed}" / "export", device=device)
    images = torch.from_numpy(scenes(part, config.held, config.size)).to(device)
    found: dict[str, list[Tensor]] = {}
    for some in images.split(config.batch):
        for label, features in student(Batch(some)).items():
            assert features.summary is not None
            found.setdefault(label.removeprefix("plan-"), []).append(features.summary.float())
    logits = {label: torch.cat(parts) for label, parts in found.items()}
    human = logits.pop("human").log_softmax(-1)
    return Answers(human, {n: x.sigmoid() for n, x in logits.items()}, judge(images))


def chosen(said: Answers, weights: tuple[float, ...]) -> Tensor:
    """Return the trajectory of the least cost in each scene, [B] (2406.06978, section 3.3).

    -(w1 log S_im + w2 log S_NC + w3 log S_DAC + w4 log(5 S_TTC + 2 S_C + 5 S_EP)); without rules
    the likeliest of the driver's.
    """
    if not said.rules:
        return said.log_human.argmax(-1)
    rules = {name: x.clamp_min(1e-6) for name, x in said.rules.items()}
    soft = 5 * rules["ttc"] + 2 * rules["comfort"] + 5 * rules["progress"]
    parts = (said.log_human, rules["collision"].log(), rules["drivable"].log(), soft.log())
    return sum(w * part for w, part in zip(weights, parts, strict=True)).argmax(-1)  # pyright: ignore[reportAttributeAccessIssue]


def driven(truth: Scores, taken: Tensor) -> dict[str, float]:
    """Return how trajectories do, in per cent of the scenes, or the mean of the rules' total."""

    def of(scores: Tensor) -> float:
        return 100 * scores.gather(-1, taken[:, None]).mean().item()

    return dict(
        collides=100 - of(truth.collision),
        leaves_the_road=100 - of(truth.drivable),
        total=of(truth.total()),
        progress=of(truth.progress),
    )


def best_weights(said: Answers) -> tuple[float, ...]:
    """Return the weights whose choices have the highest total on scenes to choose on."""
    tried = itertools.product(WEIGHTS, WEIGHTS, WEIGHTS, (1.0,))
    return max(tried, key=lambda weights: driven(said.truth, chosen(said, weights))["total"])


def controls(known: Scores, images: Tensor) -> dict[str, dict[str, float]]:
    """Return how choices do that no student makes, by what chooses.

    Whoever drives slowly hits little. So a student shows that it sees the scene only where it does
    better than the one trajectory with the highest mean total, which is taken in every scene.

    Args:
        known: Scores in other scenes, from which that one is chosen.
        images: The scenes that are driven in, [B, 3, size, size].
    """
    truth = judge(images)
    same = known.total().mean(0).argmax().expand(len(images))
    return {
        BLIND: driven(truth, same),
        "the driver": driven(truth, drive(images)),
        BEST: driven(truth, truth.total().argmax(-1)),
    }


def measure(config: PlanningExperiment, arm: str, seed: int) -> dict[str, Any]:
    """Drive held-out scenes with a finished student, and once as it would in the scene before."""
    weights = best_weights(answers(config, arm, seed, CHOOSE)) if ARMS[arm] else ()
    said = answers(config, arm, seed, MEASURE)
    taken = chosen(said, weights)
    shown, elsewhere = taken[:12].tolist(), driven(said.truth, taken.roll(1))
    found = driven(said.truth, taken)
    return dict(arm=arm, seed=seed, weights=weights, shown=shown, shuffled=elsewhere, **found)


def cells(config: PlanningExperiment) -> Iterator[tuple[str, int]]:
    """Yield the students, both arms of a seed before the next."""
    for seed in range(config.seeds):
        for arm in ARMS:
            yield arm, seed


def main(config: PlanningExperiment) -> bool:
    """Run the experiment, and return True: what fails its rule is published, not an error.

    Raises:
        ValueError: the folder was begun with other settings, or is something else.
    """
    began, kept = time.perf_counter(), {name: getattr(config, name) for name in KEPT}
    rows = begin_rows(config.out, resume=config.resume, same=kept)
    Run(config.out).write_json("about.json", dict(config=kept))
    write_scenes(config.out / "scenes.tar", LEARN, config.scenes, config.size)
    done, last = {(row["arm"], row["seed"]) for row in rows}, 0.0
    for arm, seed in cells(config):
        if (arm, seed) in done:
            continue
        spent = time.perf_counter() - began
        if config.seconds and spent + last > config.seconds:
            print(f"no time for {arm}, seed {seed}: --resume goes on")
            break
        run = distillation(config, arm, seed)
        begun = (run.out / "config.json").is_file()
        distill(resume=run.out) if begun else distill(run)
        row = measure(config, arm, seed)
        last = time.perf_counter() - began - spent
        rows.append(dict(row, seconds=last))
        append_row(config.out / "rows.jsonl", rows[-1])
        shutil.rmtree(run.out / "checkpoints", ignore_errors=True)  # its export stays
    if rows:
        about = dict(
            config={n: str(v) for n, v in asdict(config).items() if n not in FREE},
            torch=torch.__version__,
            device=device_name(device_of(config.device)),
        )  # fmt: skip
        others, images = (
            torch.from_numpy(scenes(part, config.held, config.size)) for part in (CHOOSE, MEASURE)
        )
        found = controls(judge(others), images)
        report(rows, about, found, images[:12].numpy(), config.out)
    return True


def plan(config: PlanningExperiment) -> None:
    """Print the students; write nothing."""
    if not config.resume:
        Run.refuse_existing(config.out)
    print(f"{config.scenes} scenes of {config.size} px to learn from, {config.held} to choose the "
          f"weights on, {config.held} to measure on")  # fmt: skip
    for arm, seed in cells(config):
        teachers = ", ".join(spec.describe() for spec in distillation(config, arm, seed).teachers)
        print(f"{arm}, seed {seed}: {config.steps} steps of {config.batch}; {teachers}")
    print("Nothing was written.")
