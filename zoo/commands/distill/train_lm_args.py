"""`zoo train-lm`: what its command line says, read without torch."""

from pathlib import Path

from zoo.commands.distill.text_args import run_text
from zoo.commands.parse import value_of
from zoo.train.config import Optim
from zoo.train.distill.token_config import DistillText, TokenLosses

FROM_TEXT = DistillText(
    losses=TokenLosses(kl=0.0, ce=1.0),
    optim=Optim(lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, ema=0.0),
    out=Path("runs/train_lm"),
)
"""A distillation whose only teacher is the text."""


def main(argv: list[str]) -> None:
    """Train a causal language model on a text: from random weights, or on from what it is.

    Examples:
    zoo train-lm --text wiki.txt --model lm:llama_tiny/random --out runs/lm
    zoo train-lm --text code.jsonl --model lm:runs/lm/export --optim.lr 1e-4 --out runs/more
    zoo train-lm --resume runs/lm

    It is zoo distill --text without teachers, by cross-entropy. Below, --text is called --data and
    --model --student, as fields of the run are. Look at a plan first: --dry-run. What comes out, in
    OUT/export, is a folder of transformers; zoo eval lm:OUT/export --on perplexity --data FILE
    measures it.
    """
    if value_of(argv, "--teachers") is not None:
        raise ValueError(
            "zoo train-lm learns from the text alone; for teachers there is zoo distill --text."
        )
    run_text([model_as_student(word) for word in argv], FROM_TEXT, "train-lm", main.__doc__ or "")


def model_as_student(word: str) -> str:
    """Call the option --model by the name of its field, student."""
    name, equals, value = word.partition("=")
    return f"--student{equals}{value}" if name == "--model" else word
