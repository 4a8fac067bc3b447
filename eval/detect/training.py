"""Detection as a task of the training loop: a detector's losses, and its feed of images."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers.norm_act import FrozenBatchNormAct2d
from torch import nn

from zoo.data.feed import PlanFeed
from zoo.data.loader import PlanSampler
from zoo.data.plan import Plan
from zoo.eval.detect.canvas import Canvas, Samples, batches
from zoo.eval.detect.coco import CocoSplit
from zoo.eval.detect.config import Detect
from zoo.eval.detect.detector import build_detector, find_source
from zoo.eval.detect.spec import Detector, DetectorSpec
from zoo.students.build import read_options
from zoo.train.device import device_of
from zoo.train.loop import train
from zoo.train.mesh import slices_of_rank
from zoo.train.optim import parameter_groups
from zoo.train.run import Run
from zoo.train.state import TrainState
from zoo.train.task import Loss, Task

TORCHVISION = ("mask_rcnn", "faster_rcnn", "retinanet")


def spec_of(config: Detect, classes: tuple[str, ...]) -> DetectorSpec:
    """Return the description of a detector before it is built.

    Raises:
        ValueError: there is no such backbone, or it suits no detector.
    """
    if not config.backbone:
        raise ValueError("Name a backbone: zoo detect fastervit_0 --data COCO_FOLDER.")
    options: dict[str, Any] = read_options(config.options)
    if config.optim.drop_path:
        options["drop_path_rate"] = config.optim.drop_path
    return DetectorSpec(
        kind=config.detector,
        source=find_source(config.backbone, config.size, options=options),
        classes=classes,
        size=config.size,
        width=config.width,
        class_agnostic=config.class_agnostic,
        score=0.05 if config.detector in TORCHVISION else 0.0,
    )


def start(config: Detect, classes: tuple[str, ...], run: Run | None = None) -> TrainState:
    """Build a detector and its optimizer, and load the run's last checkpoint if there is one.

    Raises:
        ValueError: the backbone is unknown or suits no detector; there is no such device.
    """
    device, spec = device_of(config.device), spec_of(config, classes)
    saved = run.load() if run else None
    if run:
        run.sweep()
    torch.manual_seed(config.seed)
    detector = build_detector(spec, pretrained=saved is None).to(device)
    groups = parameter_groups(detector, config.optim, backbone_lr=config.backbone_lr)
    state = TrainState.of(detector, config.optim, groups=groups)
    if saved:
        state.load(saved)
    return state


def train_detector(
    state: TrainState,
    config: Detect,
    split: CocoSplit,
    run: Run,
    *,
    evaluate: Callable[[Detector, int], float] | None = None,
) -> Detector:
    """Train to the last step; return the detector in float32, for the measurement.

    Raises:
        Interrupted, ValueError: see `zoo.train.loop.train`; no image can be read.
    """

    def between(detector: Detector, step: int) -> float:
        assert evaluate is not None
        detector.precision = torch.float32
        found = evaluate(detector, step)
        training_mode(state.model, config)
        return found

    run.keep(lambda row: row["step"] <= state.step)
    training_mode(state.model, config)
    if config.compile:
        state.model.backbone.compile()
    feed = DetectFeed.of(config, split, state)
    evaluation = between if evaluate else None
    train(DetectTask(), state, feed, config, run, evaluate=evaluation, title=config.detector)
    state.averaged.precision = torch.float32
    return state.averaged


class DetectTask(Task):
    """The sum of a detector's own losses."""

    def losses(self, state: TrainState, batch: Canvas, targets: None, step: int) -> dict[str, Loss]:
        device = state.device.type
        low = torch.is_autocast_enabled(device)
        state.model.precision = torch.bfloat16 if low else torch.float32
        with torch.autocast(
            device, enabled=False
        ):  # a detector applies it to suitable parts itself
            means = state.model.losses(batch)
        return {name: Loss.of_mean(mean, len(batch)) for name, mean in means.items()}


@dataclass
class DetectFeed(PlanFeed):
    """A split's images on canvases in the order of a plan, which also decides on mirroring."""

    samples: Samples
    plan: Plan
    device: torch.device
    slices: Sequence[int] = (0,)
    num_slices: int = 1
    workers: int = 0

    @property
    def source(self) -> CocoSplit:
        return self.samples.split

    @classmethod
    def of(cls, config: Detect, split: CocoSplit, state: TrainState) -> "DetectFeed":
        """Return the feed of a config; without workers, decoded images are kept in memory."""
        masks = state.model.spec.has_masks
        samples = Samples(split, config.size, masks=masks, keep=not config.workers)
        plan, parts = Plan(len(split), config.batch, config.seed), config.num_slices
        return cls(samples, plan, state.device, slices_of_rank(parts), parts, config.workers)

    def order(self, start: int, steps: int) -> Iterator[list[tuple[int, bool]]]:
        """Yield for each slice the indices of its images, and whether each is mirrored."""
        for part in PlanSampler(self.plan, start, steps, self.num_slices, self.slices):
            yield [
                (index, bool(self.plan.draws(position).random() < 0.5)) for position, index in part
            ]

    def batches(self, start: int, steps: int) -> Iterator[Canvas]:
        """Yield the slices of each step from `start` to before `steps`."""
        for batch in batches(self.samples, self.order(start, steps), workers=self.workers):
            self._skipped = (*self._skipped, *(lost.key for lost in batch.lost))
            yield batch.to(self.device)


def training_mode(detector: Detector, config: Detect) -> None:
    """Set the training mode; with frozen norms, those of the backbone stay in evaluation mode."""
    detector.train()
    for module in detector.backbone.modules() if config.norms == "frozen" else ():
        if isinstance(module, nn.modules.batchnorm._BatchNorm | FrozenBatchNormAct2d):
            module.eval()
