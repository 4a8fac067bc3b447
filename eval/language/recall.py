"""Recall from the context: copying, phone books, a needle in a haystack; all of it synthetic.

2406.07887, section 3.3, found these to tell state-space models, hybrids and transformers apart
where other benchmarks do not; copying and phone books are those of Repeat After Me (2402.01032).
Every prompt is a plain text to be continued, so models need no instructions, and bytes are enough.

    copying      abxo...\\nabxo...\\n\\nqzkt...\\nqzkt...
    phonebook    Kabodu: 123-4567\\n ... \\n\\nKabodu: 123-4567
    needle       ... The secret number of Kabodu is 48213. ... The secret number of Kabodu is 48213
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from zoo.eval.language.subject import TextSubject, encode_pair, score_continuations
from zoo.eval.registry import Found, Scores
from zoo.eval.settings import CopyingSettings, NeedleSettings, PhonebookSettings
from zoo.language.open import check_length

LETTERS = "abcdefghijklmnopqrstuvwxyz"
CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"
FILLER = (
    "The river runs slowly past the old mill.",
    "A grey cat sleeps on the wall of the garden.",
    "Rain is expected in the hills before the evening.",
    "The baker opens his shop when the street is still dark.",
    "Nobody has mended the gate behind the school.",
    "Two boats lie in the harbour and wait for the wind.",
    "The clock of the tower is always a little late.",
    "Apples are cheap this year, and plums are dear.",
    "Her brother paints the windows of the house blue.",
    "On the market square a man sells maps and string.",
    "The path through the wood ends at a small bridge.",
    "Letters arrive here on Tuesdays, if they arrive at all.",
)
"""Sentences of the haystack."""


class Sample(NamedTuple):
    """A text, and what should follow it."""

    key: str
    text: str
    answer: str


# ---------------------------------------------------------------- samples


def copying_sample(rng: np.random.Generator, length: int, key: str, *, shots: int) -> Sample:
    """Return `shots` strings of `length` letters, each written twice, and one that is to be."""
    *shown, asked = ("".join(rng.choice(list(LETTERS), length)) for _ in range(shots + 1))
    twice = "".join(f"{letters}\n{letters}\n\n" for letters in shown)
    return Sample(key, f"\n{twice}{asked}\n", asked)


def phonebook_sample(
    rng: np.random.Generator, entries: int, key: str, *, shots: int, reversed: bool
) -> Sample:
    """Return a phone book, `shots` entries of it asked and answered, and a name.

    Args:
        reversed: The name that is asked for stands in front of the book too, so that a model knows
            what to keep before it reads.
    """
    book = {name: _number(rng) for name in _names(rng, entries)}
    *shown, asked = rng.choice(list(book), shots + 1, replace=False)
    first = f"{asked}\n\n" if reversed else ""
    lines = "".join(f"{name}: {number}\n" for name, number in book.items())
    answered = "".join(f"{name}: {book[name]}\n" for name in shown)
    return Sample(key, f"{first}{lines}\n{answered}{asked}:", f" {book[asked]}")


def needle_sample(
    rng: np.random.Generator, length: int, depth: float, key: str, count: Callable[[str], int]
) -> Sample:
    """Return a haystack of at most `length` tokens in all, with a number hidden in it.

    Args:
        depth: Where it is hidden: 0 in front, 1 at the end.
        count: Counts a text's tokens.

    Raises:
        ValueError: not even the question fits.
    """
    (name,) = _names(rng, 1)
    asked, answer = f"The secret number of {name} is", f" {rng.integers(10000, 100000)}"
    hay = list(rng.choice(FILLER, length))  # a sentence has more than one token

    def whole(sentences: int) -> str:
        place = round(depth * sentences)
        return " ".join([*hay[:place], f"{asked}{answer}.", *hay[place:sentences], asked])

    fits, too_many = 0, length
    if count(whole(0) + answer) > length:
        raise ValueError(
            f"The needle and its question have {count(whole(0) + answer)} tokens, more than "
            f"{length}; give larger --needle.lengths."
        )
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if count(whole(middle) + answer) <= length:
            fits = middle
        else:
            too_many = middle
    return Sample(key, whole(fits), answer)


def _names(rng: np.random.Generator, number: int) -> list[str]:
    """Draw different names of three syllables."""
    syllables = [a + b for a in CONSONANTS for b in VOWELS]
    drawn = rng.choice(len(syllables) ** 3, number, replace=False)
    parts = np.stack(np.unravel_index(drawn, (len(syllables),) * 3), axis=1)
    return ["".join(syllables[i] for i in row).capitalize() for row in parts]


def _number(rng: np.random.Generator) -> str:
    return f"{rng.integers(100, 1000)}-{rng.integers(10000):04}"


# ---------------------------------------------------------------- benchmarks


def copying(subject: TextSubject, data: Path | None, settings: CopyingSettings) -> Iterator[Found]:
    """Yield `copying/N/exact` and `copying/N/token` for strings of N letters, and over all."""
    rng = np.random.default_rng([subject.seed, 1])
    cells = {
        str(n): [
            copying_sample(rng, n, f"{n}/{i}", shots=settings.shots)
            for i in range(settings.samples)
        ]
        for n in settings.lengths
    }
    yield from _measured(subject, "copying", cells)


def phonebooks(seed: int, settings: PhonebookSettings) -> dict[str, list[Sample]]:
    """Return the samples of `phonebook` by the entries of a book."""
    rng = np.random.default_rng([seed, 2])
    return {
        str(n): [
            phonebook_sample(rng, n, f"{n}/{i}", shots=settings.shots, reversed=settings.reversed)
            for i in range(settings.samples)
        ]
        for n in settings.entries
    }


def phonebook(
    subject: TextSubject, data: Path | None, settings: PhonebookSettings
) -> Iterator[Found]:
    """Yield `phonebook/N/exact` and `phonebook/N/token` for books of N entries, and over all."""
    yield from _measured(subject, "phonebook", phonebooks(subject.seed, settings))


def needle(subject: TextSubject, data: Path | None, settings: NeedleSettings) -> Iterator[Found]:
    """Yield `needle/N/D/exact` for N tokens and a needle D per cent deep, and over all."""
    rng = np.random.default_rng([subject.seed, 3])
    for length in settings.lengths:
        check_length(subject.model, length, subject.name, option="--needle.lengths")
    begins = subject.tokenizer.begin is not None
    depths = np.linspace(0, 1, settings.depths) if settings.depths > 1 else [0.5]
    cells = {}
    for length in settings.lengths:
        for depth in depths:
            cell = f"{length}/{100 * depth:.0f}"
            cells[cell] = [
                needle_sample(
                    rng, length - begins, float(depth), f"{cell}/{i}",
                    lambda text: len(subject.tokenizer.encode(text)),
                )
                for i in range(settings.samples)
            ]  # fmt: skip
    yield from _measured(subject, "needle", cells)


def _measured(
    subject: TextSubject, task: str, cells: Mapping[str, Sequence[Sample]]
) -> Iterator[Found]:
    """Yield what share of each cell's answers is right, whole and token by token."""
    keys, exact, right, total = list[str](), list[bool](), list[int](), list[int]()
    for cell, samples in cells.items():
        pairs = [encode_pair(subject.tokenizer, s.text, s.answer) for s in samples]
        longest = max(len(given) + len(wanted) for given, wanted in pairs)
        check_length(subject.model, longest, subject.name, option=f"smaller --{task} numbers:")
        scored = score_continuations(subject, pairs)
        first = len(keys)
        keys += [sample.key for sample in samples]
        exact += [bool(one.chosen.all()) for one in scored]
        right += [int(one.chosen.sum()) for one in scored]
        total += [len(one.chosen) for one in scored]
        yield f"{task}/{cell}/exact", Scores(keys[first:], np.array(exact[first:]))
        yield (
            f"{task}/{cell}/token",
            Scores(keys[first:], np.array(right[first:]), np.array(total[first:])),
        )
    yield f"{task}/exact", Scores(keys, np.array(exact))
    yield f"{task}/token", Scores(keys, np.array(right), np.array(total))
