"""Semantic segmentation: a linear layer on the last map, or UPerNet on four of them."""

import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer, UInt8
from rich.progress import track
from torch import Tensor, nn

from zoo.data import crops
from zoo.eval.dense.mean_iou import Confusion
from zoo.eval.dense.segment_data import IGNORE, SegmentSet, open_segments
from zoo.eval.dense.training import train_head
from zoo.eval.dense.upernet import BackbonePyramid, UPerNet
from zoo.eval.dense.windows import at_size, sliding, stride_of, with_stride
from zoo.eval.examples import Example, chosen
from zoo.eval.extremes import Extremes, with_legend
from zoo.eval.registry import Found, Picture, Subject
from zoo.eval.settings import SegmentSettings
from zoo.features import Batch, Features, at_grid
from zoo.train.state import TrainState
from zoo.train.task import Loss, Task


class LinearHead(nn.Module):
    """Batch norm and one linear layer: [B h w C] -> [B h w classes]."""

    def __init__(self, width: int, classes: int):
        super().__init__()
        self.norm, self.classifier = nn.BatchNorm1d(width), nn.Linear(width, classes)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Float[Tensor, "B h w C"]) -> Float[Tensor, "B h w K"]:
        return self.classifier(self.norm(x.float().flatten(0, 2))).unflatten(0, x.shape[:3])


class Segmenter(nn.Module):
    """A batch -> logits [B h w classes], on the grid of the head.

    Args:
        feature_maps: Returns the input of the head: a map, or several.
        tuned: The module that is trained beside the head; `None` if `feature_maps` is frozen.
    """

    def __init__(
        self, feature_maps: Callable[[Batch], object], head: nn.Module, tuned: nn.Module | None
    ):
        super().__init__()
        self.feature_maps, self.head, self.tuned = feature_maps, head, tuned

    def forward(self, batch: Batch) -> Float[Tensor, "B h w K"]:
        return self.head(self.feature_maps(batch))


def segment(subject: Subject, data: Path, settings: SegmentSettings) -> Iterator[Found]:
    """Train a segmentation head on a model's features; yield mIoU and accuracies, in per cent.

    The linear protocol of DINOv2 (2304.07193 §7.4) and AM-RADIO (2312.06709): crops of 512 px
    at 0.5 to 2 times the image's size, AdamW with a rate that falls linearly, and sliding windows
    for the measurement. There is no colour jitter, and UPerNet has no auxiliary head here.

    Raises:
        ValueError: the data does not fit (see `open_segments`), or the model cannot process crops
            of that size.
    """
    train, val = open_segments(data, settings.layout, subject.unreadable)
    segmenter = build_segmenter(subject, len(train.classes), settings)
    fit_segmenter(segmenter, train, subject, settings)
    yield from measure_segmenter(segmenter, val, subject, settings)


def used(subject: Subject, data: Sequence[Path], settings: SegmentSettings) -> SegmentSettings:
    """Return the settings with the stride that is used.

    Raises:
        ValueError: a folder does not fit, or the backbone cannot process such windows.
    """
    for folder in data:
        open_segments(folder, settings.layout)
    return with_stride(subject, settings)


def build_segmenter(subject: Subject, classes: int, settings: SegmentSettings) -> Segmenter:
    """Put a new head on the subject's network; its weights follow from the subject's seed.

    Raises:
        ValueError: the network cannot process crops of that size.
    """
    student = at_size(subject.student, settings.crop, "--segment.crop")
    black = Batch(torch.zeros(1, 3, settings.crop, settings.crop, device=subject.device))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(subject.seed)
        if settings.head == "linear":
            linear = frozen_features(student.features, subject)
            head: nn.Module = LinearHead(linear(black).shape[-1], classes)
            return Segmenter(linear, head.to(subject.device), None)
        if settings.backbone_lr:
            student = copy.deepcopy(student)
            student.backbone.requires_grad_(True)
        pyramid = BackbonePyramid(student.backbone, student.mean, student.std)
        with torch.no_grad():
            widths = [level.shape[1] for level in pyramid(black)]
        head = UPerNet(widths, classes, hidden=settings.hidden).to(subject.device)
    if settings.backbone_lr:
        return Segmenter(
            lambda batch: _pyramid_maps(pyramid, batch, subject), head, student.backbone
        )
    return Segmenter(torch.no_grad()(lambda b: _pyramid_maps(pyramid, b, subject)), head, None)


def frozen_features(
    features: Callable[[Batch], Features], subject: Subject
) -> Callable[[Batch], Tensor]:
    """Return a function from a batch to a frozen network's last map."""

    @torch.no_grad()
    def last_map(batch: Batch) -> Float[Tensor, "B h w C"]:
        with subject.autocast():
            spatial = features(batch).spatial
        assert spatial is not None  # `at_size` has checked it
        return spatial

    return last_map


def _pyramid_maps(pyramid: BackbonePyramid, batch: Batch, subject: Subject) -> list[Tensor]:
    with subject.autocast():
        return pyramid(batch)


def fit_segmenter(
    segmenter: Segmenter, train: SegmentSet, subject: Subject, settings: SegmentSettings
) -> None:
    """Train the head, and the backbone at its own rate if it is tuned."""
    crop = crops.CropSpec(side=settings.crop)
    groups: list[dict[str, Any]] = [dict(params=list(segmenter.head.parameters()))]
    if segmenter.tuned is not None:
        scale = settings.backbone_lr / settings.lr
        groups.append(dict(params=list(segmenter.tuned.parameters()), scale=scale))
    train_head(segmenter, SegmentTask(), train, crop, subject, settings, groups)


class SegmentTask(Task):
    """The mean cross-entropy over the scored pixels of a batch, counted once per image."""

    def losses(
        self, state: TrainState, batch: crops.CropBatch, targets: None, step: int
    ) -> dict[str, Loss]:
        mean = pixel_loss(state.model(batch.images), batch.target)
        return {"cross_entropy": Loss.of_mean(mean, len(batch.target))}


def pixel_loss(
    logits: Float[Tensor, "B h w K"], target: UInt8[Tensor, "B H W"]
) -> Float[Tensor, ""]:
    """Return the mean cross-entropy over the scored pixels; 0 if there are none.

    The logits are enlarged to the pixels by `at_grid`, whose gradient is deterministic.
    """
    height, width = target.shape[-2:]
    large = at_grid(logits.float(), (height, width))
    total = F.cross_entropy(
        large.permute(0, 3, 1, 2), target.long(), ignore_index=IGNORE, reduction="sum"
    )
    return total / (target != IGNORE).sum().clamp(min=1)


def measure_segmenter(
    segmenter: Segmenter, val: SegmentSet, subject: Subject, settings: SegmentSettings
) -> Iterator[Found]:
    """Yield mIoU, accuracies and the IoU of every class, then the worst and the best images."""
    confusion = Confusion(val.classes, ignore=IGNORE)
    palette = colours(len(val.classes))
    shown = Extremes(settings.pictures, "accuracy of pixels")
    shared, shown_beside = set(chosen(len(val))), list[Example]()

    @torch.no_grad()
    def answer(batch: Batch) -> Float[Tensor, "n K s s"]:
        logits = segmenter(batch).float()
        return at_grid(logits, (settings.crop, settings.crop)).permute(0, 3, 1, 2)

    loading = crops.loading(subject.device, settings.workers)
    images = crops.whole_images(val, unreadable=subject.unreadable, **loading)
    for index, pixels, target in track(images, "measure", total=len(val), transient=True):
        image = pixels.to(subject.device, non_blocking=True).float() / 255
        how = dict(side=settings.crop, stride=stride_of(settings), batch=settings.batch)
        guess = sliding(answer, image, **how).argmax(dim=1)
        confusion.add(target.to(subject.device), guess, val.key(index))
        if settings.pictures:
            truth, found, key = target[0], guess[0].cpu(), val.key(index)

            def draw(pixels=pixels, truth=truth, found=found, key=key) -> Picture:
                drawn = panel(pixels[0], truth, found, palette, val.classes)
                return Picture(drawn, f"{Path(key).name}: image, truth, prediction")

            scored = truth != IGNORE
            right = (truth == found)[scored].double().mean().item()
            shown.offer(100 * right, f"segment/{index:03d}", draw)
            if index in shared:
                score = f"{100 * right:.1f} % of pixels"
                example = example_of(pixels[0], truth, found, palette, val.classes)
                shown_beside.append(example._replace(key=Path(key).name, score=score))
    yield from confusion.values("segment")
    yield from shown.found()
    yield from (("segment/example", one) for one in shown_beside)


def colours(count: int) -> UInt8[np.ndarray, "count 3"]:
    """Return a colour for each class, far from those of the neighbouring classes."""
    import colorsys

    golden = 0.618033988749895
    found = [
        colorsys.hsv_to_rgb(
            i * golden % 1, (0.85, 0.55, 0.7)[i % 3], (0.95, 0.75, 0.55)[i // 3 % 3]
        )
        for i in range(count)
    ]
    return (np.array(found) * 255).round().astype(np.uint8)


def panel(
    pixels: UInt8[Tensor, "3 H W"],
    truth: Integer[Tensor, "H W"],
    guess: Integer[Tensor, "H W"],
    palette: UInt8[np.ndarray, "K 3"],
    classes: Sequence[str] = (),
) -> UInt8[np.ndarray, "G W3 3"]:
    """Draw image, truth and prediction side by side, above the colours of the classes in them.

    Pixels that are not scored are black in the truth; the prediction is shown there too.
    """
    one = example_of(pixels, truth, guess, palette, classes)
    drawn = np.concatenate([one.image, np.asarray(one.truth), np.asarray(one.prediction)], axis=1)
    return with_legend(drawn, one.legend)


def example_of(
    pixels: UInt8[Tensor, "3 H W"],
    truth: Integer[Tensor, "H W"],
    guess: Integer[Tensor, "H W"],
    palette: UInt8[np.ndarray, "K 3"],
    classes: Sequence[str],
) -> Example:
    """Paint truth and prediction over the image, and name the colours that are in them.

    Pixels that are not scored are black in the truth; the prediction is shown there too.
    """
    image = pixels.permute(1, 2, 0).numpy()
    truths, guesses = (
        (0.35 * image + 0.65 * palette[mask.numpy().clip(0, len(palette) - 1)])
        .round()
        .astype(np.uint8)
        for mask in (truth, guess)
    )
    truths[(truth == IGNORE).numpy()] = 0
    there: list[int] = sorted({*truth.unique().tolist(), *guess.unique().tolist()} - {IGNORE})
    entries = [(str(classes[i]), palette[i].tolist()) for i in there if i < len(classes)]
    if classes and bool((truth == IGNORE).any()):
        entries.append(("not scored", [0, 0, 0]))
    return Example("", image, truths, guesses, legend=entries)
