"""One pass before step 0: the teachers' statistics, which fix the space of every target."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from zoo.data.loader import train_batches
from zoo.data.plan import Plan, mix
from zoo.data.sources import Source
from zoo.features import Batch
from zoo.files import save_whole
from zoo.teachers.teacher import Teacher
from zoo.train.distill.config import Distill
from zoo.train.distill.losses import dispersion
from zoo.train.distill.phi_s import Moments, Normalizer, fit
from zoo.train.distill.plan_step import drawn_size, view_of
from zoo.train.distill.setup import Setting
from zoo.train.distill.sizes import at_size
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

        For a map it is the mean variance of the channels in the space of its balance.
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
def calibrate(
    teachers: Mapping[str, Teacher], source: Source, config: Distill, *, device, autocast
) -> Statistics:
    """Measure the teachers over `config.calibration` batches.

    The batches are drawn from the training views, by a plan of their own, at the sizes of the
    training steps. Summaries are kept until the end, because the mean direction that they are
    held against is known only then.

    Raises:
        ValueError: a teacher gives a value that is not finite.
    """
    plan = Plan(len(source), config.batch, mix(config.seed, 3))
    moments: dict[str, Moments] = {}
    summaries: dict[str, list[Tensor]] = {}
    finite: dict[str, Tensor] = {}
    steps = config.calibration
    loader = train_batches(
        source, view_of(config, teachers), plan, steps=steps, start=0, workers=config.workers
    )
    with Progress("calibrate", total=steps, images=config.batch) as watch:
        for step, part in enumerate(loader, 1):
            batch = Batch(part["images"], part["keys"]).to(device)
            for name in part["skipped"]:
                watch.print(f"skipped an unreadable image: {name}")
            size = drawn_size(plan, step, config)
            for name, teacher in teachers.items():
                with autocast():
                    seen = at_size(teacher, size)(batch)
                for part_of in (p for p in seen if p is not None):
                    good = part_of.isfinite().all()
                    finite[name] = finite[name] & good if name in finite else good
                if seen.spatial is not None:
                    tokens = seen.spatial.flatten(0, 2).float()
                    moments.setdefault(name, Moments(tokens.shape[-1], device=device)).update(
                        tokens
                    )
                if seen.summary is not None:
                    summaries.setdefault(name, []).append(seen.summary.cpu())
            if step == 1 or step == steps:
                _refuse_nan(finite, step)
            if step % config.every.log == 0 or step == steps:
                watch.report(step, {})
    return Statistics(moments, {name: dispersion(torch.cat(y)) for name, y in summaries.items()})


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
"""Radians squared, or variance on the scale of the balance."""


def fit_normalizers(
    run: Run, setting: Setting
) -> tuple[dict[str, Normalizers], dict[str, BaselineLosses]]:
    """Return kind -> label -> balance, and kind -> loss -> spread.

    From the run's folder, or by the calibration pass.
    """
    config = setting.config
    kinds = (config.normalise, *config.compare)
    path = run.path / "balances.safetensors"
    if not path.is_file():
        context = dict(device=setting.device, autocast=setting.autocast)
        found = calibrate(setting.teachers, setting.train, config, **context)
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
        {kind: _read_normalizers(tensors, kind, setting) for kind in kinds},
        {kind: _read_baseline_losses(tensors, kind, setting) for kind in kinds},
    )


def _read_baseline_losses(
    tensors: Mapping[str, Tensor], kind: str, setting: Setting
) -> BaselineLosses:
    """Return the baseline losses of one kind; refuse 0 where a loss would divide by it."""
    prefix = f"spread/{kind}/"
    found = {k.removeprefix(prefix): v.item() for k, v in tensors.items() if k.startswith(prefix)}
    losses = setting.config.losses
    wanted = losses.weighting == "dispersion" or losses.summary == "angle"
    for name, value in found.items():
        if wanted and value < LEAST_BASELINE:
            raise ValueError(
                f"{name} is all but the same for every image of the calibration (spread "
                f"{value:.1g}), so there is nothing to divide by. Check that teacher's weights, "
                "or leave that loss out."
            )
    return found


def _read_normalizers(tensors: Mapping[str, Tensor], kind: str, setting: Setting) -> Normalizers:
    normalizers = {}
    for name, teacher in setting.teachers.items():
        prefix = f"{kind}/{name}/"
        state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        if state and teacher.spatial_dim:
            normalizers[name] = Normalizer(kind, teacher.spatial_dim)
            normalizers[name].load_state_dict(state)
            normalizers[name].to(setting.device)
    return normalizers
