"""From the losses of a step to the one number that falls: weights, and who is left out."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from zoo.students.student import MESA
from zoo.train.distill.config import Losses, TeacherSpec
from zoo.train.distill.losses import adaloss


class Weighting(nn.Module):
    """Weigh the losses of a step and add them up.

    Each loss has the weight of its teacher's spec, times what `Losses.weighting` says:

        static       1
        adaloss      1 / running mean of the loss (AM-RADIO, 2312.06709, section 3.4)
        uncertainty  L exp(−s) / 2 + s / 2 with learned s = log σ² (Kendall et al., 1705.07115, 3.2)
        dispersion   1 / what calibration measured: the mean squared angle of a teacher's summaries
                     about their mean direction (1 for the angle loss, which is over it already),
                     and the mean variance of its balanced channels (1 for PHI-S)

    The distance to the student's own average (MESA) is no teacher's: none of this touches it.

    Args:
        names: Of the losses, `label/summary` or `label/spatial`, in the order in which they come.
        specs: The teachers by label.
        spreads: What calibration measured, by the names of the losses.
    """

    fixed: Tensor
    teacher: Tensor
    """The row of each loss's teacher; one more than the last for MESA."""
    learned: nn.Parameter | None
    """Log-variances s, for `uncertainty`."""

    def __init__(
        self,
        names: Sequence[str],
        specs: Mapping[str, TeacherSpec],
        losses: Losses,
        baseline_losses: Mapping[str, float],
        *,
        device: torch.device | str = "cpu",
    ):
        super().__init__()
        self.names, self.losses, self.labels = tuple(names), losses, tuple(specs)
        self.rates = {label: spec.rate for label, spec in specs.items()}
        self.running: Tensor | None = None
        """AdaLoss's running means."""
        self._patterns: dict[frozenset[str], tuple[Tensor, Tensor]] = {}
        self.owners = tuple(name.rpartition("/")[0] for name in names)
        weights = [_weight(name, specs, losses, baseline_losses) for name in names]
        rows = [self.labels.index(o) if o in specs else len(self.labels) for o in self.owners]
        self.register_buffer("fixed", torch.tensor(weights, device=device), persistent=False)
        self.register_buffer("teacher", torch.tensor(rows, device=device), persistent=False)
        learned = losses.weighting == "uncertainty"
        self.learned = nn.Parameter(torch.zeros(len(names), device=device)) if learned else None

    def forward(
        self,
        losses: Float[Tensor, " K"] | Float[Tensor, "K B"],
        asked: frozenset[str] | None = None,
    ) -> Float[Tensor, ""]:
        """Return the weighted sum, of means over the batch or of each image's own losses.

        Args:
            asked: The labels of the teachers that were asked in this step; `None` for all.
                Their losses count 1/rate times, so that the expected gradient is that of all.
        """
        means = losses if losses.ndim == 1 else losses.mean(1)
        scale, there = (None, None) if asked is None else self._counted(asked)
        weights, price = self._adapted(means.detach(), scale)
        if losses.ndim == 2:
            weighted = losses.detach() * weights.detach()[:, None]
            means = (self._kept(weighted, there) * losses).mean(1)
        total = ((weights if scale is None else weights * scale) * means).sum()
        return total if price is None else total + price

    def counts(self, asked: frozenset[str]) -> Bool[Tensor, " K"]:
        """Tell which losses count in a step in which `asked` were asked."""
        return self._counted(asked)[0] > 0

    def _adapted(
        self, means: Float[Tensor, " K"], scale: Float[Tensor, " K"] | None
    ) -> tuple[Float[Tensor, " K"], Float[Tensor, ""] | None]:
        """Return the weights, and what the learned ones pay for being low."""
        own = self.teacher == len(self.labels)
        if self.losses.weighting == "adaloss":
            return self.fixed * torch.where(own, 1.0, self._follow(means, scale)), None
        if self.learned is None:
            return self.fixed, None
        precision = torch.where(own, 1.0, 0.5 * torch.exp(-self.learned))
        price = 0.5 * (self.fixed * torch.where(own, 0.0, self.learned)).sum()
        return self.fixed * precision, price

    def _follow(
        self, means: Float[Tensor, " K"], scale: Float[Tensor, " K"] | None
    ) -> Float[Tensor, " K"]:
        """Update the running means with the losses of those asked; NaN stands for none so far."""
        before = self.running
        if scale is None:
            factors, self.running = adaloss(means, before)
            return factors
        if before is None:
            before = torch.full_like(means, torch.nan)
        factors, after = adaloss(means, torch.where(before.isnan(), means, before))
        self.running = torch.where(scale > 0, after, before)
        return torch.where(scale > 0, factors, 0.0)

    def _kept(
        self, weighted: Float[Tensor, "K B"], asked: Bool[Tensor, " T"] | None
    ) -> Float[Tensor, "K B"]:
        """Return each loss of each image its coefficient of teacher-drop."""
        sums = weighted.new_zeros(len(self.labels) + 1, weighted.shape[1])
        each = sums.index_add(0, self.teacher, weighted)[:-1]
        kept = drop_coefficients(each, torch.rand_like(each), self.losses.teacher_drop, asked)
        return torch.cat([kept, torch.ones_like(kept[:1])])[self.teacher]

    def _counted(self, asked: frozenset[str]) -> tuple[Float[Tensor, " K"], Bool[Tensor, " T"]]:
        """Give 1/rate for the losses of those asked, 0 for the others; and who was asked.

        Each pattern goes to the device once, and nothing waits for that.
        """
        if asked not in self._patterns:
            scale = [
                1 / self.rates[o] if o in asked else float(o not in self.rates) for o in self.owners
            ]
            there = [label in asked for label in self.labels]
            device = self.fixed.device
            self._patterns[asked] = (
                torch.tensor(scale).to(device, non_blocking=True),
                torch.tensor(there).to(device, non_blocking=True),
            )
        return self._patterns[asked]


def drop_coefficients(
    losses: Float[Tensor, "T B"],
    draws: Float[Tensor, "T B"],
    chance: float,
    asked: Bool[Tensor, " T"] | None = None,
) -> Float[Tensor, "T B"]:
    """Leave out teachers image by image (UNIC, 2408.05088, teacher dropping regularisation).

    A teacher stays with an image if its draw is at least `chance`, and always if its loss is the
    largest. The coefficients of an image add up to the number of teachers, whoever stays: with
    the chance 0 the sum is the plain one.

    Args:
        losses: Each teacher's weighted loss of each image, without a gradient.
        draws: Uniform in [0, 1).
        asked: Teachers that count in this step at all.
    """
    if asked is not None:
        losses = losses.masked_fill(~asked[:, None], -torch.inf)
    keep = (draws >= chance).scatter(0, losses.argmax(0, keepdim=True), True)
    if asked is not None:
        keep = keep & asked[:, None]
    there = keep.shape[0] if asked is None else asked.sum()
    return there * keep / keep.sum(0).clamp_min(1)


def _weight(
    name: str,
    specs: Mapping[str, TeacherSpec],
    losses: Losses,
    baseline_losses: Mapping[str, float],
) -> float:
    label, _, part = name.rpartition("/")
    if label == MESA:
        return losses.mesa
    weight = specs[label].summary if part == "summary" else specs[label].spatial
    balanced = part == "summary" and losses.summary == "angle"
    return (
        weight / baseline_losses[name]
        if losses.weighting == "dispersion" and not balanced
        else weight
    )
