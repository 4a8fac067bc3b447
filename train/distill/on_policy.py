"""Rows that the student writes itself, for its teachers to judge (GKD, 2306.13649, section 3).

What a student sees when it generates are its own tokens, and in training on a text it never meets
their mistakes. So in a share of the rows the text goes on, behind a prompt, as the student does: it
samples, without a gradient, and the divergence from the teachers is taken on those tokens alone.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from zoo.compiled_blocks import as_written
from zoo.data.plan import mix
from zoo.data.text import TextFeed
from zoo.language.any_length import any_length
from zoo.language.tokens import Tokens
from zoo.train.distill.token_config import OnPolicy


@dataclass(frozen=True)
class OwnText:
    """Which rows a student writes, and how; a pure function of its weights, seed, step and rows."""

    config: OnPolicy
    seed: int
    end: int
    """The id that ends a document."""

    def number(self, step: int, rows: int) -> int:
        """Return how many rows of a slice the student writes: the first ones.

        Slices of a step have equally many; over the steps the share adds up.
        """
        share = self.config.fraction * rows
        return int((step + 1) * share) - int(step * share)

    def mixed(
        self, model: Any, tokens: Tokens, step: int
    ) -> tuple[Tokens, Bool[Tensor, "B T"], Bool[Tensor, "B T"]]:
        """Let the student write its rows of a slice.

        Returns:
            The slice; where the next token is learnt, in the student's rows in what it wrote, its
            end included and nothing behind; and the same in rows of the text alone.
        """
        counted, number = tokens.counted, self.number(step, len(tokens.ids))
        if not number:
            return tokens, counted, counted
        length, ids, segments = self.config.length, tokens.ids.clone(), tokens.segments.clone()
        starts = self._starts(segments[:number])
        written = self._continued(model, ids, segments, starts, step, tokens.positions)
        own, texts = torch.zeros_like(counted), counted.clone()
        texts[:number] = False
        ended = (written == self.end).cumsum(1) - (written == self.end).long() > 0
        for row, start in enumerate(starts):
            ids[row, start : start + length] = written[row]
            segments[row, start : start + length] = segments[row, start - 1]
            segments[row, start + length :] = -1
            own[row, start - 1 : start - 1 + length] = ~ended[row]
        return replace(tokens, ids=ids, segments=segments), texts | own, texts

    def _starts(self, segments: Int[Tensor, "n T"]) -> list[int]:
        """Return where each row's prompt ends: there is room for what is written behind it."""
        most = segments.shape[1] - self.config.length
        return (segments >= 0).sum(1).clamp(1, most).tolist()

    def _continued(
        self,
        model: Any,
        ids: Int[Tensor, "B T"],
        segments: Int[Tensor, "B T"],
        starts: Sequence[int],
        step: int,
        positions: Sequence[int],
    ) -> Int[Tensor, "n L"]:
        """Continue the document in which each prompt ends; `end` fills up behind an end."""
        prompts = []
        for row, start in enumerate(starts):
            same = segments[row, :start] == segments[row, start - 1]
            prompts.append(ids[row, :start][same])
        config, training, device = self.config, model.training, ids.device
        model.eval()
        devices = [device] if device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            torch.manual_seed(mix(self.seed, 34, step, positions[0]))
            written = continued(
                model, prompts, config.length, end=self.end, temperature=config.temperature
            )
        model.train(training)
        return written


def continued(
    model: Any,
    prompts: Sequence[Int[Tensor, " t"]],
    length: int,
    *,
    end: int,
    temperature: float = 0.0,
) -> Int[Tensor, "n L"]:
    """Continue texts by transformers' `generate`, from the whole distribution.

    Args:
        end: Ends a text; it fills what is left of `length`.
        temperature: 0 for the likeliest tokens.
    """
    from transformers import GenerationConfig

    device, width = prompts[0].device, max(map(len, prompts))
    ids = torch.full((len(prompts), width), end, device=device)
    shown = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :], shown[row, width - len(prompt) :] = prompt, 1
    sampling = dict[str, Any](do_sample=False)
    if temperature:
        sampling = dict(do_sample=True, temperature=temperature, top_k=0, top_p=1.0)
    config = GenerationConfig(
        max_new_tokens=length, eos_token_id=end, pad_token_id=end, use_cache=True, **sampling
    )
    with any_length(), as_written(model):
        found = model.generate(ids, attention_mask=shown, generation_config=config)[:, width:]
    return torch.nn.functional.pad(found, (0, length - found.shape[1]), value=end)


class OnPolicyFeed:
    """Rows of a text, some of which the student will write: what is learnt of each batch."""

    def __init__(self, feed: TextFeed, own: OwnText):
        self.feed, self.own = feed, own
        self.slices = feed.slices
        self.batches, self.keys, self.skipped = feed.batches, feed.keys, feed.skipped

    def counts(self, step: int) -> Mapping[str, int]:
        """Return how many tokens may be learnt; of the text alone for its cross-entropy.

        What a student left out behind an end counts here, for nobody knows it before.
        """
        rows = self.feed.plan.indices(step).reshape(self.feed.num_slices, -1)
        number = self.own.number(step, rows.shape[1])
        texts = rows[:, number:].reshape(-1)
        total = int(self.feed.source.rows(texts).counted.sum()) if len(texts) else 0
        written = number * self.feed.num_slices * self.own.config.length
        return defaultdict(lambda: max(1, total + written), ce=max(1, total))
