"""What is trained: a backbone with one pair of heads for each teacher."""

from zoo.students.build import build_student
from zoo.students.student import Student

__all__ = ["Student", "build_student"]
