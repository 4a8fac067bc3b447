"""Causal language models of transformers as frozen teachers of tokens."""

from typing import Any

import torch
from torch import nn

from zoo.language.open import open_language_model
from zoo.language.tokens import TokenFeatures, Tokens, read_tokens


class LanguageTeacher(nn.Module):
    """A frozen tower: a batch of tokens in, its hidden states and its head out.

    `at` names the layers whose states are answered too, as `read_tokens` takes it.
    """

    def __init__(self, name: str, model: Any):
        super().__init__()
        self.at: tuple[float, ...] = ()
        self.name, self.model = name, model.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, tokens: Tokens) -> TokenFeatures:
        return read_tokens(self.model, tokens, at=self.at)


def open_language(name: str, *, device: torch.device | str = "cpu") -> LanguageTeacher:
    """Open `lm:FOLDER` (a folder of transformers' files) or `lm:NAME`, frozen and in eval mode.

    Raises:
        ValueError: as `open_language_model`.
    """
    return LanguageTeacher(name, open_language_model(name, device=device))
