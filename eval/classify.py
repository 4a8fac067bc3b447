"""A classifier's own head on labelled images: the number that papers and timm's tables publish."""

import itertools
import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from zoo import wheels
from zoo.data.images import EncodedImage
from zoo.data.sources import Source, open_whole
from zoo.data.unreadable import Lost, note_lost, try_read
from zoo.eval.calibration import calibration_error
from zoo.eval.confusion import balanced, confusion, drawn
from zoo.eval.corruptions import corrupt
from zoo.eval.examples import Example, chosen
from zoo.eval.registry import Found, Picture, Scores, Subject
from zoo.eval.settings import ClassifySettings
from zoo.files import read_json
from zoo.train.mesh import gathered_on_first, share, union

WNID = re.compile(r"n\d{8}")
IMAGENET = 1000
SUBSETS = ("imagenet-a", "imagenet-r")
"""Sets of 200 of ImageNet's classes, among which alone a model chooses."""


class Classified(NamedTuple):
    """What a model answers for images, in the order of the files."""

    logits: Float[Tensor, "n K"]
    """Over the classes among which the model may choose."""
    truths: list[tuple[int, ...]]
    """The right columns of each image; several where any of them counts."""
    keys: list[str]
    classes: list[int]
    """The class of each image in the data, over which means are taken; with `real`, which has no
    such classes, the first of its right columns."""


def classify(subject: Subject, data: Path, settings: ClassifySettings) -> Iterator[Found]:
    """Yield top-1, top-5, the mean over classes and the calibration error, in per cent.

    Images are decoded and transformed as `timm.data.create_loader(**resolve_data_config(...))`
    does: its crop, interpolation, mean and standard deviation, and pixels as they are stored (no
    EXIF orientation). Sets with ImageNet's classes are known by their folders (wnids, or numbers as
    in ImageNet-V2); for ImageNet-A and -R a model chooses among their 200 classes (1907.07174,
    2006.16241). With `real`, labels are those of "Are we done with ImageNet?" (2006.07159): any of
    an image's labels is right, and images without one are left out.

    Raises:
        ValueError: the model has no classifier, or its classes are not those of the images.
    """
    model, transform = open_classifier(subject, settings)
    source = open_whole(data)
    columns, right = labels_of(source, data, model, settings)
    answers = answer(subject, model, transform, source, right, columns)
    if answers is not None:
        if not answers.keys:
            raise ValueError(f"No image of {data} can be read, or none has a class of the model.")
        yield from scores(answers, bins=settings.bins)
        yield from examples(answers, source, right)
        if settings.confusion:
            yield "classify/confusion", _confused(answers, right, list(source.classes))
    tops = []
    for name, severity in itertools.product(settings.corruptions, settings.severities):
        damaged = Corrupted(transform, name, severity, subject.seed)
        found = answer(subject, model, damaged, source, right, columns)
        if found is not None:
            first = _hits(found)[:, 0].astype(float)
            tops.append(100 * first.mean())
            yield f"classify/{name}/{severity}", Scores(found.keys, first)
    if tops:
        yield "classify/corrupted", float(np.mean(tops))


def used(subject: Subject, data: Sequence[Path], settings: ClassifySettings) -> ClassifySettings:
    """Return the settings with the layout that is used.

    Raises:
        ValueError: the model has no classifier, or its classes are not those of the images.
    """
    with torch.device("meta"):
        model = _classifier(subject.name, pretrained=False, side=subject.student.size[0])
    if settings.confusion and settings.layout == "real":
        raise ValueError("Images with several right labels have no confusion matrix.")
    for folder in data:
        source = open_whole(folder)
        labels_of(source, folder, model, settings)
        if len(data) == 1:
            settings = replace(settings, layout=layout_of(source, folder, settings))
    return settings


# ---------------------------------------------------------------- the model


def open_classifier(subject: Subject, settings: ClassifySettings) -> tuple[nn.Module, Any]:
    """Build a registered model with its classifier; return it and timm's transform for it.

    A name without a tag has random weights, which follow from the subject's seed.
    """
    from timm.data.config import resolve_data_config
    from timm.data.transforms_factory import create_transform

    side = subject.student.size[0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(subject.seed)
        model = _classifier(subject.name, pretrained="." in subject.name, side=side)
    given: dict[str, Any] = dict(input_size=(3, side, side))
    if settings.crop_pct:
        given["crop_pct"] = settings.crop_pct
    config = resolve_data_config(given, model=model)
    known = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
    transform = create_transform(**{k: config[k] for k in known if k in config}, is_training=False)
    return model.to(subject.device).eval(), transform


def _classifier(name: str, *, pretrained: bool, side: int) -> Any:
    """Build a registered model with its classifier, for images of `side` pixels."""
    model: Any = None if Path(name).is_dir() else wheels.create_model(name, pretrained)
    if not getattr(model, "num_classes", 0):
        raise ValueError(
            f"{name} has no classifier of its own, which classify measures; its features are "
            "measured by knn and linear."
        )
    own = (getattr(model, "pretrained_cfg", None) or {}).get("input_size", (3, 0, 0))[-1]
    if side != own and hasattr(model, "set_input_size"):
        model.set_input_size(img_size=(side, side))
    return model


# ---------------------------------------------------------------- the classes


def labels_of(
    source: Source, data: Path, model: Any, settings: ClassifySettings
) -> tuple[list[int] | None, Mapping[int, tuple[int, ...]] | list[tuple[int, ...]]]:
    """Return the outputs among which the model chooses, and which of them are right.

    The first is `None` for all outputs. The second is by class of the source, or by image for
    `real`. Outputs are counted among the chosen ones.

    Raises:
        ValueError: the images have no classes, or they cannot be matched with the model's.
    """
    if settings.layout == "real":
        return None, _real(source, data)
    if not source.classes:
        raise ValueError(f"{data} has no classes: one sub-folder a class, or .cls in the shards.")
    right = matched(source.classes, data, model, settings)
    layout = layout_of(source, data, settings)
    if layout not in SUBSETS:
        return None, right
    outputs = sorted({one for many in right.values() for one in many})
    place = {output: column for column, output in enumerate(outputs)}
    return outputs, {c: tuple(place[one] for one in many) for c, many in right.items()}


def layout_of(source: Source, data: Path, settings: ClassifySettings) -> str:
    """Return `imagenet`, `imagenet-v2`, `imagenet-a`, `imagenet-r`, `real` or `own`."""
    if settings.layout != "auto":
        return settings.layout
    if settings.names is not None:
        return "own"
    classes = set(source.classes)
    for name in SUBSETS:
        if classes == set(_listed(name.replace("-", "_"))):
            return name
    if classes and all(map(WNID.fullmatch, classes)):
        return "imagenet"
    numbers = len(classes) == IMAGENET and all(name.isdecimal() for name in classes)
    return "imagenet-v2" if numbers else "own"


def _listed(name: str) -> list[str]:
    """Return the wnids of one of timm's lists."""
    from timm.data.imagenet_info import ImageNetInfo

    if name == "imagenet":
        return ImageNetInfo().label_names()
    import pkgutil

    text = pkgutil.get_data("timm", f"data/_info/{name}_synsets.txt")
    return text.decode().split() if text else []


def matched(
    classes: Sequence[str], data: Path, model: Any, settings: ClassifySettings
) -> dict[int, tuple[int, ...]]:
    """Return the outputs of the model that are right for each class of the images.

    By `names` if it is given; by the model's own label names; by wnids; by numbers; in the order of
    the names if there are as many as outputs.

    Raises:
        ValueError: none of these fits.
    """
    count = model.num_classes
    if settings.names is not None:
        return _by_names(classes, settings.names, count)
    own = (getattr(model, "pretrained_cfg", None) or {}).get("label_names")
    if own and set(classes) <= set(own):
        return {i: (own.index(name),) for i, name in enumerate(classes)}
    if all(map(WNID.fullmatch, classes)) and count == IMAGENET:
        known = {wnid: i for i, wnid in enumerate(_listed("imagenet"))}
        unknown = [name for name in classes if name not in known]
        if unknown:
            raise ValueError(
                f"{len(unknown)} of {len(classes)} classes of {data} are not in ImageNet-1k, "
                f"{unknown[0]} first; say which outputs they are with --classify.names."
            )
        return {i: (known[name],) for i, name in enumerate(classes)}
    if all(name.isdecimal() and int(name) < count for name in classes):
        return {i: (int(name),) for i, name in enumerate(classes)}
    if len(classes) == count:
        return {i: (i,) for i in range(count)}
    raise ValueError(
        f"{data} has {len(classes)} classes ({', '.join(classes[:3])}, ...) and the model {count} "
        'outputs. Say which are which with --classify.names FILE.json: {"tabby": 281, ...}.'
    )


def _by_names(classes: Sequence[str], file: Path, count: int) -> dict[int, tuple[int, ...]]:
    """Read class -> output, or several; classes that the file lacks are not scored."""
    content = read_json(file, dict[str, Any])
    found = {}
    for i, name in enumerate(classes):
        if name in content:
            many = content[name] if isinstance(content[name], list) else [content[name]]
            if not all(isinstance(one, int) and 0 <= one < count for one in many):
                raise ValueError(f"{file}: the outputs of {name} must be numbers below {count}.")
            found[i] = tuple(many)
    if not found:
        raise ValueError(f"{file} names none of the {len(classes)} classes of the images.")
    return found


def _real(source: Source, data: Path) -> list[tuple[int, ...]]:
    """Return the reassessed labels of ImageNet's validation images, by image."""
    import pkgutil

    text = pkgutil.get_data("timm", "data/_info/imagenet_real_labels.json")
    labels = json.loads(text or "[]")
    found = []
    for index in range(len(source)):
        number = re.search(r"ILSVRC2012_val_(\d{8})", source.key(index))
        if number is None or not 1 <= int(number[1]) <= len(labels):
            raise ValueError(
                f"{source.key(index)} of {data} is no validation image of ImageNet "
                "(ILSVRC2012_val_00000001.JPEG, ...), and real labels exist for these alone."
            )
        found.append(tuple(labels[int(number[1]) - 1]))
    return found


# ---------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Corrupted:
    """timm's transform with a corruption between the crop and the tensor."""

    transform: Any
    name: str
    severity: int
    seed: int

    def __call__(self, image: Image.Image) -> Tensor:
        steps = list(self.transform.transforms)
        place = next(i for i, step in enumerate(steps) if "ToTensor" in type(step).__name__)
        for step in steps[:place]:
            image = step(image)
        own = zlib.crc32(np.asarray(image).tobytes())  # the same noise whatever the order
        damaged: Any = corrupt(image, self.name, self.severity, self.seed + own)
        for step in steps[place:]:
            damaged = step(damaged)
        return damaged


@dataclass(frozen=True)
class Transformed:
    """The images of a source under timm's transform, or `Lost`."""

    source: Source
    transform: Any
    indices: Sequence[int]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> tuple[int, Tensor | Lost]:
        index = self.indices[place]
        return index, try_read(self.source, index, self._read)

    def _read(self, index: int) -> Tensor:
        encoded = EncodedImage(self.source.read(index), upright=False, name=self.source.key(index))
        return self.transform(encoded.rgb())


def _together(items: list[Any]) -> list[Any]:
    return items


def answer(
    subject: Subject,
    model: nn.Module,
    transform: Any,
    source: Source,
    right: Mapping[int, tuple[int, ...]] | list[tuple[int, ...]],
    columns: list[int] | None,
) -> Classified | None:
    """Run the model over the images that have a right answer; on several ranks each has a share.

    Rank 0 gets all answers, the others `None`.
    """
    truths, classes = {}, {}
    for index in range(len(source)):
        label = source.label(index)
        many = (
            right[index] if isinstance(right, list) else right.get(-1 if label is None else label)
        )
        if many:
            truths[index] = many
            classes[index] = many[0] if isinstance(right, list) or label is None else label
    order = list(truths)
    blocks = [order[i : i + subject.batch] for i in range(0, len(order), subject.batch)]
    first, every = share()
    own = [index for block in blocks[first::every] for index in block]
    loader = DataLoader(
        Transformed(source, transform, own),  # pyright: ignore[reportArgumentType]
        batch_size=subject.batch,
        num_workers=subject.workers,
        collate_fn=_together,
    )
    parts: list[tuple[list[int], Tensor]] = []
    for items in loader:
        lost = [image for _, image in items if isinstance(image, Lost)]
        note_lost(lost, subject.unreadable)
        kept = [(index, image) for index, image in items if not isinstance(image, Lost)]
        if not kept:
            continue
        images = torch.stack([image for _, image in kept]).to(subject.device)
        with torch.inference_mode(), subject.autocast():
            logits = model(images).float().cpu()
        chosen = logits if columns is None else logits[:, columns]
        parts.append(([index for index, _ in kept], chosen))
    union(subject.unreadable)
    everything = gathered_on_first(parts)
    if everything is None:
        return None
    everything = sorted(everything, key=lambda part: part[0][0])
    seen = [index for indices, _ in everything for index in indices]
    logits = torch.cat([part for _, part in everything]) if everything else torch.empty(0, 1)
    keys = [source.key(i) for i in seen]
    return Classified(logits, [truths[i] for i in seen], keys, [classes[i] for i in seen])


def scores(answers: Classified, *, bins: int) -> Iterator[Found]:
    """Yield the accuracies of answers, each with its images, and the calibration error.

    The mean over classes (balanced accuracy) is that over the classes of the data: of two that one
    output of the model stands for (cougar_body and cougar_face), each counts.
    """
    logits, keys = answers.logits, answers.keys
    hits = _hits(answers)
    first = hits[:, 0].astype(float)
    hits_scores = Scores(keys, first)
    yield "classify/top1", hits_scores
    yield "classify/top5", Scores(keys, hits.any(axis=1).astype(float))
    yield "classify/mean_per_class", balanced(hits_scores, np.array(answers.classes))
    sure = logits.softmax(dim=-1).max(dim=-1).values.numpy()
    yield "classify/ece", 100 * calibration_error(sure, first, bins=bins)


def examples(
    answers: Classified,
    source: Source,
    right: Mapping[int, tuple[int, ...]] | list[tuple[int, ...]],
) -> Iterator[Found]:
    """Yield the model on the images that all models are shown on (`zoo.eval.examples`).

    An output that is no class of the images is called by its number.
    """
    names: dict[int, str] = {}
    for label, many in right.items() if isinstance(right, Mapping) else ():
        names |= dict.fromkeys(many, source.classes[label])
    place = {source.key(i): i for i in range(len(source))}
    ordered = sorted(range(len(answers.keys)), key=answers.keys.__getitem__)
    guesses = answers.logits.argmax(dim=-1).tolist()
    for row in (ordered[i] for i in chosen(len(ordered))):
        key, truths, guess = answers.keys[row], answers.truths[row], guesses[row]
        words = [names.get(one, f"output {one}") for one in (truths[0], guess)]
        image = np.asarray(EncodedImage(source.read(place[key]), name=key).rgb())
        yield "classify/example", Example(key, image, *words, right=guess in truths)


def _confused(
    answers: Classified,
    right: Mapping[int, tuple[int, ...]] | list[tuple[int, ...]],
    classes: list[str],
) -> Picture:
    """Draw the confusion of the images' classes; other answers of the model share one column.

    An output that stands for several classes is the image's own class if it is one of them.
    """
    assert not isinstance(right, list)  # `used` refuses several right labels
    rows = {label: i for i, label in enumerate(right)}
    place = {one: rows[label] for label, many in reversed([*right.items()]) for one in many}
    guessed = answers.logits.argmax(dim=-1).tolist()
    truth = np.array([rows[label] for label in answers.classes])
    sides = zip(guessed, answers.truths, truth, strict=True)
    predicted = np.array(
        [row if one in many else place.get(one, len(right)) for one, many, row in sides]
    )
    names = [*(classes[c] for c in right), "(another)"]
    return drawn(confusion(truth, predicted, len(names)), names, "classify")


def _hits(answers: Classified) -> np.ndarray:
    """Return for each image whether its first, second, ... fifth guess is right: [n 5]."""
    count = min(5, answers.logits.shape[1])
    ranked = answers.logits.topk(count, dim=-1).indices.numpy()
    return np.array(
        [np.isin(row, truth) for row, truth in zip(ranked, answers.truths, strict=True)]
    )
