"""Read the folder of a finished or interrupted run, with notes on missing and unreadable parts."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from zoo.eval.report.maps import load_maps
from zoo.files import near, parse_json, read_json

STUDENT, UNTRAINED, TEACHER = "student", "untrained", "teacher:"
OTHER = f"{STUDENT}:other"
"""The student's other form: with averaged weights, or with those of the last step."""
STAGES = "stages.json"
"""In the folder of a run in stages: what each was started with, by name."""
RECORDS = ("config.json", "about.json", "metrics.jsonl", "timing.jsonl")


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """What a run has written; every part may be empty."""

    path: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)
    train: tuple[dict[str, Any], ...] = ()
    """Training lines by step; of a step that was logged twice, the later line."""
    arms: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """The latest value of every evaluation number, by arm."""
    timing: tuple[dict[str, Any], ...] = ()
    """Lines of `timing.jsonl` by step."""
    compare: Mapping[str, tuple[dict[str, Any], ...]] = field(default_factory=dict)
    """Training lines of the other arms."""
    maps: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Feature maps, as `zoo.eval.report.maps.collect_maps` returns them."""
    stages: tuple[tuple[str, Path], ...] = ()
    """Names and folders of the stages up to this one, if the run is a stage of another."""
    notes: tuple[str, ...] = ()
    """Sentences on what could not be read, for the page."""

    @property
    def ours(self) -> Mapping[str, float]:
        """The evaluation numbers of the run's own student."""
        return self.arms.get(STUDENT, {})

    @property
    def baselines(self) -> list[str]:
        """The other students: the untrained one first, then those with other normalisations."""
        others = [a for a in self.arms if a != STUDENT and ":" not in a]
        return sorted(others, key=lambda arm: (arm != UNTRAINED, arm != "none", arm))

    @property
    def teachers(self) -> list[str]:
        """The teachers that the numbers name; before there are numbers, those of the config.

        The config and the metrics may spell a teacher differently (`timm:name@224` and `name`), so
        the two are never mixed.
        """
        names = [m[1] for line in self.train for key in line if (m := _LOSS.fullmatch(key))]
        for numbers in self.arms.values():
            names += [m[1] for key in numbers if (m := _CLOSENESS.fullmatch(key))]
        names += [arm.removeprefix(TEACHER) for arm in self.arms if arm.startswith(TEACHER)]
        names = [name for name in dict.fromkeys(names) if name not in ("min", "geomean")]
        return names or list(self.described) or _strings(self.config.get("teachers"))

    @property
    def described(self) -> Mapping[str, Mapping[str, Any]]:
        """The descriptions of the teachers in `about.json`."""
        found = self.about.get("teachers")
        found = found if isinstance(found, dict) else {}
        return {name: known if isinstance(known, dict) else {} for name, known in found.items()}


_LOSS = re.compile(r"(.+)/(?:spatial|summary)")
_CLOSENESS = re.compile(r"(?:fidelity|mse)/(.+)")


def _strings(value: Any) -> list[str]:
    return [name for name in value if isinstance(name, str)] if isinstance(value, list) else []


def read_run(folder: str | Path) -> RunFolder:
    """Read everything that a run has written so far.

    Raises:
        ValueError: the folder is missing, or has none of a run's files.
    """
    path = Path(folder)
    if (path / STAGES).is_file():
        names = (folder.name for folder in sorted(path.glob("[0-9]*-*/")))
        raise ValueError(
            f"The run in {path} has stages, each a run of its own; give one of its folders: "
            f"{', '.join(names) or 'there is none yet'}."
        )
    if not any((path / name).is_file() for name in RECORDS):
        raise ValueError(
            f"{path} is not the folder of a run: it has none of {', '.join(RECORDS)}. "
            f"Give the folder that was --out of zoo distill.{near(path)}"
        )
    notes: list[str] = []
    lines = read_lines(path / "metrics.jsonl", notes)
    config = _read_object(path / "config.json", notes)
    described = config.get("kind", "distill") == "distill" or (path / "about.json").is_file()
    return RunFolder(
        path=path,
        config=config,
        about=_read_object(path / "about.json", notes) if described else {},
        train=_training(lines),
        arms=_with_results(_newest(lines), path / "results.json", notes),
        timing=_by_step(read_lines(path / "timing.jsonl", notes)),
        compare={
            file.parent.name: _training(read_lines(file, notes))
            for file in sorted(path.glob("compare/*/metrics.jsonl"))
        },
        maps=_read_maps(path / "maps.npz", notes),
        stages=_stages(path),
        notes=tuple(notes),
    )


def _stages(path: Path) -> tuple[tuple[str, Path], ...]:
    """Return the stages before this one, and this one."""
    whole = path.absolute().parent
    if not (whole / STAGES).is_file():
        return ()
    names = list(_read_object(whole / STAGES, []))
    folders = [whole / f"{i}-{name}" for i, name in enumerate(names, 1)]
    if path.absolute() not in folders:
        return ()
    count = folders.index(path.absolute()) + 1
    return tuple(zip(names[:count], folders[:count], strict=True))


def number(value: Any) -> float | None:
    """Return `value` as a float if it is a number, otherwise `None`."""
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**63:
        return float(value)
    return value if isinstance(value, float) else None


def series(lines: Iterable[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Return the steps and the finite values of one logged number."""
    steps, values = [], []
    for line in lines:
        step, value = number(line.get("step")), number(line.get(key))
        if step is not None and value is not None and math.isfinite(value):
            steps.append(step)
            values.append(value)
    return steps, values


def _read_object(path: Path, notes: list[str]) -> dict[str, Any]:
    if not path.is_file():
        notes.append(f"{path.name} is missing.")
        return {}
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        notes.append(f"{path.name} could not be read: {error}")
        return {}


def read_lines(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Read a file of JSON lines; add to `notes` what could not be read."""
    if not path.is_file():
        notes.append(f"{path.name} is missing.")
        return []
    found, bad = [], 0
    for text in path.read_text("utf-8", "replace").splitlines():
        if not text.strip():
            continue
        try:
            found.append(parse_json(text, dict[str, Any], path.name))
        except ValueError:  # usually the last line of a run that was killed while writing it
            bad += 1
    if bad:
        lines = "one line" if bad == 1 else f"{bad} lines"
        notes.append(f"{path.name} has {lines} that could not be read; the others are shown.")
    return found


def _read_maps(path: Path, notes: list[str]) -> dict[str, np.ndarray]:
    if not path.is_file():
        return {}
    try:
        return load_maps(path)
    except ValueError as error:
        notes.append(str(error))
        return {}


def _with_results(
    arms: dict[str, dict[str, float]], path: Path, notes: list[str]
) -> dict[str, dict[str, float]]:
    """Add what a run has measured at its end, which `zoo detect` writes to a file of its own."""
    found = _read_object(path, notes) if path.is_file() else {}
    last = {name: value for name, text in found.items() if (value := number(text)) is not None}
    return arms | {STUDENT: arms.get(STUDENT, {}) | last} if last else arms


def _training(lines: Iterable[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    return _by_step(line for line in lines if line.get("kind") == "train")


def _by_step(lines: Iterable[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    """Sort by step; of a step that is in the file twice, after a resume, keep the later line."""
    newest = {number(line.get("step")): line for line in lines}
    return tuple(newest[step] for step in sorted(step for step in newest if step is not None))


def _newest(lines: Iterable[dict[str, Any]]) -> dict[str, dict[str, float]]:
    arms: dict[str, dict[str, float]] = {}
    for line in lines:
        if line.get("kind") != "eval":
            continue
        numbers = arms.setdefault(str(line.get("arm", STUDENT)), {})
        for key, value in line.items():
            if key != "step" and (found := number(value)) is not None:
                numbers[key] = found
    return arms
