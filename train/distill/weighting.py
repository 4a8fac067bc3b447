"""From the losses of a step to the one number that falls: weights, and who is left out."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from zoo.students.student import MESA
from zoo.train.distill.config import Losses, TeacherSpec
from zoo.train.distill.losses import adaloss, running_losses


class Weighting(nn.Module):
    """Weigh the losses of a step and add them up.

    Each loss has the weight of its teacher's spec, times what `Losses.weighting` says:

        static       1
        adaloss      1 / running mean of the loss (AM-RADIO, 2312.06709, section 3.4), over the
                     steps before this one, so that no slice of a batch waits for the others; 1
                     for a loss that no step has had yet
        uncertainty  L exp(−s) / 2 + s / 2 with learned s = log σ² (Kendall et al., 1705.07115, 3.2)
        dispersion   1 / what a constant guess loses in the same loss, as calibration measured it
                     (1 for the angle loss, which is over that already, and for MSE under PHI-S)

    The distance to the student's own average (MESA) is no teacher's: none of this touches it.

    Args:
        names: Of the losses, `label/summary` or `label/spatial`, in the order in which they come.
        specs: The teachers by label.
        baseline_losses: What calibration measured, by the names of the losses.
        num_slices: Parts of a step that each call is one of.
    """

    fixed: Tensor
    teacher: Tensor
    """The row of each loss's teacher; one more than the last for MESA."""
    running: Tensor
    """AdaLoss's running means; NaN for a loss that no step has had."""
    learned: nn.Parameter | None
    """Log-variances s, for `uncertainty`."""

    def __init__(
        self,
        names: Sequence[str],
        specs: Mapping[str, TeacherSpec],
        losses: Losses,
        baseline_losses: Mapping[str, float],
        *,
        num_slices: int = 1,
        device: torch.device | str = "cpu",
    ):
        super().__init__()
        self.names, self.losses, self.labels = tuple(names), losses, tuple(specs)
        self.rates = {label: spec.rate for label, spec in specs.items()}
        self.num_slices = num_slices
        self._patterns: dict[frozenset[str], tuple[Tensor, Tensor]] = {}
        self.owners = tuple(name.rpartition("/")[0] for name in names)
        weights = [_weight(name, specs, losses, baseline_losses) for name in names]
        rows = [self.labels.index(o) if o in specs else len(self.labels) for o in self.owners]
        self.register_buffer("fixed", torch.tensor(weights, device=device), persistent=False)
        self.register_buffer("teacher", torch.tensor(rows, device=device), persistent=False)
        learned, adaptive = losses.weighting == "uncertainty", losses.weighting == "adaloss"
        none_yet = torch.full((len(names),), torch.nan, device=device)
        self.register_buffer("running", none_yet, persistent=adaptive)
        self.learned = nn.Parameter(torch.zeros(len(names), device=device)) if learned else None

    def forward(
        self,
        losses: Float[Tensor, " K"] | Float[Tensor, "K B"],
        sampled: frozenset[str] | None = None,
    ) -> Float[Tensor, ""]:
        """Return the weighted sum for a slice of the batch.

        Args:
            losses: What the slice adds to each mean over the batch, or each image of it.
            sampled: The labels of the teachers of this step; `None` for all. Their losses count
                1/rate times, so that the expected gradient is that of all.
        """
        scale, there = (None, None) if sampled is None else self._counted(sampled)
        weights, price = self._adapted()
        if losses.ndim == 2:
            weighted = losses.detach() * weights.detach()[:, None]
            losses = (self._kept(weighted, there) * losses).sum(1)
        total = ((weights if scale is None else weights * scale) * losses).sum()
        return total if price is None else total + price / self.num_slices

    @torch.no_grad()
    def observe(self, means: Float[Tensor, " K"]) -> None:
        """Follow the losses of a whole step; NaN for one that it left out."""
        if self.losses.weighting != "adaloss":
            return
        self.running.copy_(running_losses(means.to(self.running), self.running))

    def _adapted(self) -> tuple[Float[Tensor, " K"], Float[Tensor, ""] | None]:
        """Return the weights, and what the learned ones pay for being low."""
        own = self.teacher == len(self.labels)
        if self.losses.weighting == "adaloss":
            return self.fixed * torch.where(own, 1.0, adaloss(self.running)), None
        if self.learned is None:
            return self.fixed, None
        precision = torch.where(own, 1.0, 0.5 * torch.exp(-self.learned))
        price = 0.5 * (self.fixed * torch.where(own, 0.0, self.learned)).sum()
        return self.fixed * precision, price

    def _kept(
        self, weighted: Float[Tensor, "K B"], sampled: Bool[Tensor, " T"] | None
    ) -> Float[Tensor, "K B"]:
        """Return the coefficient of teacher-drop of each loss of each image."""
        sums = weighted.new_zeros(len(self.labels) + 1, weighted.shape[1])
        each = sums.index_add(0, self.teacher, weighted)[:-1]
        kept = drop_coefficients(each, torch.rand_like(each), self.losses.teacher_drop, sampled)
        return torch.cat([kept, torch.ones_like(kept[:1])])[self.teacher]

    def _counted(self, sampled: frozenset[str]) -> tuple[Float[Tensor, " K"], Bool[Tensor, " T"]]:
        """Return 1/rate for the losses of the teachers sampled, 0 for the others; and who they are.

        Each pattern goes to the device once, and nothing waits for that.
        """
        if sampled not in self._patterns:
            scale = [
                1 / self.rates[o] if o in sampled else float(o not in self.rates)
                for o in self.owners
            ]
            there = [label in sampled for label in self.labels]
            device = self.fixed.device
            self._patterns[sampled] = (
                torch.tensor(scale).to(device, non_blocking=True),
                torch.tensor(there).to(device, non_blocking=True),
            )
        return self._patterns[sampled]


def drop_coefficients(
    losses: Float[Tensor, "T B"],
    draws: Float[Tensor, "T B"],
    chance: float,
    sampled: Bool[Tensor, " T"] | None = None,
) -> Float[Tensor, "T B"]:
    """Leave out teachers image by image (UNIC, 2408.05088, teacher dropping regularisation).

    A teacher stays with an image if its draw is at least `chance`, and always if its loss is the
    largest. All that stay have one coefficient: the loss is the mean over the pairs of a teacher
    and an image that were kept, times the number of teachers, so that the chance 0 gives the plain
    sum. So the worst teacher of an image counts 1 / (1 - chance) times as much as another one.

    Args:
        losses: Each teacher's weighted loss of each image, without a gradient.
        draws: Uniform in [0, 1).
        sampled: Teachers that count in this step at all.
    """
    if sampled is not None:
        losses = losses.masked_fill(~sampled[:, None], -torch.inf)
    keep = (draws >= chance).scatter(0, losses.argmax(0, keepdim=True), True)
    if sampled is not None:
        keep = keep & sampled[:, None]
    pairs = keep.numel() if sampled is None else sampled.sum() * keep.shape[1]
    return pairs * keep / keep.sum().clamp_min(1)


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
    scaled = part == "summary" and specs[label].summary_loss(losses) == "angle"
    return (
        weight / baseline_losses[name]
        if losses.weighting == "dispersion" and not scaled
        else weight
    )
