"""Teachers out of our own families: `zoo:NAME[/weights][@resolution]`."""

import torch

import zoo
from zoo.teachers.from_timm import TimmTeacher, open_timm
from zoo.teachers.teacher import TeacherName, unknown_name


def open_zoo(name: TeacherName, device: torch.device) -> TimmTeacher:
    """Build one of zoo's registered models; they stand in timm's registry as well."""
    if name.name.partition(".")[0] not in zoo.list_models():
        raise unknown_name(name.name, zoo.list_models(), "zoo model")
    return open_timm(name, device)
