"""Text that a model writes itself, the data-free substitute for what it was trained on."""

import copy
import time
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import DynamicCache

from benchmarks.gemma.rows import Texts, source
from zoo.data.text import TextSource

PROMPT = 8
"""Most tokens of real text that a row begins with, after the token for a beginning."""


@torch.no_grad()
def write_rows(
    model: Any, prompts: Int[Tensor, "B P"], length: int, bos: int, eos: int
) -> Int[Tensor, "B T"]:
    """Write rows of `length` tokens at temperature 1.

    After the token that ends a text the next one begins, so that rows are full.

    Args:
        prompts: What rows begin with; -1 where a prompt has ended.
    """
    cache = DynamicCache(config=model.config)
    head = model.get_output_embeddings().weight.float()  # bf16's logits would have 3 digits
    rows = [torch.full_like(prompts[:, :1], bos)]
    while len(rows) < length:
        at = len(rows) - 1
        out = model.base_model(input_ids=rows[-1], past_key_values=cache, use_cache=True)
        logits = out.last_hidden_state[:, -1].float() @ head.T
        following = logits.softmax(-1).multinomial(1)
        following = torch.where(rows[-1] == eos, bos, following)
        if at < prompts.shape[1]:
            given = prompts[:, at : at + 1]
            following = torch.where(given >= 0, given, following)
        rows.append(following)
    return torch.cat(rows, 1)


def random_prompts(texts: Texts, size: int, draws: np.random.Generator) -> np.ndarray:
    """Take 0 to `PROMPT` tokens from random places of the seen text, [size, PROMPT]."""
    seen = np.asarray(texts.seen.tokens).reshape(-1, texts.seen.length)
    row = draws.integers(len(seen), size=(size, 1))
    place = draws.integers(1, texts.seen.length - PROMPT, size=(size, 1)) + np.arange(PROMPT)
    ends = draws.integers(PROMPT + 1, size=(size, 1)) <= np.arange(PROMPT)
    return np.where(ends, -1, seen[row, place]).astype(np.int64)


def sample(
    model: Any, texts: Texts, *, rows: int, batch: int, device: torch.device, seed: int = 0
) -> TextSource:
    """Let a model write rows as long as the texts' own."""
    began = time.perf_counter()
    draws = np.random.default_rng(seed)
    torch.manual_seed(seed)
    writer = copy.deepcopy(model).to(torch.bfloat16 if device.type == "cuda" else torch.float32)
    found = []
    for first in range(0, rows, batch):
        prompts = random_prompts(texts, min(batch, rows - first), draws)
        made = write_rows(
            writer, torch.from_numpy(prompts).to(device), texts.seen.length, texts.bos, texts.eos
        )
        found.append(made.cpu().numpy())
        seconds = time.perf_counter() - began
        print(f"sampled {sum(map(np.size, found)):,} tokens, {seconds:.0f} s", flush=True)
    return source("samples", np.concatenate(found).astype(np.int32))
