"""The plot's points: which models, which frontier, which published figures."""

import io

import pytest
import timm
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import zoo
from zoo.eval.speed.models import Case, Measured
from zoo.eval.speed.pareto import PUBLISHED_TOP1, draw_pareto, fastest, frontier, published_top1

numbers = st.integers(0, 9).map(float)


def row(model, speed, mode="eager", size=224, macs=1e9):
    case = Case(model=model, mode=mode, size=size, batch=1)
    return Measured(case=case, seconds=[1 / speed], macs=macs, parameters=int(macs / 100))


@given(st.lists(st.tuples(numbers, numbers)))
def test_no_point_beats_one_of_the_frontier_in_both_numbers_and_every_other_is_beaten(points):
    kept = frontier(points)
    better = lambda a, b: a[0] >= b[0] and a[1] >= b[1] and a != b  # noqa: E731
    assert kept == sorted(set(kept))
    assert not [k for k in kept if any(better(p, k) for p in points)]
    assert all(p in kept or any(better(k, p) for k in kept) for p in points)


def test_each_model_stands_for_its_fastest_way_of_inference():
    rows = [row("a", 5), row("a", 7, "deploy"), row("a", 99, "train"), row("a", 3, size=512)]
    assert fastest(rows) == [rows[1], rows[3]]
    assert fastest([Measured(case=Case(model="a"), error="broken")]) == []


def test_published_figures_belong_to_registered_models_at_their_sizes():
    assert {name for name, _ in PUBLISHED_TOP1} <= set(timm.list_models())
    others = {name for name, _ in PUBLISHED_TOP1} - set(zoo.list_models())
    assert others == {"swin_tiny_patch4_window7_224", "convnext_tiny"}
    assert published_top1(row("mambavision_t", 1)) == 82.3
    assert published_top1(row("mambavision_l2,drop_rate=0.1", 1, size=512)) == 87.3
    assert published_top1(row("mambavision_t", 1, size=256)) is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "panels"), [(["mambavision_t", "convnext_tiny", "resnet18"], 3), (["resnet18"], 2)]
)
def test_a_panel_that_would_be_empty_is_left_out(names, panels):
    rows = [row(name, 10 + i, macs=1e9 * (i + 1)) for i, name in enumerate(names)]
    picture = Image.open(io.BytesIO(draw_pareto(rows)))
    assert picture.format == "PNG"
    assert picture.width == pytest.approx(160 * (0.6 + 4.4 * panels), abs=2)
    blue = sum(
        count
        for count, (r, g, b) in picture.convert("RGB").getcolors(1 << 24)
        if b > 180 and r < 80 and g < 130
    )
    assert (blue > 20) == ("mambavision_t" in names)  # zoo's own are in colour


def test_a_run_without_inference_has_no_plot():
    with pytest.raises(ValueError, match="no inference row"):
        draw_pareto([row("a", 5, "train")])
