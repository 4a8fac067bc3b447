"""One pass before step 0: the teachers' statistics, which fix the space of every target.

They are taken on the grid on which a loss compares student and teacher, since averaging a fine map
to a coarse grid takes variance away. A head has one output space, so each teacher has one
transform, fitted at the run's own size (`Distill.size`), the one that is evaluated and exported. At
another size of `Distill.sizes` both sides of the comparison are multiplied by one number, the gain,
with which a target varies as much as at the run's own size.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from zoo.data.feed import ImageFeed, plan_of
from zoo.data.plan import mix
from zoo.features import Features
from zoo.files import load_tensors, save_tensors
from zoo.students.student import summary_key
from zoo.train.device import in_precision
from zoo.train.distill.config import Losses, SummaryLoss
from zoo.train.distill.losses import constant_guess, refuse_no_probabilities, spatial_loss
from zoo.train.distill.phi_s import Moments, Normalizer, fit
from zoo.train.distill.plan_step import StepPlan, plan_step
from zoo.train.distill.setup import Setup
from zoo.train.distill.step import full_precision
from zoo.train.mesh import (
    by_first,
    gather,
    gathered_on_first,
    rank,
    slices_of_rank,
    sum_over_ranks,
    tensor_from_first,
    world,
)
from zoo.train.progress import Progress
from zoo.train.run import Run

Normalizers = Mapping[str, Normalizer]
"""The transform of each teacher's map, by label, and of its summary, by `summary_key(label)`;
what is compared as it is, or not at all, has none."""

BaselineLosses = Mapping[str, float]
"""What a constant guess would lose, by the name of the loss: `label/summary`, `label/spatial`."""

Gains = Mapping[tuple[str, int], float]
"""What both maps are multiplied by, for each teacher and each size of the student but its own."""

LEAST_BASELINE = 1e-10
"""Of a loss, or variance on the scale of the normalizer."""

KEPT = 16_384
"""Tokens of each teacher that are kept, for losses that moments do not tell."""


@dataclass
class Statistics:
    """What the teachers answered, as the losses see it."""

    moments: dict[tuple[str, int], Moments] = field(default_factory=dict)
    """Of the maps' tokens on the compared grid, by label and by the student's size."""
    summaries: dict[str, list[Tensor]] = field(default_factory=dict)
    tokens: dict[str, list[Tensor]] = field(default_factory=dict)
    """Some of the maps' tokens at the run's own size."""
    finite: dict[str, Tensor] = field(default_factory=dict)
    slices: int = 1
    """That this rank takes of each step: what it keeps comes so many a step."""

    def add(self, label: str, size: int, features: Features, *, keep: int = KEPT) -> None:
        """Take in what a teacher answered to one batch.

        Args:
            size: Of the student, in pixels.
            features: The map on the grid that is compared.
            keep: Most tokens that are kept of this batch, evenly spaced.
        """
        for part in (p for p in features if p is not None):
            good = part.isfinite().all()
            self.finite[label] = self.finite[label] & good if label in self.finite else good
        if features.spatial is not None:
            tokens = features.spatial.flatten(0, 2)
            if (label, size) not in self.moments:
                self.moments[label, size] = Moments(tokens.shape[-1], device=tokens.device)
            self.moments[label, size].update(tokens)
            if keep:
                chosen = tokens[:: -(-len(tokens) // keep)]
                self.tokens.setdefault(label, []).append(chosen.cpu())
        if features.summary is not None:
            self.summaries.setdefault(label, []).append(features.summary.cpu())

    def refuse_nan(self, step: int) -> None:
        """Refuse teachers that gave a value that is not finite, on any rank; every rank asks.

        Raises:
            ValueError: there is such a teacher.
        """
        broken = gather([label for label, good in self.finite.items() if not good])
        if any(broken):
            labels = ", ".join(dict.fromkeys(label for labels in broken for label in labels))
            raise ValueError(
                f"The teacher {labels} gave NaN or infinite features within {step} "
                "batches of calibration. Check its weights, or run it with --precision float32."
            )

    def over_ranks(self) -> "Statistics":
        """Return what all ranks have measured; of what was kept all but rank 0 have none.

        Moments are added up in float64 about one pivot; what was kept is put in the order in which
        one process would have kept it.
        """
        if world() == 1:
            return self
        moments = {}
        for key, mine in self.moments.items():
            pivot = tensor_from_first(mine.mean)
            moments[key] = Moments.from_sums(sum_over_ranks(mine.sums(pivot)), pivot)
        summaries, tokens = (_in_order(x, self.slices) for x in (self.summaries, self.tokens))
        return Statistics(moments, summaries, tokens, self.finite)

    def summary_normalizers(
        self, kind: str, losses: Mapping[str, SummaryLoss] = MappingProxyType({})
    ) -> dict[str, Normalizer]:
        """Fit the transforms of the summaries, by `summary_key`; none if they stay as they are.

        Probabilities stay as they are.
        """
        found = {}
        for label, parts in self.summaries.items() if kind != "none" else ():
            if losses.get(label) in ("bce", "cross_entropy"):
                continue
            moments = Moments(parts[0].shape[-1])
            moments.update(full_precision(torch.cat(parts)))
            found[summary_key(label)] = fit(kind, moments)
        return found

    def baseline_losses(
        self,
        normalizers: Normalizers,
        size: int,
        losses: Losses,
        summaries: Mapping[str, SummaryLoss] = MappingProxyType({}),
    ) -> dict[str, Tensor]:
        """Return what a constant guess would lose in the losses of a run, by their names.

        The guess is the mean of the targets, for cosines the mean of their directions. Of summaries
        that are compared by their angle it is the mean square of that, before it is divided by
        this very number. What moments do not tell is measured on the tokens that were kept.

        Args:
            size: The run's own.
            losses: Which losses these are.
            summaries: The loss of each teacher's summaries, by label; `losses.summary` otherwise.

        Raises:
            ValueError: a loss is for probabilities, and the summaries are none.
        """
        found = {}
        for label, parts in self.summaries.items():
            y = full_precision(torch.cat(parts))
            if summary_key(label) in normalizers:
                y = normalizers[summary_key(label)](y)
            kind = summaries.get(label, losses.summary)
            refuse_no_probabilities(kind, y, label)
            found[f"{label}/summary"] = constant_guess(kind, y)
        for (label, other), moments in self.moments.items():
            if other == size and losses.spatial == "mse":
                found[f"{label}/spatial"] = _variance(moments, normalizers[label])
            elif other == size:
                y = normalizers[label].cpu()(torch.cat(self.tokens[label]))
                found[f"{label}/spatial"] = spatial_loss(losses)(y.mean(0).expand_as(y), y)
        return found

    def gains(self, normalizers: Normalizers, size: int) -> dict[tuple[str, int], Tensor]:
        """Return what gives each teacher's targets the same variance at all sizes.

        Args:
            size: The run's own.

        Raises:
            ValueError: nothing of a map is left on the grid of some size.
        """
        found = {}
        for (label, other), moments in self.moments.items():
            if other == size:
                continue
            normalizer = normalizers[label]
            own, left = (_variance(m, normalizer) for m in (self.moments[label, size], moments))
            if left <= LEAST_BASELINE * own:
                raise ValueError(
                    f"The map of {label} is all but the same for every image where it is compared "
                    f"with a student at {other} px; leave that size out of --sizes."
                )
            found[label, other] = (own / left).sqrt()
        return found


def _in_order(parts: dict[str, list[Tensor]], slices: int) -> dict[str, list[Tensor]]:
    """Bring what each rank kept of its slices to rank 0: step by step, and in it slice by slice."""
    found = {}
    for label, mine in parts.items():
        numbered = [(i // slices, rank(), i % slices, part) for i, part in enumerate(mine)]
        everything = gathered_on_first(numbered) or []
        found[label] = [part for *_, part in sorted(everything, key=lambda one: one[:3])]
    return found


def _variance(moments: Moments, normalizer: Normalizer) -> Tensor:
    """Return the mean variance of the channels in the space of a normalizer."""
    covariance = moments.covariance()
    weight = normalizer.weight.to(covariance)
    if normalizer.matrix is None:
        return (weight.square() * covariance.diagonal()).mean()
    return ((weight @ covariance) * weight).sum(1).mean()


@torch.no_grad()
def calibrate(setup: Setup) -> Statistics:
    """Measure the teachers over `config.calibration` batches, each rank over its slices of them.

    The batches are drawn from the training views, by a plan of their own. Each is measured as a
    step of the run would compare it, shifts included: at the run's own size, and at one of its
    other sizes in turn. Summaries are kept until the end, because the mean direction that they
    are held against is known only then. On several ranks rank 0 alone has them: it fits.

    Raises:
        ValueError: a teacher gives a value that is not finite.
    """
    config = setup.config
    plan = plan_of(setup.train, config.batch, mix(config.seed, 3))
    mine = slices_of_rank(config.num_slices)
    feed = ImageFeed(
        setup.train, setup.view, plan, setup.device, config.num_slices, mine, setup.workers
    )
    steps, slices = config.calibration, len(mine)
    measured = Statistics(slices=slices)
    always = tuple(replace(spec, rate=1.0, at=0) for spec in config.teachers)
    others = [size for size in setup.grids if size != config.size]
    share = 0 if config.losses.spatial == "mse" else -(-KEPT // (steps * config.num_slices))
    with Progress("calibrate", total=steps, samples=config.batch) as progress:
        for number, batch in enumerate(feed.batches(0, steps)):
            step, rest = 1 + number // slices, (number + 1) % slices
            in_turn = others and [others[(step - 1) % len(others)]]
            for size in (config.size, *in_turn):
                asked = replace(config, sizes=(size,), batches=(), partition=(), teachers=always)
                here = np.array(batch.positions)
                planned = plan_step(plan, step, here, asked, setup.teachers, setup.grids)
                for label, teacher in planned.teachers(setup.teachers).items():
                    with setup.autocast():
                        features = teacher(batch)
                    compared = _compared(features, label, planned, setup)
                    measured.add(label, size, compared, keep=share * (size == config.size))
            if rest:
                continue
            for name in chain.from_iterable(gather(list(feed.skipped()))):
                progress.print(f"skipped an unreadable image: {name}")
            if step == 1 or step == steps:
                measured.refuse_nan(step)
            if step % config.every.log == 0 or step == steps:
                progress.report(step, {})
    return measured.over_ranks()


def _compared(features: Features, label: str, planned: StepPlan, setup: Setup) -> Features:
    """Return a teacher's answer as the losses see it: its map on the grid that is compared.

    Of sizes beside the run's own only the map is measured, since a summary has no grid.
    """
    summary, spatial = features
    if planned.size != setup.config.size:
        summary = None
    if spatial is not None:
        spatial = full_precision(spatial)
        rows, cols = (n * setup.config.heads.upsample for n in setup.grids[planned.size])
        ours = spatial.new_zeros(1).expand(len(spatial), rows, cols, spatial.shape[-1])
        _, spatial, *seen = planned.align(label)(ours, spatial)
        if seen:  # shifts: the cells that are compared, in one row
            spatial = spatial[seen[0]][None, None]
    return Features(summary, spatial)


class Calibration(NamedTuple):
    """What calibration fixed, for one kind of normalisation."""

    normalizers: Normalizers
    baseline_losses: BaselineLosses
    gains: Gains


FILE = "normalizers.safetensors"


def fit_normalizers(run: Run, setup: Setup) -> dict[str, Calibration]:
    """Return what calibration fixed for each kind of the run, from its folder or by the pass.

    Every rank measures its share; rank 0 fits, writes, and tells the others.


    Raises:
        ValueError: as `calibrate`; or the folder is of a version that measured on other grids.
    """
    kinds, path = (setup.config.normalise, *setup.config.compare), run.path / FILE
    former = run.path / "balances.safetensors"
    if by_first(lambda: not path.is_file() and not former.is_file()):
        found = calibrate(setup)
        by_first(lambda: save_tensors(_fitted(found, kinds, setup), path))
    tensors = by_first(partial(written_normalizers, path))
    if not any(key.startswith("grid/") for key in tensors):
        raise ValueError(
            f"The run in {run.path} was calibrated by an earlier version, on the teachers' own "
            "grids instead of those that are compared, so its targets have another scale. Start a "
            "new run with another --out, or finish this one with the version that began it."
        )
    return {kind: _read(tensors, kind, setup) for kind in kinds}


def written_normalizers(path: Path) -> dict[str, Tensor]:
    """Read what a calibration has left in a run's folder; nothing where there was none.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        return load_tensors(path) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{error} Remove it, and the teachers are measured again.") from None


def _fitted(found: Statistics, kinds: tuple[str, ...], setup: Setup) -> dict[str, Tensor]:
    """Fit every kind, and return all that the run's folder keeps, by key."""
    own, losses, kinds_of = setup.config.size, setup.config.losses, setup.config.summary_losses
    summaries = found.summary_normalizers(setup.config.normalise_summary, kinds_of)
    tensors = {f"grid/{size}": torch.tensor(grid) for size, grid in setup.grids.items()}
    for key, normalizer in summaries.items():
        tensors |= {f"summary/{key}/{k}": v for k, v in normalizer.state_dict().items()}
    for kind in kinds:
        moments = {label: m for (label, size), m in found.moments.items() if size == own}
        normalizers = {label: fit(kind, m) for label, m in moments.items()}
        for label, normalizer in normalizers.items():
            tensors |= {f"{kind}/{label}/{k}": v for k, v in normalizer.state_dict().items()}
        baseline_losses = found.baseline_losses(normalizers | summaries, own, losses, kinds_of)
        tensors |= {f"spread/{kind}/{name}": value for name, value in baseline_losses.items()}
        gains = found.gains(normalizers, own)
        tensors |= {f"gain/{kind}/{n}/{size}": value for (n, size), value in gains.items()}
    # clones: the kinds share what they say of the summaries, and the format refuses that
    return {key: value.cpu().clone().contiguous() for key, value in tensors.items()}


def _read(tensors: Mapping[str, Tensor], kind: str, setup: Setup) -> Calibration:
    gains = {}
    for key, value in tensors.items():
        if key.startswith(f"gain/{kind}/"):
            label, size = key.split("/")[2:]
            gains[label, int(size)] = value.item()
    normalizers = read_normalizers(tensors, kind, setup)
    return Calibration(normalizers, _read_baseline_losses(tensors, kind, setup), gains)


def _read_baseline_losses(tensors: Mapping[str, Tensor], kind: str, setup: Setup) -> BaselineLosses:
    """Return the baseline losses of one kind; refuse 0 where a loss would divide by it."""
    prefix = f"spread/{kind}/"
    found = {k.removeprefix(prefix): v.item() for k, v in tensors.items() if k.startswith(prefix)}
    by_all = setup.config.losses.weighting == "dispersion"
    for name, value in found.items():
        wanted = by_all or setup.config.summary_losses[name.rpartition("/")[0]] == "angle"
        if wanted and value < LEAST_BASELINE:
            raise ValueError(
                f"{name} is all but the same for every image of the calibration (baseline "
                f"{value:.1g}), so there is nothing to divide by. Check that teacher's weights, "
                "or leave that loss out."
            )
    return found


def read_normalizers(tensors: Mapping[str, Tensor], kind: str, setup: Setup) -> Normalizers:
    """Return the normalizers of one kind, and those of summaries, on the run's device."""
    normalizers = {}
    for name, teacher in setup.teachers.items():
        for key, prefix, dim, how in (
            (name, f"{kind}/{name}/", teacher.spatial_dim, kind),
            (summary_key(name), f"summary/{summary_key(name)}/", teacher.summary_dim,
             setup.config.normalise_summary),
        ):  # fmt: skip
            state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            if state and dim:
                normalizers[key] = Normalizer(how, dim)
                normalizers[key].load_state_dict(state)
                in_precision(normalizers[key], setup.config.precision).to(setup.device)
    return normalizers
