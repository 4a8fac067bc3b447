import random

import pytest

from zoo.multimodal.budget import check_budget, fit_to_budget, tokens_of


def test_an_image_gets_whole_tokens_within_the_budget_and_is_not_enlarged():
    draw = random.Random(0)
    for _ in range(500):
        check_one(draw)


def check_one(draw):
    height, width = draw.randint(1, 3000), draw.randint(1, 3000)
    step, budget = draw.choice([14, 16, 28, 32]), draw.randint(1, 2000)
    rows, cols = fit_to_budget(height, width, step, budget)
    assert rows % step == cols % step == 0
    assert 1 <= tokens_of(rows, cols, step) <= budget
    assert rows < height + step and cols < width + step
    check_budget(rows, cols, step, budget)


@pytest.mark.parametrize("shape", [(480, 640), (640, 480), (1000, 1000), (300, 1200)])
def test_the_shape_is_kept_to_half_a_cell_and_the_budget_is_used(shape):
    rows, cols = (side // 16 for side in fit_to_budget(*shape, 16, 256))
    scale = (256 * 16 * 16 / (shape[0] * shape[1])) ** 0.5
    for cells, side in zip((rows, cols), shape, strict=True):
        assert abs(cells - side / 16 * scale) <= 1
    assert rows * cols > 256 - rows - cols  # one more row or column would be too many


def test_a_size_that_fits_already_stays():
    assert fit_to_budget(224, 320, 16, 280) == (224, 320)


def test_an_image_beyond_the_budget_is_refused_with_the_size_that_fits():
    with pytest.raises(
        ValueError, match=r"makes 784 tokens, beyond the budget of 256; .* 256 x 256"
    ):
        check_budget(448, 448, 16, 256)
    with pytest.raises(ValueError, match=r"does not fall into tokens of 16 x 16 px"):
        check_budget(230, 224, 16, 256)
