"""Which scales a distillation imposes on what the teachers give, in words."""

from collections.abc import Mapping
from typing import Any

MAPS = {
    "phi_s": "rotated, and divided by one number a teacher, so that all channels have variance 1 "
    "(PHI-S, 2410.01680)",
    "standardize": "each channel brought to mean 0 and variance 1",
    "global": "one mean of all channels taken off, and divided by the deviation of all entries",
    "alpha_only": "each channel's mean taken off, and divided by PHI-S's number without its "
    "rotation, so that the mean variance is 1",
    "pca": "whitened along the principal components",
    "zca": "whitened, as near to the channels as that can be",
    "hadamard_whitening": "whitened, and mixed by a Hadamard matrix",
}
"""What is done to a teacher's maps before the student is compared with them."""
WEIGHTS = {
    "adaloss": "by the inverse of its running mean (AdaLoss, AM-RADIO, 2312.06709, section 3.4)",
    "uncertainty": "by a precision that is learnt with the student",
    "dispersion": "by the inverse of what a constant guess loses in it",
}
"""What a loss is multiplied by as training goes, beside the weights that were given."""


def imposed_scales(config: Mapping[str, Any]) -> list[str]:
    """Return a sentence on each scale and weight that a run imposes; none, if teachers count as
    they come.
    """
    found = []
    if how := MAPS.get(str(config.get("normalise"))):
        found.append(f"Maps: {how}. Fidelity is measured on the teachers' own scale.")
    if config.get("normalise_summary") == "standardize":
        found.append("Summaries: each channel brought to mean 0 and variance 1 (UNIC).")
    losses = config.get("losses")
    weighting = losses.get("weighting") if isinstance(losses, Mapping) else None
    if how := WEIGHTS.get(str(weighting)):
        found.append(f"Each loss is weighed {how}.")
    teachers = config.get("teachers")
    given = [
        f"{one.get('name')} {part} × {one[part]:g}"
        for one in (teachers if isinstance(teachers, list) else ())
        if isinstance(one, Mapping)
        for part in ("summary", "spatial")
        if isinstance(one.get(part), int | float) and one[part] != 1
    ]
    if given:
        found.append(f"Weights that were given: {', '.join(given)}.")
    return found
