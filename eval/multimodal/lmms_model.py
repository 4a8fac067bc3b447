"""A model of images and text for lmms-eval: `--model zoo_vlm --model_args pretrained=RUN`.

lmms-eval (0.7) hands over instances whose arguments are the question, settings of the generation,
a function from a row of the data to its pictures, and that row's number, task and split.
"""

from collections.abc import Sequence
from typing import Any

import torch
from lmms_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]
from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]
from PIL import Image

from zoo.data.conversations import MARK, Conversation, Conversations, Turn
from zoo.data.image_text import ImageTextSource
from zoo.eval.multimodal.answers import generate_answer
from zoo.language.tokenizers import BYTES, has_tokenizer, open_tokenizer
from zoo.multimodal.open import open_vlm, pixels_of, vlm_folder
from zoo.train.device import device_of

MOST = 64
"""Tokens of an answer, where a task says nothing."""


class ZooVlm(lmms):
    """A Llava with a tower of zoo's, asked by zoo's plain template.

    Args:
        pretrained: A run of `zoo distill --image-text`, or a folder of transformers.
        length: Most tokens of a question, its pictures included.
    """

    def __init__(
        self, pretrained: str, device: str | None = None, length: int = 4096, **_: Any
    ) -> None:
        super().__init__()
        name = (device or "auto").partition(":")[0]
        self.at: Any = device_of("auto" if name not in ("cpu", "cuda") else name)
        self.model, self.length = open_vlm(pretrained, device=self.at), int(length)
        folder = vlm_folder(pretrained)
        self.tokens = open_tokenizer(str(folder) if has_tokenizer(folder) else BYTES)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answer each question greedily, up to the first of its `until`."""
        return [self._answer(*request.args) for request in requests]

    def _answer(
        self, question: str, settings: dict, pictures: Any, row: int, task: str, split: str
    ) -> str:
        images = list(pictures(self.task_dict[task][split][row]) or ())
        said = self.ask(question, images, most=int(settings.get("max_new_tokens") or MOST))
        ends = settings.get("until") or ()
        for end in [ends] if isinstance(ends, str) else ends:
            said = said.partition(end)[0] if end else said
        return said.strip()

    @torch.no_grad()
    def ask(self, question: str, images: Sequence[Any], *, most: int = MOST) -> str:
        """Return the answer to a question about some pictures.

        Raises:
            ValueError: one of them is no picture, or they do not fit one size.
        """
        if wrong := [type(x).__name__ for x in images if not isinstance(x, Image.Image)]:
            raise ValueError(f"zoo_vlm answers questions about pictures, not {wrong[0]}.")
        if MARK not in question:
            question = f"{MARK * len(images)}\n{question}" if images else question
        seen = [image.convert("RGB") for image in images]
        sample = Conversation("asked", tuple(range(len(seen))), (Turn(question, ""),))
        source = ImageTextSource(
            Conversations(
                "lmms-eval", [sample], seen.__getitem__, lambda i: (seen[i].height, seen[i].width)
            ),
            self.tokens,
            self.model.config.image_token_id,
            pixels_of(self.model),
            self.length,
        )
        if len(set(source.encoded(0).sizes)) > 1:
            raise ValueError(
                f"These {len(seen)} pictures come to several sizes, and one question's must share "
                "one; take a tower that was built without --native."
            )
        return generate_answer(self.model, source, 0, self.at, most=most)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Refuse: no task that zoo is measured on asks for it."""
        raise NotImplementedError("zoo_vlm generates answers; take a generate_until task.")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Refuse: the template has one question."""
        raise NotImplementedError("zoo_vlm answers one question; take a generate_until task.")
