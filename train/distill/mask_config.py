"""N of each M weights of a language model, described by a frozen dataclass."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from zoo.train.config import Optim
from zoo.train.distill.token_config import DistillText, TokenLosses
from zoo.train.ranges import COUNT, NOT_NEGATIVE

Choice = Literal["magnitude", "wanda", "sparsegpt", "learned"]


@dataclass(frozen=True, kw_only=True)
class Mask(DistillText):
    """One language model, of which N of each M weights stay."""

    kind: ClassVar[str] = "mask"

    pattern: str = "2:4"
    """N:M: of each M consecutive weights along a layer's inputs, N stay."""
    method: Choice = "sparsegpt"
    """magnitude, wanda and sparsegpt look once; learned trains the choice, weights frozen
    (MaskLLM)."""
    prior: Literal["magnitude", "wanda", "sparsegpt", "none"] = "magnitude"
    """Where learned masks begin."""
    calibration: Annotated[int, COUNT] = 128
    """Rows of text that wanda and sparsegpt look at."""
    weight_reg: Annotated[float, NOT_NEGATIVE] = 1e-5
    """Of learned masks: reward for the squares of the weights that stay (MaskLLM, section 3.3)."""
    steps: Annotated[int, COUNT] = 2000
    """Of learned masks."""
    out: Path = Path("runs/mask")
    """Folder of the run; it must not exist yet."""
    optim: Optim = field(default_factory=lambda: Optim(lr=1e-3, weight_decay=0.1, ema=0.0))
    losses: TokenLosses = field(default_factory=lambda: TokenLosses(kl=0.0, ce=1.0))
