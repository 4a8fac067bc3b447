"""What a language model writes behind the beginnings of held-out rows, before and after a run."""

from collections.abc import Sequence

import torch

from zoo.data.text import Rows
from zoo.language.tokenizers import Tokenizer
from zoo.train.distill.on_policy import continued

ROWS, TOKENS = 3, 64
"""Texts, and the most tokens of a prompt and of what is written."""
TEMPERATURE = 0.8


def prompts_of(source: Rows) -> list[tuple[list[int], list[int]]]:
    """Return the ids of the documents with which the first rows begin, cut: prompt and rest."""
    found = []
    for index in range(min(ROWS, len(source))):
        ids, segments = source.row(index)
        document = ids[segments == segments[0]][: 2 * TOKENS].tolist()
        cut = max(1, min(TOKENS, len(document) // 2))
        found.append((document[:cut], document[cut:]))
    return found


def write_samples(
    model: torch.nn.Module, source: Rows, tokenizer: Tokenizer, seed: int
) -> list[dict[str, str]]:
    """Return `prompt`, `text` (how it goes on in truth) and `written` of some held-out rows."""
    pairs, device = prompts_of(source), next(model.parameters()).device
    prompts = [torch.tensor(prompt, device=device) for prompt, _ in pairs]
    length = min(TOKENS, source.row_length - max(map(len, prompts)))
    training, devices = model.training, [device] if device.type == "cuda" else []
    model.eval()
    with torch.no_grad(), torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        written = continued(
            model, prompts, length, end=tokenizer.end, temperature=TEMPERATURE
        ).tolist()
    model.train(training)
    return [
        dict(
            prompt=tokenizer.decode(prompt),
            text=tokenizer.decode(_until(rest, tokenizer.end)),
            written=tokenizer.decode(_until(ids, tokenizer.end)),
        )
        for (prompt, rest), ids in zip(pairs, written, strict=True)
    ]


def _until(ids: Sequence[int], end: int) -> list[int]:
    return list(ids[: ids.index(end)]) if end in ids else list(ids)
