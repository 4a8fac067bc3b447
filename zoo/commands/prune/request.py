"""What `zoo prune` can be asked for."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from zoo.train.config import Device

FORMS = ("library", "zoo")
SCORES = ("auto", "activation", "contribution", "wanda", "taylor", "x", "magnitude", "random")
LAYER_SCORES = ("influence", "loss", "shapley", "means", "contiguous")
EXPERT_SCORES = ("load", "routing")
HELD = 4
"""Samples that are kept apart at the least: from so many on features can be compared."""


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    candidates: int = 8
    """Models that are compared with their parent."""
    steps: int = 0
    """With --distill: all candidates learn from their parent for so many steps, the better half for
    twice as many, and so on to one. 0 compares them as they are cut."""
    rule: Literal["halving", "hypertrick"] = "halving"
    """Who learns on: the better half of each round (successive halving), or, one candidate after
    another, who is not among the worst of those before (HyperTrick, at the same rate of a half)."""
    tokens: int = 4096
    """Tokens of a text for which keys and values are held, in budgets of memory and FLOPs."""
    batch: int = 1
    """Texts, or images, at once, in budgets of memory and latency."""
    dir: Path | None = None
    """Where a search is kept that may have to be resumed; OUT.search if not given."""


@dataclass(frozen=True, kw_only=True)
class Prune:
    model: tyro.conf.Positional[str] = ""
    """A registered model (vit_small_patch16_224; with /random, its random weights), a folder of
    timm or transformers, a run (also vlm:RUN), or a GGUF file."""
    to: str = ""
    """What stays: shares (ffn=0.75) or numbers (heads=4) of ffn, heads, groups, stream, experts,
    ssm_heads, ssm_channels, ssm_state, ssm_rank, layers (ffn@2: of stage 2), attention_layers and
    ffn_layers (branches inside the layers, with --form zoo), or of an axis that --shapes names
    (also with *). Or a budget, which a search meets: params, active (parameters that a token
    meets), memory (bytes), flops, as a share or a number (0.5, 20M), latency_ms."""
    part: Literal["all", "vision", "language"] = "all"
    """Of a model of images and text, what may be cut: both parts under one budget, or one alone.
    Words of one part: vision.ffn, language.layers; the projector goes with both."""
    data: Path | None = None
    """Images (a folder, .tar shards, .npz, embedded/photos), for a language model a text (.txt,
    .jsonl), for one of images and text what zoo distill --image-text takes (generated:N too)."""
    out: Path | None = None
    """The folder to write: a plain checkpoint of the model's library."""
    score: str = "auto"
    """activation, contribution, wanda, taylor, x (Mamba's heads and channels by what goes into the
    scan), magnitude, random; auto tries the first two on held-out data."""
    expert_score: str = "load"
    """What ranks experts: load, the tokens that they get; routing, the mean probability of them."""
    layer_score: str = "influence"
    """What ranks layers: influence, how much each turns what passes (branches: loss); loss, the
    cost of leaving it out; shapley, its mean cost over orders of leaving out; means, without it
    against with it; contiguous, the run of neighbours that costs least. Cost is the loss of the
    next token, or the cosine distance to the parent's output."""
    emulate: int | None = None
    """What stands in for branches that go: a constant (0) or a linear map of this rank."""
    samples: int = 256
    """Images, or rows of text, to look at. A quarter, 4 or more, tells how far a child is from its
    parent."""
    batch: int = 16
    length: int = 512
    """Tokens in a row of text; of a conversation about images the most, images included."""
    form: str = "library"
    """library: what timm or transformers can build. zoo: any widths, also others in each layer;
    what comes out loads with zoo.create_model("local-dir:DIR")."""
    search: SearchOptions = field(default_factory=SearchOptions)
    seed: int = 0
    dequantise: bool = False
    """Take the weights of a GGUF file as float; what is cut from them is saved as float."""
    device: Device = "auto"
    """Where parent and child run; on CUDA scores are taken in bfloat16, proofs in float32."""
    distill: int = 0
    """Steps in which the child learns from its parent, on the same data. Behind it stand options of
    zoo distill: --distill 2000 --teachers timm:NAME --optim.lr 1e-4 names a teacher more."""
    resume: Path | None = None
    """Continue the training of --distill in this folder."""
    dry_run: bool = False
    """Choose, rebuild, prove and print; write nothing."""
    shapes: bool = False
    """Only show what each dim of each tensor is made of."""
