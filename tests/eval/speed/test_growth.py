import io

import pytest
from PIL import Image

from zoo.eval.speed.growth import draw_growth, series
from zoo.eval.speed.models import Case, Measured


def row(model, size, seconds, mode="eager"):
    case = Case(model=model, size=size, batch=4, mode=mode)
    return Measured(case=case, seconds=[seconds], peak_bytes=size**2)


def test_a_line_holds_the_fastest_row_of_each_size_in_order():
    rows = [
        row("a", 512, 4.0),
        row("a", 224, 1.0),
        row("a", 512, 3.0, "deploy"),
        row("b", 224, 1.0),
    ]
    rows += [row("a", 224, 2.0, "train"), row("a", 512, 9.0, "train")]
    lines = series(rows)
    assert list(lines) == [("a", False), ("a", True)]
    assert [(r.case.size, r.seconds) for r in lines["a", False]] == [(224, [1.0]), (512, [3.0])]


def test_growth_is_drawn_and_one_size_is_refused():
    rows = [row("a", 224, 1.0), row("a", 512, 4.0)]
    assert Image.open(io.BytesIO(draw_growth(rows))).size[0] > 1000
    with pytest.raises(ValueError, match="two sizes"):
        draw_growth(rows[:1])
