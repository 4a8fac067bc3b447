"""A distillation of language models, described by frozen dataclasses."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from zoo.train.config import Every, Optim, Training


@dataclass(frozen=True, kw_only=True)
class TokenLosses:
    """What the student minimises, for each token."""

    kl: float = 1.0
    """Weight of the divergence of its next tokens from each teacher's."""
    kind: Literal["forward", "reverse", "jsd"] = "forward"
    """forward is KL(teacher, student), as Minitron (2407.14679); jsd is half of both (GKD)."""
    tau: float = 1.0
    """Temperature of both sides."""
    ce: float = 0.0
    """Weight of the cross-entropy of the text itself; 1, with no teachers, is plain training."""
    chunk: int = 1024
    """Tokens whose logits exist at a time."""

    def __post_init__(self):
        if min(self.kl, self.ce) < 0 or not self.kl + self.ce > 0:
            raise ValueError(
                f"losses.kl is {self.kl} and losses.ce {self.ce}; none may be negative, and one "
                "must be above 0."
            )
        if not self.tau > 0 or self.chunk < 1:
            raise ValueError(
                f"losses.tau is {self.tau} and losses.chunk {self.chunk}; give tau above 0 and a "
                "chunk of 1 or more."
            )


@dataclass(frozen=True, kw_only=True)
class DistillText(Training):
    """One distillation of language models: frozen teachers into one student."""

    kind: ClassVar[str] = "distill_text"
    unit: ClassVar[str] = "tok"

    data: str = ""
    """The text: a .txt file (one document), a .jsonl file (one a line, `text`), or a folder."""
    val: str | None = None
    """Text to evaluate on; the last rows of the text by default."""
    held_out: float = 0.05
    """Share of the rows for evaluation, without --val."""
    eval_rows: int = 256
    """Most rows that are evaluated on."""
    teachers: tuple[str, ...] = ()
    """lm:FOLDER or lm:NAME, frozen; none with losses.kl 0."""
    student: str = ""
    """lm:FOLDER of transformers' files, such as a pruned one; /random leaves its weights out."""
    tokenizer: str | None = None
    """bytes, or a folder; the student's own by default."""
    length: int = 512
    """Tokens in a row."""
    batch: int = 16
    out: Path = Path("runs/distill_text")
    """Folder of the run; it must not exist yet."""
    optim: Optim = field(default_factory=lambda: Optim(lr=1e-4, weight_decay=0.1, ema=0.0))
    every: Every = field(default_factory=Every)
    losses: TokenLosses = field(default_factory=TokenLosses)

    def __post_init__(self):
        super().__post_init__()
        for name in ("length", "eval_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if not self.val and not 0 < self.held_out < 1:
            raise ValueError(f"held_out is {self.held_out}; it is a share between 0 and 1.")

    @property
    def samples(self) -> int:
        """Tokens a step."""
        return self.batch * self.length

    @property
    def labels(self) -> list[str]:
        """A short name for each teacher, unique in this run."""
        places = (name.removeprefix("lm:").removesuffix("/random") for name in self.teachers)
        names = [Path(place).name or "teacher" for place in places]
        return [f"{n}_{i + 1}" if names.count(n) > 1 else n for i, n in enumerate(names)]
