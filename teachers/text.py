"""Zero-shot classifiers out of a teacher's text tower.

A student that learnt the teacher's summary can use them: its head's output takes the place of the
teacher's image embedding.
"""

from collections.abc import Callable, Sequence
from importlib import import_module

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from zoo.teachers.name import TeacherName
from zoo.teachers.teacher import Frozen, Teacher

TOWERS = {"open_clip": "zoo.teachers.from_open_clip", "hf": "zoo.teachers.from_transformers"}
"""Teacher's kind -> the module whose class `TextTower` opens its text tower."""
BATCH = 256
"""Texts that go through a tower at once."""

TextTower = Callable[[Sequence[str]], Tensor]
"""Maps T texts to their embeddings [T D]."""


def open_text(name: TeacherName, device: torch.device | str = "cpu") -> TextTower:
    """Open the text tower that belongs to a teacher: texts in, their [T D] embeddings out.

    Raises:
        ValueError: the teacher's kind or its model has no text tower, or its tokenizer is missing.
    """
    if name.kind not in TOWERS:
        raise ValueError(
            f"{name.describe()} has no text tower; teachers of the kinds "
            f"{' and '.join(TOWERS)} may have one."
        )
    tower = import_module(TOWERS[name.kind]).TextTower(name, torch.device(device))

    def embedded(texts: Sequence[str]) -> Tensor:
        try:
            return tower(texts)
        except IndexError as error:
            raise ValueError(
                f"The text tower of {name.describe()} has a smaller vocabulary than its tokenizer "
                f"({error}): it cannot read these texts."
            ) from error

    return embedded


def text_classifier(
    teacher: Teacher | str,
    class_names: Sequence[str],
    templates: Sequence[str] = ("a photo of a {}.",),
    *,
    device: torch.device | str = "cpu",
) -> Float[Tensor, "classes D"]:
    """Turn class names into the weights of a zero-shot classifier, as CLIP does (2103.00020).

    The weight of a class is the mean of its normalised embeddings, one a template, normalised
    again: its product with a normalised image embedding, a cosine, is the score of the class. The
    text tower is opened for this call alone, with the teacher's own weights.

    Args:
        teacher: A teacher, or its name.
        templates: Sentences with `{}` in place of the class name.
        device: Where the tower runs if `teacher` is a name; else it runs where the teacher is.

    Raises:
        ValueError: there is no text tower or no tokenizer, no class name or no template.
    """
    if not class_names or not templates:
        raise ValueError("A text classifier needs at least one class name and one template.")
    for template in templates:
        if "{}" not in template:
            raise ValueError(f"The template {template!r} has no {{}} where the class name goes.")
    tower = open_text(*_source(teacher, torch.device(device)))
    texts = [t.replace("{}", name) for name in class_names for t in templates]
    parts = [tower(texts[i : i + BATCH]).float() for i in range(0, len(texts), BATCH)]
    embedded = F.normalize(torch.cat(parts), dim=-1).unflatten(0, (-1, len(templates)))
    return F.normalize(embedded.mean(dim=1), dim=-1)


def _source(teacher: Teacher | str, device: torch.device) -> tuple[TeacherName, torch.device]:
    if isinstance(teacher, str):
        return TeacherName.parse(teacher), device
    if isinstance(teacher, Frozen) and teacher.source:
        return teacher.source, teacher.mean.device
    raise ValueError(
        f"{teacher.name} has no text tower; teachers of the kinds {' and '.join(TOWERS)} may "
        "have one."
    )
