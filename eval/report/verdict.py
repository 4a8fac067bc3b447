"""Sentences that compare a run's student with the teachers' means and with the other arms."""

from collections.abc import Mapping
from typing import NamedTuple

from zoo.eval.report.figures import short_number
from zoo.eval.report.run_folder import OTHER, UNTRAINED, RunFolder

WEIGHTS = dict(average="the averaged weights", raw="the weights of the last step")
EXPECTED = (UNTRAINED, "none")
"""The arms that a run should beat; a worse result than another arm's is not a failure."""


class Verdict(NamedTuple):
    """A sentence; `good` is `None` where neither outcome was expected."""

    good: bool | None
    text: str


def arm_label(arm: str) -> str:
    """Return the description of an arm for the middle of a sentence."""
    if arm == UNTRAINED:
        return "the untrained student"
    if arm == "none":
        return "the same student trained without normalisation"
    return f"the same student trained with normalisation {arm}"


def verdicts(run: RunFolder) -> list[Verdict]:
    """Return sentences that compare the student with the teachers' means and every other arm."""
    return [
        verdict
        for verdict in (
            _against_the_mean(run),
            on_weights(run),
            *(_on_fidelity(run, arm) for arm in run.baselines),
            *(_on_benchmark(run, arm) for arm in run.baselines if arm in EXPECTED),
        )
        if verdict
    ]


def _fidelities(run: RunFolder, numbers: Mapping[str, float]) -> dict[str, float]:
    return {t: numbers[f"fidelity/{t}"] for t in run.teachers if f"fidelity/{t}" in numbers}


def _against_the_mean(run: RunFolder) -> Verdict | None:
    ours = _fidelities(run, run.ours)
    if not ours:
        return None
    below = [t for t, value in ours.items() if not value > 1]
    if below:
        return Verdict(
            False,
            f"For {_listed(below)} the student's head is no better than the teacher's own mean "
            "(fidelity 1).",
        )
    least = min(ours, key=ours.__getitem__)
    return Verdict(
        True,
        f"Every teacher is predicted better than by its own mean (fidelity 1); the lowest "
        f"fidelity is {short_number(ours[least])}, for {least}.",
    )


def on_weights(run: RunFolder) -> Verdict | None:
    """Return which weights of a finished run were exported, and against which."""
    about, key = run.about.get("student"), "fidelity/geomean"
    weights = about.get("weights") if isinstance(about, dict) else None
    if weights not in WEIGHTS or OTHER not in run.arms:
        return None
    ours, theirs = (numbers.get(key) for numbers in (run.ours, run.arms[OTHER]))
    text = (
        f"Exported are {WEIGHTS[weights]}, not {WEIGHTS['raw' if weights != 'raw' else 'average']}"
    )
    if ours is not None and theirs is not None:
        text += f": geometric-mean fidelity {short_number(ours)} against {short_number(theirs)}"
    return Verdict(None, text + ".")


def _on_fidelity(run: RunFolder, arm: str) -> Verdict | None:
    ours, theirs = _fidelities(run, run.ours), _fidelities(run, run.arms[arm])
    shared = [t for t in ours if t in theirs]
    if not shared:
        return None
    lost = [t for t in shared if not ours[t] > theirs[t]]
    if not lost:
        won = (
            "this teacher"
            if len(shared) == 1
            else f"every teacher ({len(shared)} of {len(shared)})"
        )
        text = f"Higher fidelity than {arm_label(arm)} on {won}"
    else:
        text = (
            f"Higher fidelity than {arm_label(arm)} on {len(shared) - len(lost)} of "
            f"{len(shared)} teachers, not on {_listed(lost)}"
        )
    key = "fidelity/min"
    good = not lost
    if key in run.ours and key in run.arms[arm]:
        a, b = run.ours[key], run.arms[arm][key]
        # Another normalisation may be better for some teacher; what counts is the minimum.
        good = a > b and (good or arm != UNTRAINED)
        joint = "and" if (a > b) == (not lost) else "but"
        text += (
            f", {joint} {'a higher' if a > b else 'no higher'} minimum over teachers: "
            f"{short_number(a)} against {short_number(b)}"
        )
    return Verdict(good if arm in EXPECTED else None, text + ".")


def _on_benchmark(run: RunFolder, arm: str) -> Verdict | None:
    parts, good = [], True
    for key, name in (("knn/top1", "kNN"), ("linear/top1", "linear probe")):
        a, b = run.ours.get(key), run.arms[arm].get(key)
        if a is None or b is None:
            continue
        good = good and a > b
        parts.append(f"{name} {a:.1f} % against {b:.1f} %")
    if not parts:
        return None
    return Verdict(good, f"{'; '.join(parts)} for {arm_label(arm)}.")


def _listed(names: list[str]) -> str:
    if len(names) == 1:
        return names[0]
    return f"{', '.join(names[:-1])} and {names[-1]}"
