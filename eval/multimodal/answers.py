"""What a model of images and text answers, and whether that is exactly right."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch

from zoo.data.conversations import other_images
from zoo.data.image_text import ImageTextSource
from zoo.language.any_length import any_length
from zoo.language.likelihood import score_tokens
from zoo.multimodal.image_text import ImageText, read_image_text

Control = str
SIGHT, SHUFFLED, BLIND = "", "shuffled", "blind"
"""With its own picture; with another question's; with a grey one."""


class Answered(NamedTuple):
    """One question, and what became of it."""

    key: str
    kind: str
    right: bool
    """Every token of the answer is the likeliest, its end included: greedy generation gives it."""
    nll: float
    """Of the whole answer, in nats."""


@torch.no_grad()
def answer_all(
    model: Any,
    source: ImageTextSource,
    *,
    device: torch.device,
    batch: int,
    control: Control = SIGHT,
    seed: int = 0,
    indices: Sequence[int] | None = None,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> Iterator[Answered]:
    """Yield what a model makes of each question of a source; each has one turn.

    Args:
        control: `SIGHT`, or what is shown in place of the pictures.
        indices: Of the questions; all by default.
    """
    chosen = list(range(len(source)) if indices is None else indices)
    others = _others(source, chosen, seed) if control == SHUFFLED else None
    for first in range(0, len(chosen), batch):
        part = chosen[first : first + batch]
        shown = None if others is None else others[first : first + batch]
        rows = source.rows(part, shown=shown).to(device)
        if control == BLIND:
            grey = [torch.full_like(group, 128) for group in rows.images]
            rows = ImageText(rows.tokens, rows.answers, grey, rows.order)
        with autocast():
            last, head, _ = read_image_text(model, rows)
        scored = score_tokens(last[rows.answers], head, rows.tokens.following[rows.answers])
        sizes = rows.answers.sum(1).tolist()
        for index, nll, right in zip(
            part, scored.nll.cpu().split(sizes), scored.chosen.cpu().split(sizes), strict=True
        ):
            kind = source.sample(index).turns[0].kind
            yield Answered(source.key(index), kind, bool(right.all()), float(nll.sum()))


def _others(source: ImageTextSource, chosen: Sequence[int], seed: int) -> list[tuple[int, ...]]:
    """Give each question pictures of another one that make as many tokens."""
    samples = [source.sample(i) for i in chosen]
    sizes = [source.encoded(i).sizes for i in chosen]
    found: list[tuple[int, ...]] = [()] * len(samples)
    for size in dict.fromkeys(sizes):
        here = [n for n, own in enumerate(sizes) if own == size]
        if not size:
            continue
        for n, images in zip(here, other_images([samples[n] for n in here], seed), strict=True):
            found[n] = images
    return found


def generate_answers(
    model: Any,
    source: ImageTextSource,
    indices: Sequence[int],
    device: torch.device,
    *,
    most: int = 24,
    batch: int = 16,
) -> list[str]:
    """Return what a model says to some questions, word by word (greedy), up to `most` tokens.

    Questions of one length go through together, so that none is padded: what stands beside a
    question does not matter, whatever the language model is made of.
    """
    alike = defaultdict[Any, list[int]](list)
    for place, index in enumerate(indices):
        row = source.encoded(index)
        alike[int(row.answers.argmax()) + 1, row.sizes].append(place)
    said = [""] * len(indices)
    for (first, _), places in alike.items():
        for start in range(0, len(places), batch):
            part = places[start : start + batch]
            rows = source.rows([indices[place] for place in part]).to(device)
            asked = rows.tokens.ids[:, :first]
            with any_length():
                made = model.generate(
                    input_ids=asked,
                    pixel_values=rows.images[0].float() / 255 if rows.images else None,
                    attention_mask=torch.ones_like(asked),
                    max_new_tokens=most,
                    do_sample=False,
                    eos_token_id=[source.tokenizer.end],
                    pad_token_id=source.tokenizer.end,
                )
            for place, ids in zip(part, made[:, first:].tolist(), strict=True):
                end = ids.index(source.tokenizer.end) if source.tokenizer.end in ids else len(ids)
                said[place] = source.tokenizer.decode(ids[:end])
    return said


def from_question_alone(train: ImageTextSource, val: ImageTextSource) -> np.ndarray:
    """Tell which questions the commonest answer to the same words in training gets right.

    A question that training does not have gets the commonest answer of all. No picture and no
    network is needed: a claim of sight is above this.
    """
    overall, by_words = Counter[str](), defaultdict[str, Counter[str]](Counter)
    for sample in train.conversations.samples:
        for turn in sample.turns:
            overall[turn.answer] += 1
            by_words[_words(turn.question)][turn.answer] += 1
    most = overall.most_common(1)[0][0]
    turns = [val.sample(i).turns[0] for i in range(len(val))]
    said = [
        by_words[_words(t.question)].most_common(1)[0][0]
        if _words(t.question) in by_words
        else most
        for t in turns
    ]
    return np.array([s == t.answer for s, t in zip(said, turns, strict=True)])


def _words(question: str) -> str:
    return question.replace("<image>", "").strip().lower()
