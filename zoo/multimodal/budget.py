"""How many tokens an image makes, and to which size it is brought so that they are not too many."""

import math


def tokens_of(height: int, width: int, step: int) -> int:
    """Count the tokens of an image whose sides are multiples of `step` pixels, one a cell."""
    return (height // step) * (width // step)


def fit_to_budget(height: int, width: int, step: int, budget: int) -> tuple[int, int]:
    """Return the size nearest an image's own, in its own shape, with at most `budget` tokens.

    No side grows by more than what fills its last cell: an image is shrunk, never enlarged. Both
    sides are multiples of `step`, so the shape is kept to half a cell on each side; of an image so
    long that one cell across is too much for the budget, the longer side is cut short.

    Args:
        height: Of the image, in pixels, as `width`.
        step: Pixels of a token's cell along each side.
        budget: Most tokens.

    Raises:
        ValueError: a number is below 1.
    """
    if min(height, width, step, budget) < 1:
        raise ValueError(
            f"An image of {height} x {width} px with cells of {step} px cannot have {budget} "
            "tokens; all of them are at least 1."
        )
    rows, cols = height / step, width / step
    scale = min(1.0, math.sqrt(budget / (rows * cols)))
    near = [max(1, round(side * scale)) for side in (rows, cols)]
    while near[0] * near[1] > budget:
        # the side that rounding has lengthened more gives way; one cell is the least
        over = [
            n / (side * scale) if n > 1 else 0.0 for n, side in zip(near, (rows, cols), strict=True)
        ]
        near[over.index(max(over))] -= 1
    return near[0] * step, near[1] * step


def check_budget(height: int, width: int, step: int, budget: int) -> None:
    """Refuse an image that does not fall into whole cells, or has too many of them.

    Raises:
        ValueError: with the size that would do.
    """
    fitted = fit_to_budget(height, width, step, budget)
    if height % step or width % step:
        raise ValueError(
            f"An image of {height} x {width} px does not fall into tokens of {step} x {step} px; "
            f"resize it to {fitted[0]} x {fitted[1]} (zoo.multimodal.budget.fit_to_budget)."
        )
    if tokens_of(height, width, step) > budget:
        raise ValueError(
            f"An image of {height} x {width} px makes {tokens_of(height, width, step)} tokens, "
            f"beyond the budget of {budget}; resize it to {fitted[0]} x {fitted[1]}, or give the "
            "tower a larger max_tokens."
        )
