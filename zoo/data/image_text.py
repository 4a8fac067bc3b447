"""Rows of tokens and images from conversations, in the order of a plan.

One plain template, for every model:

    <image tokens>
    question
    answer<end>

and the next turn behind it. What is learnt are the answers and the tokens that end them.
"""

import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from zoo.data.conversations import MARK, Conversation, Conversations, check_marks
from zoo.data.feed import PlanFeed
from zoo.data.plan import Plan
from zoo.language.tokenizers import Tokenizer
from zoo.language.tokens import Tokens
from zoo.multimodal.budget import tokens_of
from zoo.multimodal.image_text import ImageText

AHEAD = 2
"""Batches that each reading thread may be ahead."""
REMEMBERED = 2048
"""Conversations whose ids are remembered: what evaluations ask for again and again."""


class ForImages(Protocol):
    """What of a tower's configuration says how many tokens an image makes."""

    patch_size: int
    native: bool
    max_tokens: int

    def fitted(self, height: int, width: int) -> tuple[int, int]:
        """Return the rows and columns of pixels that an image is brought to."""
        ...


class Encoded(NamedTuple):
    """A conversation as ids."""

    ids: np.ndarray
    answers: np.ndarray
    """Where the next token belongs to an answer."""
    sizes: tuple[tuple[int, int], ...]
    """Rows and columns of pixels of each image."""


@dataclass(frozen=True)
class Change:
    """Random crops and mirror images; by default none: questions ask what is left, or there."""

    scale: tuple[float, float] = (1.0, 1.0)
    """Least and largest share of the image that a crop covers, in its own shape."""
    flip: float = 0.0
    """Probability of mirroring."""

    def __call__(
        self, image: Image.Image, size: tuple[int, int], draws: np.random.Generator | None
    ) -> np.ndarray:
        """Bring an image to `size` (rows, columns): uint8 [3 H W]."""
        box = (0.0, 0.0, float(image.width), float(image.height))
        flipped = False
        if draws is not None and (self.flip or self.scale != (1.0, 1.0)):
            side = draws.uniform(*self.scale) ** 0.5
            width, height = side * image.width, side * image.height
            x, y = draws.uniform(0, image.width - width), draws.uniform(0, image.height - height)
            box, flipped = (x, y, x + width, y + height), draws.random() < self.flip
        whole = box == (0.0, 0.0, float(image.width), float(image.height))
        if not whole or (image.height, image.width) != size:
            image = image.resize((size[1], size[0]), Image.Resampling.BICUBIC, box=box)
        pixels = np.asarray(image)
        return np.ascontiguousarray((pixels[:, ::-1] if flipped else pixels).transpose(2, 0, 1))


@dataclass
class ImageTextSource:
    """Conversations, as a tokenizer and a tower see them."""

    conversations: Conversations
    tokenizer: Tokenizer
    image_token: int
    tower: ForImages
    most: int = 4096
    """Tokens that a conversation may have; longer ones are left out."""
    encode_number: Callable[[int], Encoded] = field(init=False, repr=False)
    """`encode` of a conversation by its number; the latest ones are remembered."""

    def __post_init__(self):
        self.encode_number = lru_cache(REMEMBERED)(self._encode)

    @cached_property
    def kept(self) -> range | np.ndarray:
        """Numbers of the conversations that are short enough.

        Only one whose bytes might make too many tokens is tokenised for it.

        Raises:
            ValueError: none is.
        """
        total, longest = len(self.conversations), self.conversations.longest
        if longest is not None and longest + self._most_cells() <= self.most:
            return range(total)
        found = np.fromiter((i for i in range(total) if self._is_short(i)), np.int64)
        if not len(found):
            raise ValueError(
                f"All {total} conversations of {self.conversations.name} are longer than "
                f"{self.most} tokens, images included; give a larger --length, a smaller budget "
                "(--tokens) or a larger --shuffle."
            )
        return range(total) if len(found) == total else found

    def _is_short(self, number: int) -> bool:
        sample = self.conversations.samples[number]
        bound = most_text(sample) + len(sample.images) * self._most_cells()
        return bound <= self.most or len(self._encode(number).ids) <= self.most

    def _most_cells(self) -> int:
        """Return the most tokens of an image, whatever its shape."""
        if self.tower.native:
            return self.tower.max_tokens
        return tokens_of(*self.tower.fitted(1, 1), self.tower.patch_size)

    def __len__(self) -> int:
        return len(self.kept)

    def key(self, index: int) -> str:
        return self.conversations.key(int(self.kept[index]))

    def sample(self, index: int) -> Conversation:
        """Return a conversation."""
        return self.conversations.samples[int(self.kept[index])]

    def encoded(self, index: int) -> Encoded:
        """Return a conversation as ids."""
        return self.encode_number(int(self.kept[index]))

    def learnt(self, index: int) -> int:
        """Count the tokens of a conversation's answers, with their ends."""
        return sum(len(self.tokenizer.encode(t.answer)) + 1 for t in self.sample(index).turns)

    def _encode(self, number: int) -> Encoded:
        sample = self.conversations.samples[number]
        sizes = tuple(self.tower.fitted(*self.conversations.size(i)) for i in sample.images)
        cells = [tokens_of(*size, self.tower.patch_size) for size in sizes]
        ids, answers = encode(sample, self.tokenizer, self.image_token, cells)
        return Encoded(ids, answers, sizes)

    def rows(
        self,
        indices: Sequence[int] | np.ndarray,
        *,
        positions: Sequence[int] = (),
        change: Change = Change(),
        draws: Callable[[int], np.random.Generator] | None = None,
        shown: Sequence[Sequence[int]] | None = None,
    ) -> ImageText:
        """Return several conversations as a batch.

        Args:
            draws: The random numbers of a position, for `change`.
            shown: Numbers of other images in place of their own, one list a conversation.
        """
        rows = [self.encoded(int(index)) for index in indices]
        width = max(len(row.ids) for row in rows)
        ids, segments = np.zeros((len(rows), width), np.int64), np.full((len(rows), width), -1)
        answers = np.zeros((len(rows), width), bool)
        pixels: list[np.ndarray] = []
        for place, (index, row) in enumerate(zip(indices, rows, strict=True)):
            ids[place, : len(row.ids)], segments[place, : len(row.ids)] = row.ids, 0
            answers[place, : len(row.ids)] = row.answers
            images = self.sample(int(index)).images if shown is None else shown[place]
            random = draws(positions[place]) if draws else None
            pixels += [
                change(self.conversations.read(image), size, random)
                for image, size in zip(images, row.sizes, strict=True)
            ]
        keys = [self.key(int(index)) for index in indices]
        tokens = Tokens(torch.from_numpy(ids), torch.from_numpy(segments), keys, positions)
        return ImageText(tokens, torch.from_numpy(answers), *_grouped(pixels))


def _grouped(pixels: Sequence[np.ndarray]) -> tuple[list[Tensor], list[list[int]]]:
    """Put images of one size together, in the order in which sizes first occur."""
    places = defaultdict[tuple[int, ...], list[int]](list)
    for place, image in enumerate(pixels):
        places[image.shape].append(place)
    groups = [torch.from_numpy(np.stack([pixels[i] for i in group])) for group in places.values()]
    return groups, list(places.values())


def most_text(sample: Conversation) -> int:
    """Return how many tokens the text of a conversation has at most, whatever the tokenizer.

    A token stands for a byte at least: of the text itself or, of a tokenizer that normalises, of
    its longest usual form (NFKC). Each piece that is encoded may get a space in front.
    """
    total = 1  # the one that a document begins with
    for turn in sample.turns:
        for text in (turn.question, turn.answer):
            forms = [text] if text.isascii() else [text, unicodedata.normalize("NFKC", text)]
            total += max(len(form.encode()) for form in forms) + text.count(MARK) + 4
    return total


def encode(
    sample: Conversation, tokenizer: Tokenizer, image_token: int, cells: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids of a conversation, and where the next token belongs to an answer.

    Args:
        cells: Tokens of each of its images.

    Raises:
        ValueError: the text has another number of places for images.
    """
    marks = sum(turn.question.count(MARK) for turn in sample.turns)
    check_marks(marks, len(cells), f"Conversation {sample.key}")
    ids: list[int] = [] if tokenizer.begin is None else [tokenizer.begin]
    learnt, coming = [False] * len(ids), iter(cells)
    for number, turn in enumerate(sample.turns):
        before = "\n" if number else ""
        pieces = f"{before}{turn.question}\n".split(MARK)
        for piece, text in enumerate(pieces):
            if piece:
                ids += [image_token] * next(coming)
            ids += tokenizer.encode(text) if text else []
        learnt += [False] * (len(ids) - len(learnt))
        answer = [*tokenizer.encode(turn.answer), tokenizer.end]
        ids += answer
        learnt += [True] * len(answer)
    # a token is learnt where the one before it stands
    return np.array(ids, np.int64), np.array([*learnt[1:], False])


@dataclass
class ImageTextFeed(PlanFeed):
    """Conversations in the order of a plan, read by threads ahead of the step that takes them."""

    source: ImageTextSource
    plan: Plan
    device: torch.device
    change: Change = Change()
    num_slices: int = 1
    slices: Sequence[int] = ()
    workers: int = 0
    _counting: dict[int, Future[int]] = field(default_factory=dict, init=False, repr=False)
    """Of steps that are read ahead: what `counts` will be asked for."""

    def __post_init__(self):
        self.slices = tuple(self.slices) or tuple(range(self.num_slices))

    def batches(self, start: int, steps: int) -> Iterator[ImageText]:
        """Return the slices of the steps `start`..`steps`, one after another."""
        wanted = ((step, index) for step in range(start, steps) for index in self.slices)
        if not self.workers:
            for step, index in wanted:
                yield self._slice(step, index).to(self.device)
            return
        with ThreadPoolExecutor(self.workers) as threads:
            waiting: list[Future[ImageText]] = []
            for step, index in wanted:
                if index == self.slices[0]:
                    self._counting[step] = threads.submit(self._count, step)
                waiting.append(threads.submit(self._slice, step, index))
                if len(waiting) > AHEAD * self.workers:
                    yield waiting.pop(0).result().to(self.device)
            for future in waiting:
                yield future.result().to(self.device)

    def _slice(self, step: int, index: int) -> ImageText:
        here = self.plan.positions(step).reshape(self.num_slices, -1)[index]
        return self.source.rows(
            self.plan.indices_at(here), positions=here.tolist(), change=self.change,
            draws=self.plan.draws,
        )  # fmt: skip

    def counts(self, step: int) -> Mapping[str, int]:
        """Return the tokens of a batch, all its slices together, that are learnt."""
        ahead = self._counting.pop(step, None)
        total = ahead.result() if ahead else self._count(step)
        return defaultdict(lambda: max(1, total))

    def _count(self, step: int) -> int:
        return sum(self.source.learnt(int(index)) for index in self.plan.indices(step))
