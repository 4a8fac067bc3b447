"""COCO's average precision and recall for boxes and masks, and COCO's file of predictions."""

import contextlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from torch import Tensor

from zoo.eval.average_precision import AveragePrecision
from zoo.eval.detect.coco import CocoImage, CocoSplit
from zoo.eval.detect.masks import NEEDED, decode, encode, is_coordinate
from zoo.eval.detect.matching import average_precisions
from zoo.files import ANNOTATION_BYTES, read_json, written_whole

Metric = Literal["faster", "pycocotools"]
NAMES = (
    "AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large",
    "AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large",
)  # fmt: skip
"""In the order of COCO's own summary."""
KINDS = {"bbox": "box", "segm": "mask"}


class Prediction(NamedTuple):
    """The predictions of a detector for one image, in pixels of that image, best first."""

    boxes: Tensor
    """[n 4]: left, top, right, bottom."""
    scores: Tensor
    labels: Tensor
    masks: Tensor | None = None
    """[n rows cols], booleans."""


def coco_results(
    prediction: Prediction, image: CocoImage, split: CocoSplit
) -> list[dict[str, Any]]:
    """Return a prediction in COCO's format: ids of the file, boxes as x, y, width, height."""
    boxes = prediction.boxes.double().cpu().numpy()
    boxes = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1).round(3)
    scores, labels = prediction.scores.double().tolist(), prediction.labels.tolist()
    results: list[dict[str, Any]] = [
        dict(image_id=image.id, category_id=split.category_ids[label], bbox=box, score=score)
        for box, score, label in zip(boxes.tolist(), scores, labels, strict=True)
    ]
    if prediction.masks is not None:
        for result, runs in zip(results, encode(prediction.masks.cpu().numpy()), strict=True):
            result["segmentation"] = runs
    return results


def write_results(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write predictions to a file in COCO's format, which COCO's server and tools read."""
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(list(results)) + "\n")


def read_results(path: Path, split: CocoSplit) -> list[dict[str, Any]]:
    """Read a file of predictions in COCO's format and check it against the annotations.

    Raises:
        ValueError: it is not such a file, or it has unknown images or classes.
    """
    results = read_json(path, Any, most=ANNOTATION_BYTES)
    if not isinstance(results, list) or not all(map(_is_result, results)):
        raise ValueError(
            f"{path} is not a list of COCO results: image_id, category_id, score, bbox."
        )
    images = {image.id for image in split.images}
    for name, known in (("image_id", images), ("category_id", set(split.category_ids))):
        strange = sorted({r[name] for r in results} - known)
        if strange:
            raise ValueError(f"{path} has a {name} that {split.file} does not have: {strange[0]}.")
    return results


def _is_result(entry: Any) -> bool:
    if not isinstance(entry, dict) or not is_coordinate(entry.get("score")):
        return False
    ids, box = (entry.get("image_id"), entry.get("category_id")), entry.get("bbox", [0, 0, 0, 0])
    whole = all(isinstance(number, int) for number in ids)
    return whole and isinstance(box, list) and len(box) == 4 and all(map(is_coordinate, box))


def coco_metrics(
    split: CocoSplit,
    results: Sequence[Mapping[str, Any]],
    *,
    masks: bool = False,
    class_agnostic: bool = False,
    metric: Metric = "faster",
) -> Iterator[tuple[str, float]]:
    """Yield COCO's twelve numbers for boxes, and with `masks` also for masks, as shares of 1.

    Names are `box/AP`, `mask/AP50`, ...; sizes are small below 32², large above 96² pixels of the
    image. Numbers for a size that no object has are left out. Of several classes, each has its AP
    as `box/class/NAME`.

    Args:
        class_agnostic: Ignore the classes of predictions and objects.
        metric: faster-coco-eval, or the original for comparison.

    Raises:
        ValueError: there is no object, an object has no mask, or the metric is not installed.
    """
    how = dict(masks=masks, class_agnostic=class_agnostic)
    for name, value, _ in _measured(split, results, **how, metric=metric):
        yield name, value


def coco_scores(
    split: CocoSplit, results: Sequence[Mapping[str, Any]], *, masks: bool = False
) -> Iterator[tuple[str, float | AveragePrecision]]:
    """Yield the same numbers in per cent, average precisions with each image's part in them.

    Raises:
        ValueError: as `coco_metrics`.
    """
    for name, value, parts in _measured(split, results, masks=masks, parts=True):
        yield name, 100 * value if parts is None else parts


def _measured(
    split: CocoSplit,
    results: Sequence[Mapping[str, Any]],
    *,
    masks: bool = False,
    class_agnostic: bool = False,
    metric: Metric = "faster",
    parts: bool = False,
) -> Iterator[tuple[str, float, AveragePrecision | None]]:
    """Yield COCO's numbers; with `parts`, also what the average precisions are made of."""
    split.require_objects()
    if masks:
        split.require_masks()
    truth = _truth(split, masks)
    keys = {i.id: i.path.relative_to(split.folder).as_posix() for i in split.images}
    for kind in ("bbox", "segm") if masks else ("bbox",):
        run = _run(truth, results, kind, metric, class_agnostic or split.class_agnostic)
        made = average_precisions(run, keys) if parts else {}
        stats = run.stats[: len(NAMES)] if results else _stats_of_nothing(truth)
        for name, value in zip(NAMES, stats, strict=True):
            if value > -1:
                yield f"{KINDS[kind]}/{name}", float(value), made.get(name)
        if run.params.useCats and len(split.classes) > 1:
            found = _by_class(run, split) if results else _zero_by_class(truth, split)
            for name, value in zip(split.classes, found, strict=True):
                if value > -1:
                    yield f"{KINDS[kind]}/class/{name}", value, None


def _by_class(run: Any, split: CocoSplit) -> list[float]:
    """Return the AP of each class over all sizes, -1 of one without objects."""
    place = {category: i for i, category in enumerate(run.params.catIds)}
    precision = np.asarray(run.eval["precision"])  # [thresholds recalls classes sizes limits]
    found = [precision[:, :, place[category], 0, -1] for category in split.category_ids]
    return [float(one[one > -1].mean()) if (one > -1).any() else -1.0 for one in found]


def _zero_by_class(truth: dict[str, Any], split: CocoSplit) -> list[float]:
    known = {a["category_id"] for a in truth["annotations"] if not a["iscrowd"]}
    return [0.0 if category in known else -1.0 for category in split.category_ids]


def _truth(split: CocoSplit, masks: bool) -> dict[str, Any]:
    """Return annotations in COCO's format with area and iscrowd, which files often leave out."""
    entries = []
    for image in split.images:
        for annotation in split.annotations[image.id]:
            entry = {k: annotation[k] for k in ("id", "image_id", "category_id", "bbox")}
            if split.class_agnostic:
                entry["category_id"] = split.category_ids[0]
            entry["iscrowd"] = int(annotation.get("iscrowd") or 0)
            segmentation = annotation.get("segmentation") or []
            if masks:
                entry["segmentation"] = segmentation or encode(_empty(image))[0]
            area = annotation.get("area")
            if area is None:
                area = entry["bbox"][2] * entry["bbox"][3]
                if segmentation:
                    area = decode(segmentation, image.rows, image.cols).sum()
            entry["area"] = float(area)
            entries.append(entry)
    # ids from 1: the original takes a match with annotation 0 for no match
    entries = [dict(entry, id=i) for i, entry in enumerate(entries, 1)]
    images = [
        dict(id=i.id, height=i.rows, width=i.cols, file_name=i.path.name) for i in split.images
    ]
    categories = [
        dict(id=i, name=name) for i, name in zip(split.category_ids, split.classes, strict=True)
    ]
    return dict(info={}, images=images, annotations=entries, categories=categories)


def _empty(image: CocoImage) -> np.ndarray:
    return np.zeros((1, image.rows, image.cols), bool)


def _run(
    truth: dict[str, Any],
    results: Sequence[Mapping[str, Any]],
    kind: str,
    metric: Metric,
    class_agnostic: bool,
) -> Any:
    """Run a library's evaluation. Without results, which no library takes, it is only set up."""
    coco, evaluate = _tools(metric)
    with contextlib.redirect_stdout(io.StringIO()):  # they print
        objects, found = coco(), coco()
        # copies, since both libraries write into their input
        objects.dataset = json.loads(json.dumps(truth))
        found.dataset = dict(objects.dataset, annotations=[])
        for one in (objects, found):
            one.createIndex()
        keys = ("image_id", "category_id", "score", "segmentation" if kind == "segm" else "bbox")
        if results:
            found = objects.loadRes([{key: result[key] for key in keys} for result in results])
        run = evaluate(objects, found, kind)
        run.params.useCats = int(not class_agnostic)
        if results:
            run.evaluate()
            run.accumulate()
            run.summarize()
    return run


def _stats_of_nothing(truth: dict[str, Any]) -> list[float]:
    areas = {_size_of(a["area"]) for a in truth["annotations"] if not a["iscrowd"]}
    return [0.0 if name.rpartition("_")[2] in areas | set(NAMES) else -1.0 for name in NAMES]


def _size_of(area: float) -> str:
    return "small" if area < 32**2 else "medium" if area < 96**2 else "large"


def _tools(metric: Metric) -> tuple[Any, Any]:
    """Return a library's class of the data and its class of the evaluation."""
    try:
        if metric == "faster":
            from faster_coco_eval import COCO, COCOeval_faster

            return COCO, COCOeval_faster
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        if metric == "faster":
            raise ValueError(NEEDED) from error
        raise ValueError("pycocotools is not installed: pip install pycocotools.") from error
    return COCO, COCOeval
