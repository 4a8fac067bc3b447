"""The language model under test, and how texts of several lengths are read by it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from zoo.language.any_length import any_length
from zoo.language.likelihood import Scored, score_tokens
from zoo.language.open import check_tokenizer, open_language_model, own_tokenizer
from zoo.language.tokenizers import Tokenizer, open_tokenizer
from zoo.language.tokens import TokenFeatures, Tokens, read_tokens


@dataclass(kw_only=True)
class LanguageSubject:
    """What reads words, its tokenizer, and the settings that all benchmarks share."""

    name: str
    """As the user wrote it."""
    model: Any
    """Of transformers, in eval mode and on the device."""
    tokenizer: Tokenizer
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: Literal["float32", "amp"] = "float32"
    """`amp` is autocast to bfloat16."""
    batch: int = 64
    """Rows of text, or questions, at once."""
    seed: int = 0
    work: Path | None = None
    unreadable: set[str] = field(default_factory=set, repr=False)
    """Always empty: a text, or the image that a question is about, is read or is an error."""

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Within this context the model is run: on texts of any length, autocast for `amp`."""
        amp = self.precision == "amp"
        with any_length(), torch.autocast(self.device.type, torch.bfloat16, enabled=amp):
            yield


@dataclass(kw_only=True)
class TextSubject(LanguageSubject):
    """A causal language model."""

    def features(self, tokens: Tokens) -> TokenFeatures:
        """Return the model's features of some rows, without gradients."""
        with torch.no_grad(), self.autocast():
            return read_tokens(self.model, tokens.to(self.device))


class Continuation(NamedTuple):
    """A text and what should follow it, as ids."""

    given: list[int]
    wanted: list[int]


def encode_pair(tokenizer: Tokenizer, text: str, continuation: str) -> Continuation:
    """Tokenise both as one text, so that a token may join what stands on both sides of a space.

    The cut is where the tokens of `text` alone end.
    """
    begin = [] if tokenizer.begin is None else [tokenizer.begin]
    cut = len(tokenizer.encode(text))
    both = tokenizer.encode(text + continuation)
    return Continuation([*begin, *both[:cut]], both[cut:])


def score_continuations(subject: TextSubject, pairs: Sequence[Continuation]) -> list[Scored]:
    """Score the wanted tokens of each pair, given all that stands before them.

    Since the right tokens are given, `chosen` of all of them says that greedy generation, from the
    text alone, would write the whole continuation.

    Raises:
        ValueError: there is nothing before a continuation.
    """
    found: list[Scored] = []
    for start in range(0, len(pairs), subject.batch):
        found += _score_batch(subject, pairs[start : start + subject.batch])
    return found


def _score_batch(subject: TextSubject, pairs: Sequence[Continuation]) -> list[Scored]:
    for pair in pairs:
        if not pair.given or not pair.wanted:
            raise ValueError("A continuation has at least one token, and so has what is before it.")
    width = max(len(given) + len(wanted) for given, wanted in pairs)
    ids = torch.zeros(len(pairs), width, dtype=torch.long)
    segments = torch.full((len(pairs), width), -1)
    for row, (given, wanted) in enumerate(pairs):
        whole = [*given, *wanted]
        ids[row, : len(whole)] = torch.tensor(whole)
        segments[row, : len(whole)] = 0
    last, head, _ = subject.features(Tokens(ids, segments))
    spans = [(len(given) - 1, len(given) + len(wanted) - 1) for given, wanted in pairs]
    states = torch.cat([last[row, a:b] for row, (a, b) in enumerate(spans)])
    following = torch.cat([torch.tensor(wanted) for _, wanted in pairs]).to(states.device)
    scored = score_tokens(states, head, following)
    sizes = [len(wanted) for _, wanted in pairs]
    parts: list[tuple[Tensor, ...]] = [column.cpu().split(sizes) for column in scored]
    return [Scored(*columns) for columns in zip(*parts, strict=True)]


def open_text_subject(
    target: str | None,
    *,
    tokenizer: str = "",
    device: torch.device,
    precision: Literal["float32", "amp"],
    batch: int,
    seed: int,
) -> TextSubject:
    """Open a language model to be measured: a folder of transformers, a run of `zoo distill
    --text`, a GGUF file, or a name of the language table.

    Args:
        tokenizer: What `open_tokenizer` takes; the model's own by default.

    Raises:
        ValueError: there is no target, no such model, or no tokenizer that fits it.
    """
    if target is None:
        raise ValueError("Name what to measure: lm:FOLDER, or a name such as llama_tiny/random.")
    place = target.removeprefix("lm:")
    if (Path(place) / "export" / "config.json").is_file():
        place = str(Path(place) / "export")
    with torch.random.fork_rng(devices=[]):  # random weights are the same on each call
        torch.manual_seed(seed)
        model = open_language_model(place, device=device)
    opened = open_tokenizer(tokenizer or own_tokenizer(place))
    check_tokenizer(model, opened, target)
    return TextSubject(
        name=target, model=model, tokenizer=opened, device=device, precision=precision,
        batch=batch, seed=seed,
    )  # fmt: skip


def about_text_model(subject: TextSubject) -> dict[str, Any]:
    """Return `name`, `parameters`, `vocabulary` and `tokenizer` (its digest) for a record."""
    model = subject.model
    return dict(
        name=type(model).__name__,
        parameters=sum(p.numel() for p in model.parameters()),
        vocabulary=model.get_input_embeddings().weight.shape[0],
        tokenizer=subject.tokenizer.digest,
    )
