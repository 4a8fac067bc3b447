"""Questions about images: exact answers by kind of question, always beside two controls.

exact      each question with its own picture
shuffled   with another question's picture: what stays right there is not sight
blind      with a grey picture: what the question alone is worth to this model
"""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from zoo.data.conversations import Conversations, open_conversations, open_part
from zoo.data.generated_vqa import GENERATED
from zoo.data.image_text import ImageTextSource
from zoo.eval.multimodal.answers import (
    BLIND,
    SHUFFLED,
    SIGHT,
    Answered,
    answer_all,
    generate_answers,
)
from zoo.eval.multimodal.subject import ImageTextSubject
from zoo.eval.registry import Found, Picture, Scores
from zoo.eval.settings import SightSettings, VqaSettings

NAMES = {SIGHT: "exact", SHUFFLED: "shuffled", BLIND: "blind"}


def vqa(subject: ImageTextSubject, data: Path, settings: VqaSettings) -> Iterator[Found]:
    """Yield `vqa/exact`, `vqa/shuffled` and `vqa/blind`, and each by kind of question.

    An answer is right if greedy generation writes exactly it. `vqa/not_yes_no/...` is over the
    questions that a guess does not answer every second time.
    """
    yield from _measured(subject, "vqa", open_part(data), settings.samples, settings.pictures)


def sight(subject: ImageTextSubject, data: None, settings: SightSettings) -> Iterator[Found]:
    """Yield the same of pictures that are drawn here: written text, counts, colours, positions."""
    _, val = open_conversations(f"{GENERATED}:{settings.samples}")
    yield from _measured(subject, "sight", val, settings.samples, settings.pictures)


def _measured(
    subject: ImageTextSubject, task: str, conversations: Conversations, most: int, pictures: int
) -> Iterator[Found]:
    source = subject.source(conversations)
    order = np.random.default_rng(subject.seed).permutation(len(source))
    chosen = sorted(int(i) for i in order[: most or len(source)])
    answers: dict[str, list[Answered]] = {}
    for control, name in NAMES.items():
        answers[name] = list(
            answer_all(
                subject.model, source, device=subject.device, batch=subject.batch,
                control=control, seed=subject.seed, indices=chosen, autocast=subject.autocast,
            )
        )  # fmt: skip
        for kind, found in _by_kind(answers[name]).items():
            keys = [one.key for one in found]
            label = f"{task}/{kind}/{name}" if kind else f"{task}/{name}"
            yield label, Scores(keys, np.array([one.right for one in found]))
    yield f"{task}/nll", float(np.mean([one.nll for one in answers["exact"]]))
    yield from _failures(subject, task, source, chosen, answers["exact"], pictures)


def _by_kind(answers: list[Answered]) -> dict[str, list[Answered]]:
    """Group answers: all of them under "", each kind, and all that are not yes or no."""
    kinds = defaultdict[str, list[Answered]](list)
    for one in answers:
        kinds[one.kind].append(one)
    found: dict[str, list[Answered]] = {"": answers}
    if 0 < len(kinds.get("yes_no", ())) < len(answers):
        found["not_yes_no"] = [one for one in answers if one.kind != "yes_no"]
    return found | (dict(sorted(kinds.items())) if len(kinds) > 1 else {})


def _failures(
    subject: ImageTextSubject,
    task: str,
    source: ImageTextSource,
    chosen: list[int],
    answers: list[Answered],
    most: int,
) -> Iterator[Found]:
    wrong = [i for i, one in zip(chosen, answers, strict=True) if not one.right][:most]
    spoken = generate_answers(subject.model, source, wrong, subject.device)
    for index, said in zip(wrong, spoken, strict=True):
        turn, images = source.sample(index).turns[0], source.sample(index).images
        asked = turn.question.replace("<image>", "").strip()
        caption = f"{asked} {said or '(nothing)'}; right: {turn.answer}"
        if images:
            yield (
                f"{task}/{index}",
                Picture(np.asarray(source.conversations.read(images[0])), caption),
            )
