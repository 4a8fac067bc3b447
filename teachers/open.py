"""Open a teacher by its name."""

from importlib import import_module

import torch

from zoo.teachers.name import KINDS, TeacherName
from zoo.teachers.teacher import Teacher, no_neck, reason

EXTRAS = ("open_clip", "transformers")
"""Libraries that the optional dependencies `[teachers]` install."""

SAMS = ("timm", "hf")
"""Kinds of teachers that have a SAM, whose map may be had behind its neck."""


def open_teacher(text: str, *, device: torch.device | str = "cpu", mosaic: int = 1) -> Teacher:
    """Build the teacher that `text` names, frozen and in eval mode, on `device`.

    On the device `meta` nothing is downloaded or allocated; only shapes are known.

    Args:
        text: `kind:name[/weights][+neck][@resolution]`, see `TeacherName`.
        mosaic: Images along a side of the teacher's canvas, see `zoo.teachers.mosaic`; 1 for none.

    Raises:
        ValueError: as `TeacherName.parse`; also for an unknown name (the nearest is suggested),
            weights that are not there, a resolution that the network cannot take, or a library
            that is not installed.
    """
    name = TeacherName.parse(text)
    if name.neck and name.kind not in SAMS:
        raise no_neck(name)
    module, opener = KINDS[name.kind]
    try:
        teacher = getattr(import_module(module), opener)(name, torch.device(device))
    except (ValueError, OSError):
        raise
    except Exception as error:  # libraries raise whatever they stumble over in foreign files
        if isinstance(error, ModuleNotFoundError) and error.name in EXTRAS:
            raise ValueError(
                f"{text} needs {error.name}, which is not installed: "
                "pip install 'backbone-zoo[teachers]'."
            ) from error
        what = type(error).__name__
        raise ValueError(f"{text} could not be opened ({what}): {reason(error)}.") from error
    if mosaic == 1:
        return teacher
    from zoo.teachers.mosaic import Mosaic

    return Mosaic(teacher, mosaic)
