"""Training of a model of images and text as a task of the training loop."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from zoo.features import Features, at_grid
from zoo.language.tokens import TokenFeatures
from zoo.multimodal.image_text import ImageText, read_image_text, see_images
from zoo.multimodal.open import parts_of
from zoo.train.distill.image_text_config import DistillImageText
from zoo.train.distill.map_teacher import MapTeacher
from zoo.train.distill.phi_s import Moments, Normalizer, fit
from zoo.train.distill.token_losses import cross_entropy, kl
from zoo.train.distill.token_task import flat
from zoo.train.state import TrainState
from zoo.train.task import Loss, Task


class Target(NamedTuple):
    """What a frozen model says of a batch."""

    features: TokenFeatures | None
    """`None` of a teacher that writes no text."""
    maps: list[Float[Tensor, "n h w C"]]
    """What it sees, one tensor a group of images, with variance 1; none if that counts nothing."""
    summaries: list[Float[Tensor, "n D"]]
    """What it says of each image, a tensor a group; none if that counts nothing."""


def maps_of(model: Any, batch: ImageText, seen: list[Tensor]) -> list[Tensor]:
    """Return the tokens of a Llava's tower (`see_images`) as maps [n h w C]."""
    cell = model.model.vision_tower.config.patch_size
    return [
        tokens.unflatten(1, (images.shape[-2] // cell, images.shape[-1] // cell))
        for images, tokens in zip(batch.images, seen, strict=True)
    ]


class ImageTextTask(Task):
    """Answers to be learnt, and frozen models that answer the same questions."""

    def __init__(
        self,
        config: DistillImageText,
        teachers: Mapping[str, Any] | None = None,
        normalizers: Mapping[str, Normalizer] | None = None,
        projections: nn.ModuleDict | None = None,
    ):
        self.config, self.teachers = config, dict(teachers or {})
        self.normalizers, self.projections = dict(normalizers or {}), projections

    @torch.no_grad()
    def targets(self, batch: ImageText, step: int) -> dict[str, Target]:
        """Ask the teachers."""
        found = {}
        for label, model in self.teachers.items():
            if isinstance(model, MapTeacher):
                features, groups = None, [model(group) for group in batch.images]
            else:
                seen = see_images(model, batch)
                features = read_image_text(model, batch, seen=seen)
                groups = [Features(None, group) for group in maps_of(model, batch, seen)]
            maps = [self._balanced(label, x.spatial) for x in groups if x.spatial is not None]
            summaries = [x.summary.float() for x in groups if x.summary is not None]
            found[label] = Target(features, maps, summaries)
        return found

    def _balanced(self, label: str, maps: Tensor) -> Tensor:
        return self.normalizers[label](maps) if label in self.normalizers else maps

    def losses(
        self, state: TrainState, batch: ImageText, targets: dict[str, Target], step: int
    ) -> dict[str, Loss]:
        losses, model = self.config.losses, state.model
        seen = see_images(model, batch)
        ours = flat(read_image_text(model, batch, seen=seen))
        learnt, count = batch.answers.flatten(), int(batch.answers.numel())
        found: dict[str, Tensor] = {}
        for label, theirs in targets.items():
            if losses.kl and theirs.features is not None:
                options: Any = dict(tau=losses.tau, chunk=losses.chunk, kind=losses.kind)
                found[f"{label}/kl"] = kl(*ours, *flat(theirs.features), learnt, **options)
            if self.config.vision:
                # a mean over images, in the unit of the others: a sum over the learnt tokens
                maps, learnt_tokens = maps_of(model, batch, seen), batch.answers.sum()
                if self._teaches(label, "vision"):
                    found[f"{label}/vision"] = learnt_tokens * self._distance(
                        label, maps, theirs.maps
                    )
                if self._teaches(label, "summary"):
                    found[f"{label}/summary"] = learnt_tokens * self._summary_loss(
                        label, maps, theirs.summaries
                    )
        if losses.ce:
            following = batch.tokens.following.flatten()
            found["ce"] = cross_entropy(*ours, following, learnt, chunk=losses.chunk)
        return {name: Loss(total, count) for name, total in found.items()}

    def _distance(self, label: str, ours: list[Tensor], theirs: list[Tensor]) -> Tensor:
        """Return the mean squared distance of all cells, in the teacher's balanced space."""
        assert self.projections is not None
        project = self.projections[label]
        parts = [
            (project(at_grid(x, (y.shape[1], y.shape[2]))), y)
            for x, y in zip(ours, theirs, strict=True)
        ]
        if not parts:
            return nothing(project)
        total = sum(x.numel() for x, _ in parts)
        sums = [F.mse_loss(x.float(), y.float(), reduction="sum") for x, y in parts]
        return torch.stack(sums).sum() / total

    def _teaches(self, label: str, what: str) -> bool:
        teacher = self.teachers[label]
        return teacher.weights[what] > 0 if isinstance(teacher, MapTeacher) else what == "vision"

    def _summary_loss(self, label: str, ours: list[Tensor], theirs: list[Tensor]) -> Tensor:
        """Return the loss of a teacher's summary, which the mean of an image's tokens answers."""
        teacher = self.teachers[label]
        assert self.projections is not None and teacher.summary_loss is not None
        project = self.projections[summary_part(label)]
        if not ours:
            return nothing(project)
        answered = project(torch.cat([x.mean((1, 2)) for x in ours]))
        return teacher.summary_loss(answered.float(), torch.cat(theirs))

    def weigh(self, losses: Mapping[str, Tensor], step: int) -> Tensor:
        config, weighed = self.config, []
        for name, value in losses.items():
            label, _, kind = name.rpartition("/")
            weight = dict(
                kl=config.losses.kl, ce=config.losses.ce, vision=config.vision,
                summary=config.vision,
            )[kind]  # fmt: skip
            teacher = self.teachers.get(label)
            own = teacher.weights[kind] if isinstance(teacher, MapTeacher) else 1.0
            weighed.append(weight * own * value)
        return torch.stack(weighed).sum()


def summary_part(label: str) -> str:
    """Return the name, among projections, of the one that answers a teacher's summary."""
    return f"{label}/summary"


def nothing(project: nn.Module) -> Tensor:
    """Return the loss of rows of text alone: 0, since the graph of every step is the same."""
    return torch.stack([0 * p.sum() for p in project.parameters()]).sum()


def parameter_groups(model: Any, config: DistillImageText) -> list[dict[str, Any]]:
    """Split what learns by its part's rate; norms and biases are not decayed."""
    rates = dict(tower=config.tower_lr, projector=1.0, language=config.language_lr)
    found, known = list[dict[str, Any]](), set[int]()
    parts = dict(parts_of(model).items()) | dict(head=nn.ModuleList([model.lm_head]))
    for name, part in parts.items():
        exempt = getattr(getattr(part, "backbone", part), "no_weight_decay", set)()
        groups = param_groups_weight_decay(
            part, config.optim.weight_decay, no_weight_decay_list=list(exempt)
        )
        for group in groups:
            own = [p for p in group["params"] if id(p) not in known]  # a head may be tied
            known |= {id(p) for p in own}
            if own:
                found.append(dict(group, params=own, scale=rates.get(name, config.language_lr)))
    return found


@torch.no_grad()
def fit_tower(tower: Any, batches: list[ImageText]) -> list[tuple[Tensor, Tensor]]:
    """Fit PHI-S to each map of a tower, on the images of some batches.

    Returns:
        μ and W of each, for `Tower.standardise`.
    """
    moments: list[Moments] = []
    for batch in batches:
        for group in batch.images:
            maps = tower.maps(group.float() / 255)
            moments = moments or [Moments(x.shape[-1], x.device) for x in maps]
            for each, x in zip(moments, maps, strict=True):
                each.update(x)
    fitted = [fit("phi_s", each) for each in moments]
    return [(each.mean, each.weight) for each in fitted]


@torch.no_grad()
def fit_features(model: Any, batches: list[ImageText]) -> tuple[Normalizer | None, int | None]:
    """Fit PHI-S to what a teacher sees of some batches, on the grids that are compared.

    Returns:
        `None` for a teacher whose map counts nothing; and the width of its summary, if that counts.

    Raises:
        ValueError: there are no images, or its summaries are not what their loss is for.
    """
    moments: Moments | None = None
    summaries, images = list[Tensor](), 0
    for batch in batches:
        if isinstance(model, MapTeacher):
            found = [model(group) for group in batch.images]
        else:
            found = [Features(None, seen) for seen in see_images(model, batch)]
        images += len(found)
        for features in found:
            if (spatial := features.spatial) is not None:
                moments = moments or Moments(spatial.shape[-1], spatial.device)
                moments.update(spatial)
            if features.summary is not None:
                summaries.append(features.summary.float())
    if not images:
        raise ValueError(
            "The first conversations have no image, so there is nothing to learn from "
            "teachers of vision; leave out --vision."
        )
    if summaries:
        model.measure(torch.cat(summaries))
    width = summaries[0].shape[-1] if summaries else None
    return None if moments is None else fit("phi_s", moments), width
