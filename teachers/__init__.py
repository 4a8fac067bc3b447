"""Frozen things that name targets: a batch of images in, `Features` out."""

from zoo.teachers.teacher import Teacher, TeacherName, open_teacher

__all__ = ["Teacher", "TeacherName", "open_teacher"]
