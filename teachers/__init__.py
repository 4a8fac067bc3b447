"""Frozen things that name targets: a batch of images in, `Features` out."""

from zoo.teachers.name import TeacherName
from zoo.teachers.open import open_teacher
from zoo.teachers.teacher import Teacher

__all__ = ["Teacher", "TeacherName", "open_teacher"]
