"""A language model of many sizes, described by a frozen dataclass."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from zoo.train.config import Optim
from zoo.train.distill.token_config import DistillText
from zoo.train.ranges import COUNT, NOT_NEGATIVE, POSITIVE


@dataclass(frozen=True, kw_only=True)
class Elastic(DistillText):
    """One language model, of which smaller ones are the first units."""

    kind: ClassVar[str] = "elastic"
    may_cut: ClassVar[bool] = False

    sizes: str = ""
    """NAME:WORDS with ; between: small:ffn=0.5,stream=0.5;medium:ffn=0.75. The words are those of
    zoo prune --to; with a router, NAME:params=SHARE."""
    router: Literal["none", "static", "adaptive"] = "none"
    """static: a router learns which of the --choices each size gets, under its share of the
    parameters (Nemotron Elastic). adaptive: it chooses for each token in each layer, by what enters
    the layer, and learns from a surrogate of the loss (Flextron)."""
    choices: str = ""
    """Candidates of a router, the smallest first: ffn=0.5|0.75|1.0,heads=0.5|1.0,layers=8|12."""
    router_lr: Annotated[float, POSITIVE] = 1e-3
    """Rate of a router, on the schedule of the others."""
    router_cost: Annotated[float, NOT_NEGATIVE] = 30.0
    """Weight of |parameters - budget|, both as shares of the whole model's."""
    shares: Annotated[tuple[float, ...], NOT_NEGATIVE] = ()
    """How often each size is trained, in their order and the whole model last; equally often by
    default. Nemotron Elastic ends with 0.2, 0.3 and 0.5, which spares the whole model."""
    score: Literal["activation", "contribution", "magnitude", "random"] = "activation"
    """What sorts the units; layers are sorted by block influence."""
    form: Literal["library", "zoo"] = "library"
    """library: sizes that the model's class can be built with. zoo: any widths."""
    calibration: Annotated[int, COUNT] = 128
    """Rows of text that scores look at."""
    out: Path = Path("runs/elastic")
    """Folder of the run; it must not exist yet."""
    optim: Optim = field(default_factory=lambda: Optim(lr=1e-4, weight_decay=0.1, ema=0.0))
