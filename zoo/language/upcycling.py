"""Upcycling: a dense language model becomes a mixture of experts that computes the same.

2410.07524 (Megatron's E-G-T): each MLP's hidden channels are cut into G shards and each shard is
copied E times, so there are N = E G experts, of which a token meets T. The shards of a copy share a
random row of the router ("virtual groups"): the T / G best copies get each of their shards, so T
must be a multiple of G. What T experts add up to is a part of the dense MLP's output, which a scale
s makes good:

    topk-softmax   weights of the T chosen sum to 1:      s = G              exact
    softmax-topk   weights of all N sum to 1:              s = E G² / (T a)  as good as a is

where a, the mean weight of those that are chosen over that of all, is 1 for a router of zeros; with
logits of deviation 0.02 the chosen have 2 to 3 % more, which the paper's s = E G² / T leaves in.

The paper spreads s over the matrices by cube or square roots. With a gated MLP a root of it also
scales the gate's input, which no longer computes the same; the whole scale in the down-projection
does, for any activation.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist, fmean
from typing import Literal

Router = Literal["topk-softmax", "softmax-topk"]
Scale = Literal["down", "cube-root", "square-root"]


@dataclass(frozen=True, kw_only=True)
class Upcycling:
    """E copies of G shards, of which a token meets T.

    Raises:
        ValueError: T is no multiple of G or more than there are, or the router's rows would tie.
    """

    experts: int = 8
    """E: copies of each MLP, or of each of its shards."""
    groups: int = 1
    """G: shards that an MLP is cut into; a layer has E x G experts of 1 / G of its width."""
    top_k: int = 2
    """T: experts that a token meets; a multiple of G."""
    router: Router = "topk-softmax"
    """What comes first. topk-softmax: the weights of the chosen sum to 1, and the mixture is the
    dense model exactly. softmax-topk: those of all do (2410.07524 prefers it; for qwen3)."""
    scale: Scale = "down"
    """Where the scale goes that makes good what is missing: into the down-projection, which is
    exact, or spread over the matrices as in the paper (cube-root: exact for squared ReLU alone)."""
    deviation: float = 0.02
    """Standard deviation of the router's logits over its rows. With softmax-topk the error grows
    with it: at most 2 % at 0.02."""

    def __post_init__(self):
        e, g, t = self.experts, self.groups, self.top_k
        for name, value in (("experts", e), ("groups", g), ("top-k", t)):
            if value < 1:
                raise ValueError(f"--{name} is {value}; it is 1 or more.")
        if t % g:
            near = sorted({max(g, t // g * g), min(t // g + 1, e) * g} - {t})
            raise ValueError(
                f"--top-k {t} is no multiple of --groups {g}: some shards of the MLP would be met "
                f"more often than others, and what it computes be lost. "
                f"Take --top-k {' or '.join(map(str, near))}."
            )
        if t > e * g:
            raise ValueError(f"--top-k {t} is more than the {e} x {g} experts; take {e * g}.")
        if not (self.deviation > 0 or (self.deviation == 0 and g == 1)):
            raise ValueError(
                f"--deviation is {self.deviation:g}; with {g} groups it is above 0: rows that tie "
                "choose shards of no one copy."
            )

    @property
    def num_experts(self) -> int:
        """Experts of a layer."""
        return self.experts * self.groups

    @property
    def output_scale(self) -> float:
        """What the experts' sum has to be multiplied by, to be the dense MLP's output."""
        if self.router == "topk-softmax":
            return float(self.groups)
        return self.experts * self.groups**2 / self.top_k / self._preference

    @property
    def _preference(self) -> float:
        """Mean weight of the chosen over that of all: by the means of a normal sample's order
        statistics, which are its quantiles at (rank - 3/8) / (number + 1/4) (Blom, 1958)."""
        places = range(self.experts, 0, -1)
        quantiles = [NormalDist().inv_cdf((i - 0.375) / (self.experts + 0.25)) for i in places]
        weights = [math.exp(self.deviation * z) for z in quantiles]
        return fmean(weights[: self.top_k // self.groups]) / fmean(weights)
