"""A distillation of language models, described by frozen dataclasses."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from zoo.train.config import Every, Optim, Training
from zoo.train.distill.config import Normalise
from zoo.train.distill.token_teachers import TokenTeacher
from zoo.train.ranges import (
    BATCH,
    COUNT,
    FRACTION,
    POSITIVE,
    PROPER_SHARE,
    at_least,
    between,
    check_ranges,
)


@dataclass(frozen=True, kw_only=True)
class TokenLosses:
    """What the student minimises, for each token."""

    kl: Annotated[float, at_least(0, "off")] = 1.0
    """Weight of the divergence of its next tokens from each teacher's."""
    kind: Literal["forward", "reverse", "jsd"] = "forward"
    """forward is KL(teacher, student), as Minitron (2407.14679); jsd is half of both (GKD)."""
    tau: Annotated[float, POSITIVE] = 1.0
    """Temperature of both sides."""
    top_k: Annotated[int, at_least(0, "all tokens")] = 0
    """Likeliest tokens of a teacher that are compared one by one (forward); all others are as one.
    0 compares the whole vocabulary."""
    hidden: Annotated[float, at_least(0, "off")] = 0.0
    """Weight of the distance between hidden states, through a learned projection. It counts as much
    as the divergence did in the step before (2407.14679, section 3.3), times this."""
    hidden_at: Annotated[tuple[float, ...], FRACTION] = (1.0,)
    """Layers whose states are compared, as shares of each tower's depth; 1 is the last."""
    ce: Annotated[float, at_least(0, "off")] = 0.0
    """Weight of the cross-entropy of the text itself; 1, with no teachers, is plain training."""
    balance: Annotated[float, at_least(0, "off")] = 0.0
    """Weight of the auxiliary loss that keeps a mixture's experts evenly used (2101.03961); 0.01 is
    usual."""
    router_z: Annotated[float, at_least(0, "off")] = 0.0
    """Weight of the loss that keeps its routers' logits small (2202.08906); 0.001 is usual."""
    chunk: Annotated[int, COUNT] = 1024
    """Tokens whose logits exist at a time."""

    @property
    def routers(self) -> bool:
        """Whether the routers of a mixture of experts have losses."""
        return bool(self.balance or self.router_z)

    def __post_init__(self):
        check_ranges(self, "losses.")
        if not self.kl + self.ce + self.hidden:
            raise ValueError("losses.kl, losses.hidden and losses.ce are 0; one must be above 0.")
        if self.top_k and self.kind != "forward":
            raise ValueError(
                f"losses.top_k is {self.top_k} with losses.kind {self.kind}; it is for forward."
            )


@dataclass(frozen=True, kw_only=True)
class OnPolicy:
    """Rows that the student writes itself, for the teachers to judge (GKD, 2306.13649)."""

    fraction: Annotated[float, FRACTION] = 0.0
    """Share of the rows in which the text goes on as the student does; 0 is off."""
    length: Annotated[int, COUNT] = 64
    """Tokens that it writes, behind the beginning of the row; these alone are learnt there."""
    temperature: Annotated[float, at_least(0, "the likeliest tokens")] = 1.0

    def __post_init__(self):
        check_ranges(self, "on_policy.")


@dataclass(frozen=True, kw_only=True)
class DistillText(Training):
    """One distillation of language models: frozen teachers into one student."""

    kind: ClassVar[str] = "distill_text"
    may_cut: ClassVar[bool] = True
    unit: ClassVar[str] = "tok"

    data: str = ""
    """The text: a .txt file (one document), a .jsonl file (one a line, `text`), an .arrow or
    .parquet table (one a row, `text`), or a folder. Several with weights: PATH=0.7,PATH=0.3."""
    val: str | None = None
    """Text to evaluate on; the last rows of the text by default."""
    held_out: Annotated[float, PROPER_SHARE] = 0.05
    """Share of the rows for evaluation, without --val."""
    eval_rows: Annotated[int, COUNT] = 256
    """Most rows that are evaluated on."""
    teachers: tuple[str, ...] = ()
    """lm:FOLDER or lm:NAME, frozen. NAME,kl=0.5,hidden=2: what each counts of losses.kl and
    losses.hidden; kl=0 for one whose hidden states alone are learnt."""
    normalise: Normalise = "none"
    """Scale on which teachers' hidden states are matched, as of images; none compares each token's
    error with its target's square."""
    calibration: Annotated[int, between(1, 1_000_000)] = 16
    """Batches from which the statistics of hidden states are taken before step 0."""
    student: str = ""
    """lm:FOLDER of transformers' files, such as a pruned one; /random leaves its weights out."""
    tokenizer: str | None = None
    """bytes, or a folder; the student's own by default."""
    length: Annotated[int, COUNT] = 512
    """Tokens in a row."""
    sequence: Annotated[int, COUNT] = 1
    """Processes of torchrun that hold each row together, a stretch of its tokens each (Ulysses)."""
    experts: Annotated[int, COUNT] = 1
    """Processes of torchrun over which the experts of each layer are spread; tokens travel to
    them."""
    capacity: Annotated[float, at_least(0, "off")] = 0.0
    """Room of each expert, in even shares of the tokens; what finds none is dropped, and counted in
    `dropped`. 1.25 is usual. 0: nothing is dropped."""
    attention: Literal["own", "auto", "sdpa", "split", "flex", "varlen", "xformers"] = "own"
    """How the documents of a row are kept apart: as transformers does by itself, sdpa under a mask,
    split (sdpa once a document), FlexAttention, torch's variable-length kernels, or xformers'
    block-diagonal masks. auto takes the first fused one that runs on this GPU and answers as the
    model does; on a CPU nothing is changed. Not measured on a GPU yet."""
    speed: Literal["auto", "compiled", "plain"] = "auto"
    """compiled: the layers of the student and of its teachers are compiled for rows of this size,
    and held against what they were. auto does it on one GPU if the steps would take two minutes or
    more, and leaves out what cannot be compiled."""
    batch: Annotated[int, BATCH] = 16
    out: Path = Path("runs/distill_text")
    """Folder of the run; it must not exist yet."""
    optim: Optim = field(default_factory=lambda: Optim(lr=1e-4, weight_decay=0.1, ema=0.0))
    every: Every = field(default_factory=Every)
    losses: TokenLosses = field(default_factory=TokenLosses)
    on_policy: OnPolicy = field(default_factory=OnPolicy)

    resumable: ClassVar[frozenset[str]] = Training.resumable | {"sequence", "experts", "speed"}

    def __post_init__(self):
        super().__post_init__()
        cut = [spec.name for spec in self.specs if spec.place == "shard"]
        if cut and not self.may_cut:
            raise ValueError(
                f"The teacher {cut[0]} has place=shard, which is for zoo distill; leave it out."
            )
        if self.speed == "compiled" and not self.may_cut:
            raise ValueError(f"--speed {self.speed} is for zoo distill --text; leave it out.")
        if not (spreads := self.spreads):
            return
        if cut:
            raise ValueError(
                f"{spreads} spreads teachers too, and {cut[0]} is to be cut by blocks "
                "(place=shard); leave out one of both."
            )
        if not self.may_cut:
            raise ValueError(f"{spreads} is for zoo distill --text; leave it out.")
        if self.ranks in ("fsdp", "hsdp"):
            raise ValueError(
                f"{spreads} keeps all weights but experts on each process, and --ranks "
                f"{self.ranks} would cut them; give one of both."
            )
        if self.on_policy.fraction:
            raise ValueError(
                f"{spreads} is for rows that are read, and --on-policy.fraction "
                f"{self.on_policy.fraction:g} has some written; give one of both."
            )
        if self.sequence > 1 and self.attention != "own":
            raise ValueError(
                f"--sequence {self.sequence} attends through sdpa, on all tokens of some heads; "
                f"leave out --attention {self.attention}."
            )
        if self.sequence > self.length:
            raise ValueError(
                f"Rows of {self.length} tokens have none for some of {self.sequence} processes; "
                f"give --sequence {self.length} or less."
            )

    @property
    def spreads(self) -> str:
        """The options that spread a model over processes, or let its experts drop tokens."""
        found = [f"--{name} {getattr(self, name)}" for name in ("sequence", "experts")]
        found = [words for words in found if not words.endswith(" 1")]
        return " ".join(found + [f"--capacity {self.capacity:g}"] * bool(self.capacity))

    @property
    def ranks_a_slice(self) -> int:
        return self.sequence

    @property
    def samples(self) -> int:
        """Tokens a step."""
        return self.batch * self.length

    @property
    def specs(self) -> list[TokenTeacher]:
        """The teachers, and what they count."""
        return [TokenTeacher.parse(text) for text in self.teachers]

    @property
    def matched(self) -> list[str]:
        """The labels of the teachers whose hidden states are compared."""
        both = zip(self.labels, self.specs, strict=True)
        return [label for label, spec in both if self.losses.hidden * spec.hidden]

    @property
    def labels(self) -> list[str]:
        """A short name for each teacher, unique in this run."""
        names = (spec.name for spec in self.specs)
        places = (name.removeprefix("lm:").removesuffix("/random") for name in names)
        paths = (Path(p).parent if Path(p).name == "export" else Path(p) for p in places)
        names = [path.name or "teacher" for path in paths]
        return [f"{n}_{i + 1}" if names.count(n) > 1 else n for i, n in enumerate(names)]
