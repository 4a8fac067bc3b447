"""A model of images and text for lmms-eval: `--model zoo_vlm --model_args pretrained=RUN`.

lmms-eval (0.7) hands over instances whose arguments are the question, settings of the generation,
a function from a row of the data to its pictures, and that row's number, task and split.
"""

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from lmms_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]
from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]
from PIL import Image

from zoo.data.conversations import MARK, Conversation, Conversations, Turn
from zoo.data.image_text import ImageTextSource
from zoo.eval.multimodal.answers import generate_answers
from zoo.language.tokenizers import BYTES, has_tokenizer, open_tokenizer
from zoo.multimodal.open import open_vlm, pixels_of, vlm_folder
from zoo.train.device import device_of

MOST = 64
"""Tokens of an answer, where a task says nothing."""
AHEAD = 16
"""Batches whose pictures are read at once, so that questions of one length come together."""


class Asked(NamedTuple):
    """A question of a task."""

    question: str
    images: Sequence[Any]
    most: int
    """Tokens of its answer."""


class ZooVlm(lmms):
    """A Llava with a tower of zoo's, asked by zoo's plain template.

    Args:
        pretrained: A run of `zoo distill --image-text`, or a folder of transformers.
        batch_size: Questions at a time, of those that are as long as each other.
        length: Most tokens of a question, its pictures included.
    """

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        batch_size: int | str | None = None,
        length: int = 4096,
        **_: Any,
    ) -> None:
        super().__init__()
        name = (device or "auto").partition(":")[0]
        self.at: Any = device_of("auto" if name not in ("cpu", "cuda") else name)
        self.model, self.length = open_vlm(pretrained, device=self.at), int(length)
        self.batch = int(str(batch_size)) if str(batch_size).isdecimal() else 16
        folder = vlm_folder(pretrained)
        self.tokens = open_tokenizer(str(folder) if has_tokenizer(folder) else BYTES)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answer each question greedily, up to the first of its `until`."""
        said, size = [], AHEAD * self.batch
        for start in range(0, len(requests), size):  # their pictures are in memory
            part = requests[start : start + size]
            answers = self.ask([self._read(*request.args) for request in part])
            said += [_ended(a, r.args[1]) for a, r in zip(answers, part, strict=True)]
        return said

    def _read(
        self, question: str, settings: dict, pictures: Any, row: int, task: str, split: str
    ) -> Asked:
        images = list(pictures(self.task_dict[task][split][row]) or ())
        return Asked(question, images, int(settings.get("max_new_tokens") or MOST))

    @torch.no_grad()
    def ask(self, asked: Sequence[Asked]) -> list[str]:
        """Return the answers to questions about pictures.

        Raises:
            ValueError: one of them is no picture, a question's pictures come to several sizes, or
                it is too long.
        """
        images, samples = list[Image.Image](), list[Conversation]()
        for number, one in enumerate(asked):
            if wrong := [type(x).__name__ for x in one.images if not isinstance(x, Image.Image)]:
                raise ValueError(f"zoo_vlm answers questions about pictures, not {wrong[0]}.")
            marks = "" if MARK in one.question or not one.images else f"{MARK * len(one.images)}\n"
            places = tuple(range(len(images), len(images) + len(one.images)))
            images += [image.convert("RGB") for image in one.images]
            samples.append(Conversation(f"{number}", places, (Turn(marks + one.question, ""),)))
        source = self._source(samples, images)
        found = [""] * len(asked)
        for most in dict.fromkeys(one.most for one in asked):
            here = [i for i, one in enumerate(asked) if one.most == most]
            answers = generate_answers(
                self.model, source, here, self.at, most=most, batch=self.batch
            )
            for place, answer in zip(here, answers, strict=True):
                found[place] = answer
        return found

    def _source(
        self, samples: Sequence[Conversation], images: Sequence[Image.Image]
    ) -> ImageTextSource:
        source = ImageTextSource(
            Conversations(
                "lmms-eval", samples, images.__getitem__,
                lambda i: (images[i].height, images[i].width),
            ),
            self.tokens,
            self.model.config.image_token_id,
            pixels_of(self.model),
            sys.maxsize,  # none is left out
        )  # fmt: skip
        for index, sample in enumerate(samples):
            ids, _, sizes = source.encoded(index)
            if len(set(sizes)) > 1:
                raise ValueError(
                    f"These {len(sizes)} pictures come to several sizes, and one question's must "
                    "share one; take a tower that was built without --native."
                )
            if len(ids) > self.length:
                raise ValueError(
                    f"The question {sample.turns[0].question[:60]!r} makes {len(ids)} tokens, its "
                    f"pictures included, and at most {self.length} are allowed: "
                    f"--model_args ...,length={len(ids)}."
                )
        return source

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Refuse: no task that zoo is measured on asks for it."""
        raise NotImplementedError("zoo_vlm generates answers; take a generate_until task.")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Refuse: the template has one question."""
        raise NotImplementedError("zoo_vlm answers one question; take a generate_until task.")


def _ended(answer: str, settings: dict) -> str:
    """Cut an answer at the first of what ends it."""
    ends = settings.get("until") or ()
    for end in [ends] if isinstance(ends, str) else ends:
        answer = answer.partition(end)[0] if end else answer
    return answer.strip()
