"""A run in stages: distillations one after another, of which later ones build on earlier ones.

Stages are a dict of name -> `Distill` in their order, with one `out`: the folder of the whole, in
which each stage is a run of its own (`OUT/1-low`, `OUT/2-high`). In `start` and in the name of a
teacher `{low}` stands for the folder of the earlier stage `low`:

    dict(
        low=Distill(size=256, ...),
        high=Distill(size=432, start=Path("{low}"), ...),
    )
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from zoo.teachers.name import TeacherName
from zoo.train.distill.config import Distill

Stages = Mapping[str, Distill]
REFERENCE = r"\{(\w+)\}"


def stages_of(recipe: Distill | Stages) -> dict[str, Distill]:
    """Return the stages of what a recipe gives; a run of one stage has the name ""."""
    return {"": recipe} if isinstance(recipe, Distill) else dict(recipe)


def placed(stages: Stages) -> dict[str, Distill]:
    """Give each stage its folder, and put folders in place of the names of earlier stages.

    Raises:
        ValueError: the stages are not of one folder, or one refers to a stage that is not before
            it.
    """
    root = folder_of(stages)
    if "" in stages:
        return dict(stages)
    folders: dict[str, Path] = {}
    found: dict[str, Distill] = {}
    for number, (name, config) in enumerate(stages.items(), 1):
        filled = _filled(config, folders)
        folders[name] = root / f"{number}-{name}"
        found[name] = replace(filled, out=folders[name])
    return found


def folder_of(stages: Stages) -> Path:
    """Return the folder of the whole.

    Raises:
        ValueError: the stages name several.
    """
    outs = {config.out for config in stages.values()}
    if len(outs) > 1:
        raise ValueError(
            f"The stages are to go to {', '.join(sorted(map(str, outs)))}; they are folders of one "
            "--out, so give it for all of them."
        )
    return outs.pop()


def plannable(stages: Stages) -> dict[str, Distill]:
    """Return the stages as they can be planned before any has run.

    A student begins with random weights, and one that teaches is a network of its name.
    """
    found: dict[str, Distill] = {}
    for name, config in placed(stages).items():
        teachers = tuple(
            replace(spec, name=_stand_in(before.name, found) or spec.name)
            for before, spec in zip(stages[name].teachers, config.teachers, strict=True)
        )
        start = None if _named(str(stages[name].start)) else config.start
        found[name] = replace(config, teachers=teachers, start=start)
    return found


def _named(text: str) -> str | None:
    """Return the stage that a text refers to."""
    match = re.search(REFERENCE, text)
    return match and match[1]


def _stand_in(text: str, before: Stages) -> str | None:
    """Return a teacher like the student of the earlier stage that a name refers to."""
    earlier = _named(text)
    if earlier is None:
        return None
    size = TeacherName.parse(text).resolution or before[earlier].size
    return f"timm:{before[earlier].student}/random@{size}"


def _filled(config: Distill, folders: Mapping[str, Path]) -> Distill:
    """Put folders in place of the names of stages."""

    def folder(match: re.Match[str]) -> str:
        if match[1] not in folders:
            raise ValueError(
                f"{match[0]} stands for no stage before this one; there are "
                f"{', '.join(folders) or 'none'}."
            )
        return str(folders[match[1]])

    teachers = tuple(
        replace(spec, name=re.sub(REFERENCE, folder, spec.name)) for spec in config.teachers
    )
    start = config.start and Path(re.sub(REFERENCE, folder, str(config.start)))
    return replace(config, teachers=teachers, start=start)
