"""The sizes of a sorted vision model: what stands beside it, and how `zoo distill` trains them.

What `zoo elastic` itself needs is imported where a model is sorted: a distillation begins sooner.
"""

import json
from pathlib import Path
from typing import Any

from zoo.files import read_json, written_whole
from zoo.students.start import FOLDER
from zoo.students.student import Student
from zoo.train.distill.config import Distill
from zoo.train.task import Task

ABOUT = "elastic.json"
"""Beside a checkpoint: its sizes, and which layers each keeps."""


def write_about(folder: Path, about: dict[str, Any]) -> None:
    """Write beside a checkpoint what its sizes are."""
    with written_whole(folder / ABOUT) as path:
        path.write_text(json.dumps(about, indent=2) + "\n")


def sizes_beside(name: str) -> dict[str, Any] | None:
    """Read what `sort_model` wrote beside a student, `local-dir:FOLDER`; None if there is none."""
    file = Path(name.removeprefix(FOLDER)) / ABOUT
    return read_json(file) if name.startswith(FOLDER) and file.is_file() else None


def nested(config: Distill, student: Student, task: Task) -> Task:
    """Let each slice train one size of a sorted student; leave the task of another as it is."""
    about = sizes_beside(config.student)
    if about is None:
        return task
    if config.compile:
        raise ValueError("A compiled student cannot be masked to its sizes; leave out --compile.")
    from zoo.axes import named_shapes
    from zoo.students.prune.elastic import FULL, parse_sizes, size_of
    from zoo.students.prune.masked import Masked, Size
    from zoo.train.elastic import ElasticTask

    shapes, ranks = named_shapes(student.backbone), about["ranks"]
    plans = parse_sizes(about["sizes"])
    sizes = {name: size_of(shapes, plan, ranks) for name, plan in plans.items()}
    masked = Masked(student.backbone, shapes)
    every = {**sizes, FULL: Size()}
    return ElasticTask(task, masked, every, shares=about["shares"], seed=config.seed)
