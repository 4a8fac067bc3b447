"""What several commands are tried on: a tiny language model, and coloured squares."""

import numpy as np
import pytest
import torch
from PIL import Image

from zoo.cli import main


@pytest.fixture(scope="session")
def learn_llama():
    """Let a tiny Llama learn a text, in a folder with `text.txt`, and return its checkpoint."""

    def learn(place, text: str, **sizes):
        transformers = pytest.importorskip("transformers")
        (place / "text.txt").write_text(text)
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=257, hidden_size=32, intermediate_size=48, num_attention_heads=2,
            head_dim=16, max_position_embeddings=64, **sizes,
        )  # fmt: skip
        transformers.LlamaForCausalLM(config).save_pretrained(place / "random")
        words = "--losses.kl 0 --losses.ce 1 --length 32 --batch 8 --optim.lr 1e-2 --steps 60"
        main(["distill", "--text", "text.txt", "--student", "lm:random", *words.split()])
        return place / "runs/distill_text/export"

    return learn


@pytest.fixture(scope="session")
def paint_squares():
    """Write 24 and 8 images of coloured squares, [48, 48], below a folder: train and val."""

    def paint(folder):
        for split, count in (("train", 24), ("val", 8)):
            (folder / split / "all").mkdir(parents=True)
            for i in range(count):
                few = np.random.default_rng([i, count]).integers(0, 255, (3, 3, 3), dtype=np.uint8)
                large = few.repeat(16, 0).repeat(16, 1)
                Image.fromarray(large).save(folder / split / "all" / f"{i:02d}.png")

    return paint
