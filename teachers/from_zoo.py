"""Teachers out of our own families, and our students: `zoo:NAME[/weights][@resolution]`.

`zoo:local-dir:RUN/export` is the student of an earlier run, whatever its architecture.
"""

import torch

import zoo
from zoo.teachers.from_timm import TimmTeacher, open_timm
from zoo.teachers.name import FOLDER, TeacherName, unknown_name


def open_zoo(name: TeacherName, device: torch.device) -> TimmTeacher:
    """Build an export or one of zoo's models, through timm, whose registry has them as well.

    Raises:
        ValueError: zoo has no such model, or as `open_timm`.
    """
    if not name.name.startswith(FOLDER) and name.name.partition(".")[0] not in zoo.list_models():
        raise unknown_name(name.name, zoo.list_models(), "zoo model")
    return open_timm(name, device)
