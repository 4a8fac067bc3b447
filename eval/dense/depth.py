"""Depth estimation by a linear layer on frozen features."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from zoo.data import crops
from zoo.data.images import EncodedImage, UnreadableImage, read_rgb
from zoo.data.sources import SPLITS
from zoo.data.walk import is_image
from zoo.eval.dense.segment import LinearHead, Segmenter, frozen_features
from zoo.eval.dense.training import train_head
from zoo.eval.dense.windows import at_size, sliding, stride_of, with_stride
from zoo.eval.examples import Example, chosen
from zoo.eval.registry import Found, Picture, Scores, Subject
from zoo.eval.settings import FLOOR, DepthSettings
from zoo.features import Batch, at_grid
from zoo.files import read_arrays
from zoo.train.state import TrainState
from zoo.train.task import Loss, Task

BINS = 256
LOOKED_AT = 20
"""Number of depths that are checked before any work, evenly spread over a larger set."""
UNKNOWN = 0.0
"""The depth of pixels that are not scored."""


@dataclass(frozen=True)
class DepthSet:
    """Images with depths in metres; `UNKNOWN` where there is none or it is beyond the limits."""

    pairs: tuple[tuple[Path, Path], ...]
    scale: float
    max_depth: float

    def __len__(self) -> int:
        return len(self.pairs)

    def key(self, index: int) -> str:
        return str(self.pairs[index][0])

    def image(self, index: int) -> Image.Image:
        return read_rgb(self.pairs[index][0], upright=False)

    def target(self, index: int) -> Float[np.ndarray, "H W"]:
        file = self.pairs[index][1]
        if file.suffix == ".npy":
            try:
                raw = read_arrays(file).get("", np.empty(0))
            except ValueError as error:
                raise UnreadableImage(str(error)) from error
            if raw.ndim != 2 or raw.dtype.kind not in "fiu":
                raise ValueError(f"The depth {file} is {raw.dtype} {raw.shape}, not [H W] numbers.")
            metres = raw.astype(np.float32)
        else:
            image = EncodedImage(file, upright=False).raw()
            if image.mode != "L" and not image.mode.startswith("I"):
                raise ValueError(f"The depth {file} has the mode {image.mode}, not 16 bits.")
            metres = np.asarray(image).astype(np.float32) * self.scale
        good = np.isfinite(metres) & (metres >= FLOOR) & (metres <= self.max_depth)
        return np.where(good, metres, UNKNOWN).astype(np.float32)


def open_depths(
    path: Path, settings: DepthSettings, unreadable: set[str] | None = None
) -> tuple[DepthSet, DepthSet]:
    """Open the training and the validation part: `images/train` and `depth/train`, and so for val.

    Depths are images of 16 bits, or `.npy` files in metres.

    Args:
        unreadable: Takes the names of the images that could not be checked; see `readable`.

    Raises:
        ValueError: a folder is missing, an image has no depth, a depth has another size than its
            image, or none of its pixels is within the limits.
    """
    parts = []
    for names in SPLITS.values():
        found = [
            n for n in names if (path / "images" / n).is_dir() and (path / "depth" / n).is_dir()
        ]
        if not found:
            raise ValueError(f"{path} has no images/{names[0]} beside depth/{names[0]}.")
        images = path / "images" / found[0]
        known = {p.stem: p for p in (path / "depth" / found[0]).iterdir()}
        files = sorted(p for p in images.iterdir() if is_image(p.name) and p.is_file())
        lost = [str(file) for file in files if file.stem not in known]
        if lost or not files:
            first = f", {lost[0]} first" if lost else ""
            raise ValueError(
                f"{len(lost)} of {len(files)} images of {images} have no depth{first}."
            )
        part = DepthSet(
            tuple((f, known[f.stem]) for f in files), settings.scale, settings.max_depth
        )
        for index, depth, size in crops.some_pairs(part, LOOKED_AT, unreadable):
            if depth.shape[::-1] != size or not depth.any():
                raise ValueError(
                    f"The depth of {part.key(index)} has {depth.shape[::-1]} pixels (the image "
                    f"{size}), {(depth > 0).sum()} of them up to {settings.max_depth:g} m. Both "
                    "sizes must agree; see also --depth.scale and --depth.max-depth."
                )
        parts.append(part)
    return parts[0], parts[1]


def depth(subject: Subject, data: Path, settings: DepthSettings) -> Iterator[Found]:
    """Train a linear depth head on a frozen map; yield δ1 in per cent, RMSE in metres, and AbsRel.

    The linear probe of DINOv2 (2304.07193 §7.4): the layer scores 256 equal bins, the depth is the
    mean of their centres weighted by max(score, 0) + 0.1, and the loss is scale-invariant,

        sqrt(var g + 0.15 · (mean g)²),    g = log ours − log theirs

    over the known pixels. An error is a mean over the pixels of an image; the results are means
    over the images.

    Raises:
        ValueError: the data does not fit (see `open_depths`), or the model cannot process crops of
            that size.
    """
    train, val = open_depths(data, settings, subject.unreadable)
    student = at_size(subject.student, settings.crop, "--depth.crop")
    feature_maps = frozen_features(student.features, subject)
    black = Batch(torch.zeros(1, 3, settings.crop, settings.crop, device=subject.device))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(subject.seed)
        head = LinearHead(feature_maps(black).shape[-1], BINS).to(subject.device)
    model = Segmenter(feature_maps, head, None)
    task = DepthTask(settings)
    crop = crops.CropSpec(side=settings.crop, scale=(1.0, 1.5), fill=1.0, nothing=UNKNOWN)
    groups = [dict(params=list(head.parameters()))]
    train_head(model, task, train, crop, subject, settings, groups)
    answer = torch.no_grad()(partial(task.metres, model))
    yield from _measured(answer, val, subject, settings)


def used(subject: Subject, data: Sequence[Path], settings: DepthSettings) -> DepthSettings:
    """Return the settings with the stride that is used.

    Raises:
        ValueError: a folder does not fit, or the backbone cannot process such windows.
    """
    for folder in data:
        open_depths(folder, settings)
    return with_stride(subject, settings)


class DepthTask(Task):
    """The scale-invariant loss of a batch, counted once per image."""

    def __init__(self, settings: DepthSettings):
        self.max_depth, self.size = settings.max_depth, (settings.crop, settings.crop)

    def metres(self, model: nn.Module, batch: Batch) -> Float[Tensor, "n 1 s s"]:
        """Return the depth of every pixel, in metres."""
        return at_grid(to_depth(model(batch), self.max_depth), self.size).permute(0, 3, 1, 2)

    def losses(
        self, state: TrainState, batch: crops.CropBatch, targets: None, step: int
    ) -> dict[str, Loss]:
        mean = scale_invariant(self.metres(state.model, batch.images)[:, 0], batch.target)
        return {"scale_invariant": Loss.of_mean(mean, len(batch.target))}


def to_depth(scores: Float[Tensor, "B h w bins"], max_depth: float) -> Float[Tensor, "B h w 1"]:
    """Turn the scores of equal bins between `FLOOR` and `max_depth` into metres."""
    edges = torch.linspace(FLOOR, max_depth, scores.shape[-1] + 1, device=scores.device)
    weight = scores.float().relu() + 0.1
    middles = (edges[1:] + edges[:-1]) / 2
    return ((weight @ middles) / weight.sum(dim=-1))[..., None]


def scale_invariant(
    ours: Float[Tensor, "B H W"], theirs: Float[Tensor, "B H W"]
) -> Float[Tensor, ""]:
    """Return the loss described in `depth`; pixels of unknown depth do not count."""
    known = theirs > UNKNOWN
    count = known.sum().clamp(min=1)
    gap = ours.clamp(min=FLOOR).log() - torch.where(known, theirs, 1.0).log()
    gap = torch.where(known, gap, 0.0)
    mean = gap.sum() / count
    variance = (torch.where(known, gap - mean, 0.0).square()).sum() / count
    return (variance + 0.15 * mean.square() + 1e-12).sqrt()


def depth_errors(
    ours: Float[Tensor, "H W"], theirs: Float[Tensor, "H W"]
) -> tuple[float, float, float]:
    """Return δ1 (a share), RMSE (metres) and AbsRel of one image over its known pixels."""
    known = theirs > UNKNOWN
    ours, theirs = ours[known].clamp(min=FLOOR), theirs[known]
    ratio = torch.maximum(ours / theirs, theirs / ours)
    error = ours - theirs
    found = (
        (ratio < 1.25).float().mean(),
        error.square().mean().sqrt(),
        (error.abs() / theirs).mean(),
    )
    return found[0].item(), found[1].item(), found[2].item()


def _measured(
    answer: Callable[[Batch], Tensor], val: DepthSet, subject: Subject, settings: DepthSettings
) -> Iterator[Found]:
    keys, rows, shown = [], [], []
    shared, beside = set(chosen(len(val))), list[Example]()
    loading = crops.loading(subject.device, settings.workers)
    for index, pixels, target in crops.whole_images(val, unreadable=subject.unreadable, **loading):
        if not (target > UNKNOWN).any():
            continue
        image = pixels.to(subject.device).float() / 255
        how = dict(side=settings.crop, stride=stride_of(settings), batch=settings.batch)
        guess = sliding(answer, image, **how)[0, 0]
        rows.append(depth_errors(guess, target[0].to(guess.device)))
        keys.append(val.key(index))
        if settings.pictures and index in shared:
            beside.append(
                _example(Path(keys[-1]).name, pixels[0], target[0], guess.cpu(), settings, rows[-1])
            )
        if len(shown) < settings.pictures:
            both = torch.cat([target[0], guess.cpu()], dim=1) / settings.max_depth
            grey = (both.clamp(0, 1) * 255).byte()[..., None].expand(-1, -1, 3).numpy()
            drawn = np.concatenate([pixels[0].permute(1, 2, 0).numpy(), grey], axis=1)
            caption = f"{Path(keys[-1]).name}: image, depth, prediction"
            shown.append((f"depth/{index:03d}", Picture(drawn, caption)))
    errors = np.array(rows, np.float64)
    yield "depth/delta1", Scores(keys, errors[:, 0])
    yield "depth/rmse", float(errors[:, 1].mean())
    yield "depth/abs_rel", float(errors[:, 2].mean())
    yield from shown
    yield from (("depth/example", one) for one in beside)


UNKNOWN_COLOUR = (140, 30, 30)


def _example(
    key: str, pixels: Tensor, truth: Tensor, guess: Tensor, settings: DepthSettings,
    errors: tuple[float, float, float],
) -> Example:  # fmt: skip
    """Draw truth and prediction from black (near) to white; what is not scored is red."""
    drawn = []
    for metres in (truth, guess):
        grey = (metres / settings.max_depth).clamp(0, 1) * 255
        drawn.append(grey.byte()[..., None].expand(-1, -1, 3).numpy().copy())
    drawn[0][(truth <= UNKNOWN).numpy()] = UNKNOWN_COLOUR
    far = settings.max_depth
    greys = [(f"{far * share:g} m", [round(255 * share)] * 3) for share in (0, 0.5, 1)]
    legend = [*greys, ("not known", UNKNOWN_COLOUR)]
    score = f"δ1 {100 * errors[0]:.1f} %, RMSE {errors[1]:.2f} m"
    image = pixels.permute(1, 2, 0).numpy()
    return Example(key, image, drawn[0], drawn[1], score, legend=legend)
