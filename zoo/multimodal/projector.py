"""From a tower's map to the width of the language model.

The two layers with a GELU between them (LLaVA-1.5, 2310.03744) are transformers' own. A pixel
shuffle before them makes of each square of cells one token, as wide as all of them (2404.16821,
section 3.1): a quarter of the tokens for a factor of 2.
"""

from jaxtyping import Float
from torch import Tensor


def pixel_shuffle(x: Float[Tensor, "B H W C"], factor: int) -> Float[Tensor, "B h w D"]:
    """Put each `factor` x `factor` square of cells side by side into one: D = factor² · C.

    Within a token the cells follow row by row. Nothing is lost: it is a permutation.
    """
    if factor == 1:
        return x
    cells = x.unflatten(2, (-1, factor)).unflatten(1, (-1, factor))  # B h f w f C
    return cells.permute(0, 1, 3, 2, 4, 5).flatten(3)


def projector_width(model) -> int:
    """Return the channels that the projector of a Llava takes."""
    return model.model.multi_modal_projector.linear_1.in_features


def check_width(given: int, wanted: int) -> None:
    """Refuse a tower of another width than the projector behind it.

    Raises:
        ValueError: it has.
    """
    if given != wanted:
        raise ValueError(
            f"The tower gives tokens of {given} channels and the projector takes {wanted}; take "
            "the tower that it was trained with, or leave the projector out, so that a new one is "
            "made."
        )
