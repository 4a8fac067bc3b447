"""The script that finds a former tree's statements again, on two small trees."""

import subprocess
import sys
from pathlib import Path
from textwrap import dedent

SCRIPT = Path(__file__).parent.parent.parent / "benchmarks" / "house_since.py"

THEN = """
    import math

    def area(r):
        return math.pi * r**2

    def report(values, title):
        print(title, len(values))
        for value in sorted(values):
            print(value, value**2)

    def forgotten(x):
        while x > 1:
            x = x // 2 if x % 2 == 0 else 3 * x + 1
"""
"""Of 2, 4 and 3 statements."""

TODAY = """
    class Circle:
        radius: float

    def surface(r):
        '''A docstring is no statement.'''
        square = r**2
        return 3.14 * square

    def show(values, title):
        print(title, len(values))
        for value in sorted(values):
            print(value, value**2)
        print(title)
"""


def test_what_was_renamed_or_moved_is_found_again_and_the_rest_is_gone_or_new(tmp_path):
    (tmp_path / "then/zoo").mkdir(parents=True)
    (tmp_path / "then/zoo/shapes.py").write_text(dedent(THEN))
    (tmp_path / "today/zoo").mkdir(parents=True)
    (tmp_path / "today/zoo/round.py").write_text(dedent(TODAY))
    moved = 'NAMES = (("zoo.shapes", "zoo.round", "area=surface"),)\n'
    (tmp_path / "today/zoo/moved.py").write_text(moved)
    command = [sys.executable, SCRIPT, tmp_path / "then", tmp_path / "today"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert told.splitlines() == [
        "then: 9 statements in 3 parts",
        "- found again: 6 in 2 parts, today 8",  # `area` by the table, `report` by its lines
        "- gone: 3 in 1 parts",
        "today: 11 statements, of which 3 are in parts that are new",  # Circle, and NAMES itself
    ]
