"""How well a language model foresees a text: perplexity, bits a byte, tokens foreseen."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from zoo.data.text import open_text
from zoo.eval.language.subject import TextSubject
from zoo.eval.registry import Found, Scores
from zoo.eval.settings import PerplexitySettings
from zoo.language.likelihood import score_tokens
from zoo.language.open import check_length
from zoo.language.tokens import separates_documents


def perplexity(subject: TextSubject, data: Path, settings: PerplexitySettings) -> Iterator[Found]:
    """Yield `perplexity/loss` (nats a token), `/perplexity`, `/bpb` (bits a byte) and `/top1`.

    The text is cut into rows of `length` tokens, none of which sees another; a token at the
    beginning of a row has no context. A byte's bits are a token's, over the bytes that a token of
    the whole text has on average, so models of several tokenizers can be compared.

    Raises:
        ValueError: there is no text, or rows are longer than the model has positions.
    """
    check_length(subject.model, settings.length, subject.name, option="--perplexity.length")
    source = open_text(data, subject.tokenizer, settings.length)
    source = replace(source, mixed=separates_documents(subject.model))
    rows = min(settings.rows, len(source))
    keys, right, counts, nats = list[str](), list[int](), list[int](), 0.0
    for start in range(0, rows, subject.batch):
        tokens = source.rows(range(start, min(start + subject.batch, rows))).to(subject.device)
        last, head, _ = subject.features(tokens)
        counted = tokens.counted
        scored = score_tokens(last[counted], head, tokens.following[counted])
        here = counted.sum(1).tolist()
        nats += scored.nll.double().sum().item()
        right += [int(part.sum()) for part in scored.chosen.cpu().split(here)]
        counts += here
        keys += tokens.keys
    loss = nats / max(1, sum(counts))
    yield "perplexity/loss", loss
    yield "perplexity/perplexity", math.exp(loss)
    yield "perplexity/bpb", loss / math.log(2) / source.bytes_a_token
    yield "perplexity/top1", Scores(keys, np.array(right), np.array(counts))
