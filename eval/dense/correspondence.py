"""Dense correspondence: find a point of one image in another by its features alone."""

import math
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple, TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from zoo.eval.dense.square import Squares
from zoo.eval.detect.masks import is_coordinate
from zoo.eval.registry import Found, Scores, Subject
from zoo.eval.settings import CorrespondenceSettings
from zoo.features import Batch, at_grid
from zoo.files import checked, read_json


class ImagePair(NamedTuple):
    """Two images and their corresponding points, in pixels as (column, row)."""

    source: Path
    target: Path
    source_points: Float[np.ndarray, "p 2"]
    target_points: Float[np.ndarray, "p 2"]
    source_size: tuple[int, int]
    target_size: tuple[int, int]
    extent: float
    """The larger side of the object in the target, in pixels."""


def correspondence(
    subject: Subject, data: Path, settings: CorrespondenceSettings
) -> Iterator[Found]:
    """Yield the percentage of correct key points (PCK) at each threshold.

    A point's feature is interpolated in the source's map; its match is the cell of the target's map
    with the largest cosine. All points have the same weight.

    Raises:
        ValueError: SPair's files are missing or damaged, there are no images, or the model has no
            spatial map.
    """
    spair = settings.layout == "spair"
    if spair or (settings.layout == "auto" and (data / "PairAnnotation").is_dir()):
        found = _spair(subject, read_spair(data, settings.split), settings)
    else:
        found = _warps(subject, data, settings)
    keys, errors = [], []
    for key, error in found:
        keys.append(key)
        errors.append(error)
    if not keys:
        lost = f" ({len(subject.unreadable)} images cannot be read)" if subject.unreadable else ""
        raise ValueError(f"There are no points to match in {data}{lost}.")
    count = np.array([len(error) for error in errors], np.float64)
    for threshold in settings.thresholds:
        hits = np.array([(error <= threshold).sum() for error in errors], np.float64)
        yield f"correspondence/pck{threshold:g}", Scores(keys, hits, count)


def match(
    source: Float[Tensor, "B h w C"],
    points: Float[Tensor, "B p 2"],
    target: Float[Tensor, "B y x C"],
    *,
    finer: int = 1,
) -> Float[Tensor, "B p 2"]:
    """Match points of one map in another; points are (column, row) as shares of the image."""
    at = (2 * points - 1)[:, :, None]
    features = F.grid_sample(
        source.float().permute(0, 3, 1, 2), at, padding_mode="border", align_corners=False
    )[..., 0]
    rows, cols = target.shape[1] * finer, target.shape[2] * finer
    where = F.normalize(at_grid(target.float(), (rows, cols)), dim=-1).flatten(1, 2)
    best = torch.einsum("bcp,bnc->bpn", F.normalize(features, dim=1), where).argmax(dim=-1)
    return torch.stack([(best % cols + 0.5) / cols, (best // cols + 0.5) / rows], dim=-1)


def draw_warps(count: int, draws: np.random.Generator) -> Float[Tensor, "count 2 3"]:
    """Draw affine warps from a warped image's coordinates in [-1, 1] to those of its source.

    Rotations are up to 30 degrees, scales 0.75 to 1.33, shifts up to 15 % of the side.
    """
    angle = draws.uniform(-math.pi / 6, math.pi / 6, count)
    zoom = np.exp(draws.uniform(-math.log(4 / 3), math.log(4 / 3), count))
    shift = draws.uniform(-0.3, 0.3, (count, 2))
    cos, sin = zoom * np.cos(angle), zoom * np.sin(angle)
    rows = np.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], axis=1)
    return torch.from_numpy(rows.reshape(count, 2, 3)).float()


def warped(
    images: Float[Tensor, "B 3 H W"], warps: Float[Tensor, "B 2 3"], points: Float[Tensor, "p 2"]
) -> tuple[Float[Tensor, "B 3 H W"], Float[Tensor, "B p 2"], Bool[Tensor, "B p"]]:
    """Warp images; return them, where `points` move to, and which of these stay in the image.

    Points are (column, row) as shares of the image.
    """
    grid = F.affine_grid(warps, list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, padding_mode="zeros", align_corners=False)
    inverse = torch.linalg.inv(warps[:, :, :2])
    at = torch.einsum("bij,bpj->bpi", inverse, (2 * points - 1)[None] - warps[:, None, :, 2])
    return moved, (at + 1) / 2, (at.abs() < 0.95).all(dim=-1)


def _warps(
    subject: Subject, data: Path, settings: CorrespondenceSettings
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield for each image its key and the errors of its points, as shares of the side."""
    draws = np.random.default_rng(subject.seed)
    middles = (torch.arange(settings.points) + 0.5) / settings.points
    rows, cols = torch.meshgrid(middles, middles, indexing="ij")
    points = torch.stack([cols, rows], dim=-1).flatten(0, 1).to(subject.device)
    count = 0
    for batch in subject.open(data, "val"):
        images = batch.at(subject.student.size)
        warps = draw_warps(len(images), draws).to(images.device)
        moved, truth, inside = warped(images, warps, points)
        maps = [_map(subject, Batch(some)) for some in (images, moved)]
        queries = points.expand(len(images), -1, -1)
        guess = match(maps[0], queries, maps[1], finer=settings.finer)
        error, kept = (guess - truth).norm(dim=-1).cpu().numpy(), inside.cpu().numpy()
        for i in range(len(images)):
            key = str(batch.keys[i]) if batch.keys else str(count)
            count += 1
            if kept[i].any():
                yield key, error[i][kept[i]]


def _map(subject: Subject, batch: Batch) -> Float[Tensor, "B h w C"]:
    spatial = subject.features(batch).spatial
    if spatial is None:
        raise ValueError(f"{subject.name} has no spatial map, on which points are matched.")
    return spatial


def _spair(
    subject: Subject, pairs: list[ImagePair], settings: CorrespondenceSettings
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield for each pair its key and the errors of its points, as shares of the extent."""
    files = list(dict.fromkeys(file for pair in pairs for file in (pair.source, pair.target)))
    side = max(subject.student.size)
    maps: dict[Path, Tensor] = {}  # 16 bits and on the CPU: there are thousands
    for batch in Squares(
        files, side, subject.batch, subject.device, whole=True, unreadable=subject.unreadable
    ):
        for position, spatial in zip(
            batch.positions, _map(subject, batch).half().cpu(), strict=True
        ):
            maps[files[position]] = spatial
    for pair in pairs:
        if pair.source not in maps or pair.target not in maps:
            continue
        source, target = (maps[f][None].to(subject.device) for f in (pair.source, pair.target))
        shares = torch.from_numpy(pair.source_points / np.array(pair.source_size)).float()
        guess = match(source, shares[None].to(subject.device), target, finer=settings.finer)
        pixels = guess[0].cpu().numpy() * np.array(pair.target_size)
        error = np.linalg.norm(pixels - pair.target_points, axis=-1) / pair.extent
        yield f"{pair.source.name}:{pair.target.name}", error


class SpairFile(TypedDict):
    """What is read of a pair's annotations; a file has more."""

    category: str
    src_imname: str
    trg_imname: str
    src_kps: list[list[float]]
    trg_kps: list[list[float]]
    src_imsize: list[int]
    trg_imsize: list[int]
    trg_bndbox: list[float]


def _read_pair(data: Path, file: Path) -> ImagePair:
    content = read_json(file)
    known = {key: content[key] for key in SpairFile.__annotations__ if key in content}
    entry: SpairFile = checked(known, SpairFile, str(file))
    points = *entry["src_kps"], *entry["trg_kps"]
    fits = all(len(point) == 2 for point in points) and len(entry["trg_bndbox"]) == 4
    fits = fits and all(map(is_coordinate, chain(entry["trg_bndbox"], *points)))
    if not fits or min(len(entry[key]) for key in ("src_imsize", "trg_imsize")) < 2:
        raise ValueError(f"{file} is not a pair of SPair-71k: points have 2 numbers, boxes 4.")
    folder = data / "JPEGImages" / entry["category"]
    left, top, right, bottom = entry["trg_bndbox"]
    return ImagePair(
        folder / entry["src_imname"],
        folder / entry["trg_imname"],
        np.array(entry["src_kps"], np.float64).reshape(-1, 2),
        np.array(entry["trg_kps"], np.float64).reshape(-1, 2),
        (entry["src_imsize"][0], entry["src_imsize"][1]),
        (entry["trg_imsize"][0], entry["trg_imsize"][1]),
        float(max(right - left, bottom - top)),
    )


def read_spair(data: Path, split: str) -> list[ImagePair]:
    """Read the pairs of SPair-71k: `PairAnnotation/SPLIT/*.json` and `JPEGImages/CATEGORY`.

    Raises:
        ValueError: there are no pairs, one is damaged, or an image is missing.
    """
    files = sorted((data / "PairAnnotation" / split).glob("*.json"))
    if not files:
        raise ValueError(f"There are no pairs in {data}/PairAnnotation/{split}.")
    pairs = []
    for file in files:
        pair = _read_pair(data, file)
        lost = [path for path in (pair.source, pair.target) if not path.is_file()]
        if lost or len(pair.source_points) != len(pair.target_points) or not pair.extent > 0:
            what = f"the image {lost[0]} is missing" if lost else "its points do not pair up"
            raise ValueError(f"{file} cannot be used: {what}.")
        if len(pair.source_points):
            pairs.append(pair)
    return pairs
