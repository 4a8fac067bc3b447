"""Zero-shot classification by a student's head and the text tower of the teacher it learnt from."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from zoo.eval.extract import extract_share
from zoo.eval.registry import Found, Scores, Subject, check_classes
from zoo.eval.settings import RetrievalSettings, ZeroShotSettings
from zoo.features import Batch, Features
from zoo.files import read_json
from zoo.teachers.name import TeacherName
from zoo.teachers.text import TOWERS, open_text, text_classifier
from zoo.train.mesh import union

WNID = re.compile(r"n\d{8}")
"""A WordNet id, as in the folders of ImageNet."""
PLAIN = ("a photo of a {}.",)
S = TypeVar("S", ZeroShotSettings, RetrievalSettings)


def used(subject: Subject, data: Sequence[Path], settings: S, what: str = "zeroshot") -> S:
    """Return the settings with the teacher and the head that are used.

    Without a teacher, it is the one of the run from which the student is exported, if that has
    learnt from one with a text tower alone.

    Raises:
        ValueError: there is no such teacher or head, the two do not go together, or its tower
            cannot read a text.
    """
    teacher = settings.teacher or teacher_of(subject)
    label = head_for(subject, teacher, settings.head, what)
    for folder in data if what == "zeroshot" else ():
        classes = subject.open(folder, "whole").classes
        check_classes(classes, folder)
        class_names(classes, folder)
    if (teacher, label) not in subject.checked:
        embedded = open_text(TeacherName.parse(teacher), subject.device)(["a photo of a dog."])
        check_width(subject, label, embedded.shape[1], teacher)
        subject.checked.add((teacher, label))
    return replace(settings, teacher=teacher, head=label)


def teacher_of(subject: Subject, kinds: Sequence[str] = tuple(TOWERS)) -> str:
    """Return the only teacher of a student's run that has a text tower; "" if there is no such.

    Args:
        kinds: Kinds of teachers that come into question.
    """
    place = Path(subject.name)
    for folder in (place, place.parent):
        if not (folder / "config.json").is_file():
            continue
        listed = read_json(folder / "config.json").get("teachers")
        specs = listed if isinstance(listed, list) else []
        names = [spec.get("name") if isinstance(spec, dict) else spec for spec in specs]
        found = [
            name
            for name in names
            if isinstance(name, str)
            and name.partition(":")[0] in kinds
            and TeacherName.parse(name).label in subject.student.heads
        ]
        return found[0] if len(found) == 1 else ""
    return ""


def zeroshot(subject: Subject, data: Path, settings: ZeroShotSettings) -> Iterator[Found]:
    """Classify held-out images by their cosine with embedded class names (2103.00020 §3.1).

    The names are those of `classes.json`, otherwise those of the folders; ImageNet's wnids become
    the names that open_clip uses. Yields top-1, top-5 and the mean over classes, then the accuracy
    of each class, all in per cent.

    Raises:
        ValueError: the student has no such head, the teacher has no text tower or tokenizer, the
            two have different widths, or the images have no classes.
    """
    settings = used(subject, (data,), settings)
    label = settings.head
    images = subject.open(data, "whole")
    names = class_names(images.classes, data)
    sentences = prompts(settings.templates)
    classifier = text_classifier(settings.teacher, names, sentences, device=subject.device)
    found = extract_share(through_head(subject, label), images)
    union(subject.unreadable)
    if found is None:
        return
    assert found.labels is not None  # the images have classes
    labels = found.labels
    if all(name.isdigit() for name in images.classes):  # numbers count in the list of all names
        labels = torch.tensor([int(name) for name in images.classes])[labels]
    yield from classify(found.summaries, labels, classifier, found.keys, names)


def classify(
    summaries: Float[Tensor, "n D"],
    labels: Int[Tensor, " n"],
    classifier: Float[Tensor, "classes D"],
    keys: Sequence[str],
    names: Sequence[str],
) -> Iterator[Found]:
    """Classify image embeddings by the classes' embeddings; yield accuracies in per cent.

    Raises:
        ValueError: there is no label, a label has no class, or an embedding is not finite.
    """
    if not len(labels) or int(labels.min()) < 0 or int(labels.max()) >= len(classifier):
        raise ValueError(
            f"There are {len(classifier)} classes, and labels outside of them or none."
        )
    if not summaries.isfinite().all():
        raise ValueError("An image's embedding holds NaN or infinity.")
    scores = F.normalize(summaries.float(), dim=-1) @ classifier.to(summaries.device).float().T
    ranked = scores.topk(min(5, len(classifier)), dim=-1).indices
    hits = (ranked == labels.to(ranked.device)[:, None]).cpu().numpy()
    first, truth = hits[:, 0].astype(float), labels.cpu().numpy()
    yield "zeroshot/top1", Scores(keys, first)
    yield "zeroshot/top5", Scores(keys, hits.any(axis=1).astype(float))
    member = truth[:, None] == np.arange(len(classifier))
    yield "zeroshot/mean_per_class", Scores(keys, first[:, None] * member, member.astype(float))
    for i, name in enumerate(names):
        if member[:, i].any():
            yield f"zeroshot/class/{name}", 100 * float(first[member[:, i]].mean())


def head_for(subject: Subject, teacher: str, head: str, what: str) -> str:
    """Return the label of the student's head for a teacher.

    Args:
        what: The benchmark's name, for the options in messages.

    Raises:
        ValueError: no teacher is named, or there is no such head.
    """
    if not teacher:
        raise ValueError(
            f"Name the teacher whose text tower is used: --{what}.teacher "
            "open_clip:ViT-B-32/laion2b_s34b_b79k, or another from which the student learnt."
        )
    label = head or TeacherName.parse(teacher).label
    heads = subject.student.heads
    if label not in heads:
        known = f"it has {', '.join(heads)}" if len(heads) else "it has none"
        raise ValueError(
            f"{subject.name} has no head {label!r}; {known}. Name one with --{what}.head, or give "
            "an exported student that learnt from this teacher."
        )
    return label


def through_head(subject: Subject, label: str) -> Callable[[Batch], Features]:
    """Return a function from a batch to the features of one head.

    Raises:
        ValueError: the head has no summary; raised when the function is called.
    """

    @torch.no_grad()
    def features(batch: Batch) -> Features:
        with subject.autocast():
            out = subject.student(batch)[label]
        if out.summary is None:
            raise ValueError(
                f"The head {label!r} of {subject.name} returns no summary to compare with texts."
            )
        return Features(out.summary, None)

    return features


def check_width(subject: Subject, label: str, width: int, teacher: str) -> None:
    """Raise a ValueError if a head's summary is not as wide as a teacher's text embeddings."""
    size = subject.student.size
    black = Batch(torch.zeros(1, 3, *size, device=subject.device))
    summary = through_head(subject, label)(black).summary
    assert summary is not None
    if summary.shape[-1] != width:
        raise ValueError(
            f"The head {label!r} of {subject.name} has {summary.shape[-1]} channels and the text "
            f"tower of {teacher} {width}: the head learnt from another teacher."
        )


def prompts(kind: Literal["openai", "simple", "plain"]) -> tuple[str, ...]:
    """Return the sentences, with `{}` in the place of the class name."""
    if kind == "plain":
        return PLAIN
    import open_clip

    full = kind == "openai"
    made = open_clip.OPENAI_IMAGENET_TEMPLATES if full else open_clip.SIMPLE_IMAGENET_TEMPLATES
    return tuple(template("{}") for template in made)


def class_names(classes: Sequence[str], data: Path) -> list[str]:
    """Return the names of the classes of a data set, in the order of their labels.

    Raises:
        ValueError: `classes.json` names another number of classes, a wnid is unknown, or the
            classes are only numbers.
    """
    file = data / "classes.json"
    if file.is_file():
        names = read_json(file, list[str])
        # a shard has the numbers of its images alone, which can be fewer than the names
        numbered = all(name.isdigit() for name in classes)
        needed = 1 + max(map(int, classes), default=-1) if numbered else len(classes)
        if len(names) < needed or (len(names) > needed and not numbered):
            raise ValueError(f"{file} names {len(names)} classes, and the data has {needed}.")
        classes = names
    if all(WNID.fullmatch(name) for name in classes):
        return _imagenet_names(classes)
    if all(name.isdigit() for name in classes):
        raise ValueError(
            f"The classes of {data} are numbers; write a list of their names to {file}."
        )
    return [name.replace("_", " ") for name in classes]


def _imagenet_names(wnids: Sequence[str]) -> list[str]:
    import open_clip
    from timm.data.imagenet_info import ImageNetInfo

    known = dict(zip(ImageNetInfo().label_names(), open_clip.IMAGENET_CLASSNAMES, strict=True))
    unknown = [wnid for wnid in wnids if wnid not in known]
    if unknown:
        raise ValueError(
            f"{len(unknown)} of {len(wnids)} classes are not in ImageNet-1k, {unknown[0]} first; "
            "name them in classes.json."
        )
    return [known[wnid] for wnid in wnids]
