"""One pass before step 0: the teachers' statistics, which fix the space of every target."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from zoo.data.feed import ImageFeed
from zoo.data.plan import Plan, mix
from zoo.features import Features
from zoo.files import save_whole
from zoo.train.device import in_precision
from zoo.train.distill.losses import dispersion
from zoo.train.distill.phi_s import Moments, Normalizer, fit
from zoo.train.distill.plan_step import drawn_size
from zoo.train.distill.setup import Setup
from zoo.train.distill.sizes import at_size
from zoo.train.distill.step import full_precision
from zoo.train.progress import Progress
from zoo.train.run import Run


@dataclass
class Statistics:
    """What one pass over the teachers found, by label."""

    moments: dict[str, Moments] = field(default_factory=dict)
    """Of the spatial tokens."""
    dispersions: dict[str, Tensor] = field(default_factory=dict)
    """Of the summaries: float64 scalars, in radians squared."""

    def baseline_losses(self, normalizers: Mapping[str, Normalizer]) -> dict[str, Tensor]:
        """Return what a constant guess would lose, by the names of the losses.

        For a map it is the mean variance of the channels in the space of its normalizer.
        """
        found = {f"{name}/summary": value for name, value in self.dispersions.items()}
        for name, normalizer in normalizers.items():
            covariance = self.moments[name].covariance()
            weight = normalizer.weight.to(covariance)
            if normalizer.matrix is None:
                found[f"{name}/spatial"] = (weight.square() * covariance.diagonal()).mean()
            else:
                found[f"{name}/spatial"] = ((weight @ covariance) * weight).sum(1).mean()
        return found


@torch.no_grad()
def calibrate(setup: Setup) -> Statistics:
    """Measure the teachers over `config.calibration` batches.

    The batches are drawn from the training views, by a plan of their own, at the sizes of the
    training steps. Summaries are kept until the end, because the mean direction that they are
    held against is known only then.

    Raises:
        ValueError: a teacher gives a value that is not finite.
    """
    config = setup.config
    device = setup.device
    plan = Plan(len(setup.train), config.batch, mix(config.seed, 3), batches=config.batches)
    feed = ImageFeed(setup.train, setup.view, plan, device, config.num_slices, (), config.workers)
    measured = _Measured(device)
    steps, slices = config.calibration, len(feed.slices)
    with Progress("calibrate", total=steps, samples=config.mean_batch) as progress:
        for number, batch in enumerate(feed.batches(0, steps)):
            step, rest = 1 + number // slices, (number + 1) % slices
            size = drawn_size(plan, step - 1, config)
            for name, teacher in setup.teachers.items():
                with setup.autocast():
                    features = at_size(teacher, size)(batch)
                measured.add(name, features)
            for name in feed.skipped():
                progress.print(f"skipped an unreadable image: {name}")
            if rest:
                continue
            if step == 1 or step == steps:
                _refuse_nan(measured.finite, step)
            if step % config.every.log == 0 or step == steps:
                progress.report(step, {})
    return measured.statistics()


class _Measured:
    """What the teachers answered so far, by label."""

    def __init__(self, device: torch.device):
        self.device = device
        self.moments: dict[str, Moments] = {}
        self.summaries: dict[str, list[Tensor]] = {}
        self.finite: dict[str, Tensor] = {}

    def add(self, name: str, features: Features) -> None:
        for part in (p for p in features if p is not None):
            good = part.isfinite().all()
            self.finite[name] = self.finite[name] & good if name in self.finite else good
        if features.spatial is not None:
            tokens = full_precision(features.spatial.flatten(0, 2))
            if name not in self.moments:
                self.moments[name] = Moments(tokens.shape[-1], device=self.device)
            self.moments[name].update(tokens)
        if features.summary is not None:
            self.summaries.setdefault(name, []).append(features.summary.cpu())

    def statistics(self) -> Statistics:
        angles = {name: dispersion(torch.cat(y)) for name, y in self.summaries.items()}
        return Statistics(self.moments, angles)


def _refuse_nan(finite: Mapping[str, Tensor], step: int) -> None:
    broken = [name for name, good in finite.items() if not good]
    if broken:
        raise ValueError(
            f"The teacher {', '.join(broken)} gave NaN or infinite features within {step} batches "
            "of calibration. Check its weights, or run it with --precision float32."
        )


Normalizers = Mapping[str, Normalizer]
"""The transform of each teacher's map, by label; teachers without a map have none."""


BaselineLosses = Mapping[str, float]
"""What a constant guess would lose, by the name of the loss: `label/summary`, `label/spatial`."""


LEAST_BASELINE = 1e-10
"""Radians squared, or variance on the scale of the normalizer."""


FILE = "normalizers.safetensors"


def fit_normalizers(
    run: Run, setup: Setup
) -> tuple[dict[str, Normalizers], dict[str, BaselineLosses]]:
    """Return kind -> label -> normalizer, and kind -> loss -> baseline loss.

    From the run's folder, or by the calibration pass.
    """
    config = setup.config
    kinds = (config.normalise, *config.compare)
    path = run.path / FILE
    before = run.path / "balances.safetensors"  # its former name
    if before.is_file() and not path.is_file():
        path = before
    if not path.is_file():
        found = calibrate(setup)
        tensors = {}
        for kind in kinds:
            fitted = {name: fit(kind, moments) for name, moments in found.moments.items()}
            for name, normalizer in fitted.items():
                tensors |= {f"{kind}/{name}/{k}": v for k, v in normalizer.state_dict().items()}
            baseline_losses = found.baseline_losses(fitted)
            tensors |= {f"spread/{kind}/{name}": value for name, value in baseline_losses.items()}
        # clones: the kinds share what they say of the summaries, and the format refuses that
        tensors = {key: value.cpu().clone().contiguous() for key, value in tensors.items()}
        save_whole(tensors, path, save_file)
    tensors = load_file(path)
    return (
        {kind: read_normalizers(tensors, kind, setup) for kind in kinds},
        {kind: _read_baseline_losses(tensors, kind, setup) for kind in kinds},
    )


def _read_baseline_losses(tensors: Mapping[str, Tensor], kind: str, setup: Setup) -> BaselineLosses:
    """Return the baseline losses of one kind; refuse 0 where a loss would divide by it."""
    prefix = f"spread/{kind}/"
    found = {k.removeprefix(prefix): v.item() for k, v in tensors.items() if k.startswith(prefix)}
    losses = setup.config.losses
    wanted = losses.weighting == "dispersion" or losses.summary == "angle"
    for name, value in found.items():
        if wanted and value < LEAST_BASELINE:
            raise ValueError(
                f"{name} is all but the same for every image of the calibration (baseline "
                f"{value:.1g}), so there is nothing to divide by. Check that teacher's weights, "
                "or leave that loss out."
            )
    return found


def read_normalizers(tensors: Mapping[str, Tensor], kind: str, setup: Setup) -> Normalizers:
    """Return the normalizers of one kind, on the run's device; none for teachers without a map."""
    normalizers = {}
    for name, teacher in setup.teachers.items():
        prefix = f"{kind}/{name}/"
        state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        if state and teacher.spatial_dim:
            normalizers[name] = Normalizer(kind, teacher.spatial_dim)
            normalizers[name].load_state_dict(state)
            in_precision(normalizers[name], setup.config.precision).to(setup.device)
    return normalizers
