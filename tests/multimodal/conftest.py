"""Tiny models of images and text."""

import pytest
import torch

from zoo.language.open import open_language_model
from zoo.multimodal.open import build_llava, open_tower

IMAGE = 257


@pytest.fixture(scope="session")
def tiny_llava():
    """Put a tower in front of a tiny language model of bytes."""

    def build(tower):
        torch.manual_seed(0)
        return build_llava(tower, open_language_model("llama_tiny/random"), image_token=IMAGE)

    return build


@pytest.fixture(scope="session")
def ids_with():
    """Make rows of bytes with so many tokens for an image behind the second one."""

    def make(tokens, *, rows=2, text=6):
        ids = torch.randint(0, 256, (rows, tokens + text))
        ids[:, 2 : 2 + tokens] = IMAGE
        return ids

    return make


@pytest.fixture(scope="session")
def small_tower():
    torch.manual_seed(0)
    return open_tower("resnet18", size=64, native=True)
