"""Calibration: does a classifier's confidence say how often it is right?"""

import numpy as np
from jaxtyping import Float


def calibration_error(
    confidence: Float[np.ndarray, " n"], right: Float[np.ndarray, " n"], *, bins: int = 15
) -> float:
    """Return the expected calibration error with bins of equal width, as a share of 1.

        ECE = sum over bins of (n_b / n) · | accuracy_b - confidence_b |

    (1706.04599, equation 3.) A bin holds the confidences above its lower end and up to its upper
    one.

    Args:
        confidence: The largest probability of each image.
        right: 1 where the prediction is right, 0 elsewhere.

    Raises:
        ValueError: there is no image, or the two have different lengths.
    """
    if not len(confidence) or len(confidence) != len(right):
        raise ValueError(f"{len(confidence)} confidences and {len(right)} answers do not pair.")
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gap = np.bincount(place, right - confidence, minlength=bins)
    return float(np.abs(gap).sum() / len(confidence))
