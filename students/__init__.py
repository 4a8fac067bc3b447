"""What is trained: a backbone with one pair of heads for each teacher."""

from zoo.students.student import Student, build_student

__all__ = ["Student", "build_student"]
