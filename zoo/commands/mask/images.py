"""A vision model as `zoo mask` thins it: opened, measured, shown images, written."""

import copy
import math
import shutil
from dataclasses import replace
from typing import Any, cast

import torch
from timm.data import resolve_model_data_config

from zoo.commands.distill.run import evaluated, held_out, probe
from zoo.data.feed import ImageFeed, plan_of
from zoo.data.loader import eval_batches
from zoo.data.sources import spread
from zoo.eval.fidelity import fidelity
from zoo.students.build import assign_tokens, build_heads
from zoo.students.export import load_export
from zoo.students.heads import OwnFeatures, head_hidden
from zoo.students.prune.library import Parent, save
from zoo.students.prune.nm import Pattern, sparse_layers
from zoo.students.prune.parent import open_parent
from zoo.students.start import HEADS
from zoo.students.student import Student
from zoo.teachers.from_timm import TimmTeacher
from zoo.teachers.teacher import Teacher
from zoo.train.device import device_of, in_precision
from zoo.train.distill.calibrate import Normalizers, fit_normalizers
from zoo.train.distill.fold import folded
from zoo.train.distill.mask_config import PARENT, MaskImages
from zoo.train.distill.plan_step import check_step_plans, view_of
from zoo.train.distill.same import check_same_teachers
from zoo.train.distill.setup import (
    Setup,
    adopt_heads,
    check_calibration,
    check_mosaics,
    open_data,
    open_teachers,
    widths,
)
from zoo.train.distill.task import DistillTask
from zoo.train.masks import Lesson
from zoo.train.mesh import gather, slices_of_rank
from zoo.train.run import Run


class ImageModel:
    """A model of timm or zoo, its dense self as a teacher, and the images of a run.

    Raises:
        ValueError: there is no such model, no such data, or a teacher has nothing to be learnt.
    """

    def __init__(self, config: MaskImages):
        torch.manual_seed(config.seed)
        self.config, self.parent = config, open_vision(config.student)
        self.model: Any = self.parent.model
        self.normalizers: Normalizers = {}
        device, look = device_of(config.device), looks_at(self.model)
        dense = TimmTeacher(config.student, copy.deepcopy(self.model), device=device, **look)
        self.setup = open_setup(config, in_precision(dense, config.precision), device)
        others = {label: wide for label, wide in self.setup.widths.items() if label != PARENT}
        head = config.heads.options()
        head["hidden"] = head["hidden"] or head_hidden(others)
        heads = build_heads(self.model, others, size=dense.size[0], **head) if others else {}
        self.student = Student(
            self.model,
            {PARENT: OwnFeatures(), **heads},
            size=dense.size,
            mean=look["mean"],
            std=look["std"],
            recipe=(self.parent.name, {}),
            head=head,
            tokens=assign_tokens(self.model, others),
        )
        in_precision(self.student, config.precision).to(device).eval()

    def opened(self, place: str) -> Any:
        """Open a run of the same model, or a folder."""
        model = in_precision(open_vision(place).model, self.config.precision)
        return model.to(self.setup.device)

    def measured(self) -> dict[str, float]:
        """Compare the model with its teachers on held-out images, and probe its summaries.

        `agreement` is the share of images that a classifier puts into the dense model's class. The
        fidelity of the dense model to itself is infinite, and left out.
        """
        setup, student = self.setup, self.student
        with evaluated(student), setup.autocast():
            shown = folded(student, self.normalizers)
            found = dict(fidelity(shown, setup.teachers, held_out(setup)))
            if self.model.num_classes:
                found["agreement"] = self._agreement()
        with evaluated(student):
            found |= dict(probe(shown.features, setup))
        kept = (f"fidelity/{label}" for label in setup.teachers)
        kept = (*kept, "cosine/", "agreement", "knn/", "linear/")
        return {k: v for k, v in found.items() if k.startswith(kept) and math.isfinite(v)}

    @torch.no_grad()
    def _agreement(self) -> float:
        dense: Any = self.setup.teachers[PARENT]
        same = images = 0
        for batch in held_out(self.setup):
            x = (batch.at(self.student.size) - self.student.mean) / self.student.std
            ours, theirs = self.model(x).argmax(-1), dense.network(x).argmax(-1)
            same, images = same + (ours == theirs).sum().item(), images + len(x)
        same, images = (sum(counts) for counts in zip(*gather((same, images)), strict=True))
        return same / images

    def show(self) -> None:
        """Show the model its calibration images."""
        setup, (size, _) = self.setup, self.student.size
        few = spread(setup.train, setup.config.calibration * setup.config.batch)
        with evaluated(self.student), setup.autocast():
            for batch in eval_batches(few, size, setup.config.batch, unreadable=setup.unreadable):
                self.student.features(batch.to(setup.device))

    def lesson(self, run: Run) -> Lesson:
        """Return what masks are learnt by: the features of the dense model, and of other teachers.

        Heads for other teachers learn as well; those of an earlier run go on.
        """
        setup, config, student = self.setup, self.setup.config, self.student
        check_same_teachers(run, setup)
        calibration = fit_normalizers(run, setup)[config.normalise]
        self.normalizers = calibration.normalizers
        cast(OwnFeatures, student.heads[PARENT]).spatial = self.normalizers[PARENT]
        if self.parent.folder and (self.parent.folder / HEADS).is_file():
            earlier = load_export(self.parent.folder, device=setup.device)
            adopt_heads(student, in_precision(earlier, config.precision), self.normalizers)
        plan, slices = plan_of(setup.train, config.batch, config.seed), config.num_slices
        feed = ImageFeed(
            setup.train, setup.view, plan, setup.device, slices, slices_of_rank(slices),
            setup.workers,
        )  # fmt: skip
        task = DistillTask.of(config, student, plan, setup.teachers, calibration, setup.grids)
        return Lesson(task, feed, student, dict(weighting=task.weighting))

    def export(self, run: Run) -> None:
        """Write a plain checkpoint of timm, its classifier included."""
        making, folder = run.path / ".export.tmp", run.path / "export"
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir()
        save(self.parent, making)
        shutil.rmtree(folder, ignore_errors=True)
        making.rename(folder)


def open_vision(name: str) -> Parent:
    """Open a model of timm or zoo whose features can be read.

    Raises:
        ValueError: it is none, or is not there.
    """
    if not name:
        raise ValueError("Name the model: zoo mask MODEL --data PHOTOS; see zoo mask --help.")
    parent = open_parent(name)
    if not parent.name:
        raise ValueError(
            f"{name} holds a {type(parent.model).__name__} of transformers; zoo mask thins its "
            "language models (give --text), and vision models of timm and zoo."
        )
    if not hasattr(parent.model, "forward_intermediates"):
        raise ValueError(f"{name} has no forward_intermediates in timm, so no features to keep.")
    return parent


def looks_at(model: Any) -> dict[str, Any]:
    """Return the images that a model takes, as keywords of a teacher that sees what it sees."""
    config = resolve_model_data_config(model)
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    license = (model.pretrained_cfg or {}).get("license")
    return dict(
        size=tuple(size or config["input_size"][1:]),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        license=license,
    )


def open_setup(config: MaskImages, dense: Teacher, device: torch.device) -> Setup:
    """Open data and teachers, the dense model first among them, and hold them against each other.

    Raises:
        ValueError: as `zoo.train.distill.setup.prepare`.
    """
    inner = config.distillation(size=dense.size[0])
    grid = dense.grid
    assert grid is not None  # every backbone of `read_features` has a map
    grids = {inner.size: grid}
    check_mosaics(inner)
    train, val, labelled = open_data(inner)
    others = open_teachers(replace(inner, teachers=config.teachers), train, device, grids)
    teachers = dict(zip(inner.labels, (dense, *others.values()), strict=True))
    wide = widths(inner, teachers)
    check_step_plans(inner, teachers, grids)
    if config.method == "learned":
        check_calibration(inner, teachers, grids)
    view = view_of(inner, teachers, grids)
    return Setup(inner, device, train, val, labelled, teachers, view, grids, wide)


def print_image_plan(config: MaskImages) -> None:
    """Open and check everything, and print what would be thinned and trained."""
    pattern = Pattern.parse(config.pattern)
    Run.refuse_existing(config.out)
    subject = ImageModel(config)
    layers, setup = sparse_layers(subject.model, pattern), subject.setup
    weights = sum(layer.weight.numel() for layer in layers.values())
    seen = min(len(setup.train), setup.config.calibration * config.batch)
    does = f"nothing; {config.method} looks at {0 if config.method == 'magnitude' else seen} images"
    if config.method == "learned":
        logits = weights // pattern.group * len(pattern.masks())
        heads = sum(p.numel() for p in subject.student.heads.parameters())
        does = (
            f"{logits / 1e6:,.2f} M logits of masks and {heads / 1e6:,.2f} M weights of heads, "
            f"{config.steps} steps of {config.batch} images"
        )
    print(f"thinned: {weights / 1e6:,.2f} M weights of {len(layers)} layers to {pattern}")
    print(f"trained: {does}")
    print(f"images: {len(setup.train):,}, and {len(setup.val):,} held out")
    print(f"teachers: {', '.join(setup.teachers)}\nNothing was written.")
