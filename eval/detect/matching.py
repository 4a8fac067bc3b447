"""Which predictions COCO counts as right, one by one: the input of confidence intervals."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool

from zoo.eval.average_precision import AveragePrecision

EVERY = slice(None)
MEASURES = {
    "AP": (0, EVERY), "AP50": (0, slice(0, 1)), "AP75": (0, slice(5, 6)),
    "AP_small": (1, EVERY), "AP_medium": (2, EVERY), "AP_large": (3, EVERY),
}  # fmt: skip
"""Name -> index of COCO's range of sizes, and slice of its thresholds of overlap."""


class _Objects(NamedTuple):
    """The objects of one image and class."""

    ignored: np.ndarray
    """[sizes, objects]: crowds and objects of another size."""
    crowd: np.ndarray
    """[objects]"""


def average_precisions(run: Any, keys: Mapping[int, str]) -> dict[str, AveragePrecision]:
    """Return COCO's average precisions with each image's part in them.

    The overlaps are those of the library. The matches are computed again here:
    faster-coco-eval does not expose its own, and those of pycocotools would have to be collected
    from all pairs of images and classes.

    Args:
        run: A COCOeval of either library whose `evaluate` has been called.
        keys: Names of the images by their ids.
    """
    p = run.params
    labels = {category: i if p.useCats else 0 for i, category in enumerate(p.catIds)}
    truths, found = (_by_pair(coco, p.catIds, labels) for coco in (run.cocoGt, run.cocoDt))
    index = {image: i for i, image in enumerate(keys)}
    sizes = np.array(p.areaRng)
    objects = np.zeros((len(sizes), len(keys), max(labels.values()) + 1), np.uint16)
    pairs, taken, matches = [], [], []
    for label, image in sorted(truths.keys() | found.keys()):
        # the best hundred, as the library has them
        ours = sorted(found.get((label, image), ()), key=lambda one: -one["score"])
        ours = ours[: p.maxDets[-1]]
        if (label, image) in truths:
            there = _objects(truths[label, image], sizes)
            objects[:, index[image], label] = (~there.ignored).sum(axis=1)
            if ours:
                overlaps = run.ious[image, p.catIds[label] if p.useCats else -1]
                matches.append((len(taken), *_matches(np.asarray(overlaps), there, p.iouThrs)))
        pairs += [(label, index[image])] * len(ours)
        taken += ours
    matched = np.zeros((len(taken), len(sizes), len(p.iouThrs)), bool)
    ignored = np.zeros_like(matched)
    for start, *some in matches:
        matched[start : start + len(some[0])], ignored[start : start + len(some[0])] = some
    area = np.array([one["area"] for one in taken], np.float64)[:, None]
    outside = (area < sizes[:, 0]) | (area > sizes[:, 1])
    counted = np.where(matched, ~ignored, ~outside[:, :, None])
    label, image = np.array(pairs, np.uint32).reshape(-1, 2).T
    order = np.lexsort(([-one["score"] for one in taken], label))
    right, counted, label, image = (x[order] for x in (matched & ~ignored, counted, label, image))
    made = {}
    for name, (size, thresholds) in MEASURES.items():
        kept = counted[:, size, thresholds].any(axis=1)
        made[name] = AveragePrecision(
            list(keys.values()),
            image[kept],
            label[kept],
            right[kept, size, thresholds],
            counted[kept, size, thresholds],
            objects[size],
        )
    return made


def _by_pair(coco: Any, categories: Any, labels: Mapping[int, int]) -> dict[tuple, list]:
    """Return annotations by label and image, in the order of the library's rows and columns."""
    pairs = defaultdict(list)
    rank = {category: i for i, category in enumerate(categories)}
    known = [one for one in coco.anns.values() if one["category_id"] in rank]
    for one in sorted(known, key=lambda one: rank[one["category_id"]]):
        pairs[labels[one["category_id"]], one["image_id"]].append(one)
    return pairs


def _objects(truths: Any, sizes: np.ndarray) -> _Objects:
    area = np.array([one["area"] for one in truths], np.float64)
    crowd = np.array([one["iscrowd"] for one in truths], bool)
    outside = (area < sizes[:, :1]) | (area > sizes[:, 1:])
    return _Objects(crowd | outside, crowd)


def _matches(
    overlaps: np.ndarray, there: _Objects, thresholds: np.ndarray
) -> tuple[Bool[np.ndarray, "p sizes T"], Bool[np.ndarray, "p sizes T"]]:
    """Match predictions of one image and class, best first, each to the object it overlaps most.

    As in COCO, an object is matched once and a crowd any number of times; objects that count are
    matched before ignored ones, and of equal overlaps the last one is taken. Return which
    predictions are matched, and which of them to an ignored object.
    """
    sizes, count = there.ignored.shape
    shape = len(overlaps), sizes, len(thresholds)
    matched, ignored = np.zeros(shape, bool), np.zeros(shape, bool)
    limits = np.minimum(thresholds, 1 - 1e-10)
    free = np.ones((sizes, len(thresholds), count), bool)
    for i in np.flatnonzero((overlaps >= limits.min()).any(axis=1)):
        fits = free & (overlaps[i] >= limits[:, None])
        wanted = fits & ~there.ignored[:, None]
        fits = np.where(wanted.any(axis=2, keepdims=True), wanted, fits)
        best = count - 1 - np.where(fits, overlaps[i], -1)[..., ::-1].argmax(axis=2)
        matched[i] = fits.any(axis=2)
        size, threshold = np.nonzero(matched[i])
        taken = best[size, threshold]
        ignored[i, size, threshold] = there.ignored[size, taken]
        free[size, threshold, taken] = there.crowd[taken]
    return matched, ignored
