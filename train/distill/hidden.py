"""Hidden states of a student beside those of its teachers, through learned projections."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn


class HiddenMatch(nn.Module):
    """What is learnt, and remembered, of the distance between hidden states (2407.14679, 3.3).

    Of states as they are it is each token's squared error over its target's square, so that no
    tower's scale counts. Of normalised ones (PHI-S, 2410.01680) it is the mean squared error over
    channels, as of a vision teacher's map, and the projections have a bias, as its heads do, and
    begin at 0. It is weighed by α = KL / distance of the step before: the step's own would make
    slices of a batch wait for each other. For a teacher whose next tokens do not count, α takes the
    mean KL of those whose do, or the text's cross-entropy; 1 without either.

    Args:
        ours: The student's width.
        widths: Of each teacher, by label.
        count: Number of layers that are compared.
        normalised: Whether there will be `normalizers`.
    """

    def __init__(
        self, ours: int, widths: Mapping[str, int], count: int, *, normalised: bool = False
    ):
        super().__init__()
        self.labels = tuple(widths)
        self.projections = nn.ModuleList(
            nn.ModuleList(projection(ours, width, normalised=normalised) for _ in range(count))
            for width in widths.values()
        )
        self.normalizers: Mapping[str, Sequence[nn.Module]] = {}
        """Of each teacher, for each layer; no part of what is learnt."""
        self.alpha: Tensor
        self.register_buffer("alpha", torch.ones(len(widths)))

    def forward(
        self,
        label: str,
        ours: Sequence[Float[Tensor, "B T D"]],
        theirs: Sequence[Float[Tensor, "B T C"]],
        counted: Bool[Tensor, " n"],
    ) -> Float[Tensor, ""]:
        """Return the sum over the tokens that count of the mean distance over the layers."""
        layers: nn.ModuleList = self.projections[self.labels.index(label)]  # pyright: ignore[reportAssignmentType]
        normalizers = self.normalizers.get(label) or [None] * len(layers)
        total = torch.zeros((), device=counted.device)
        for project, normalizer, mine, target in zip(
            layers, normalizers, ours, theirs, strict=True
        ):
            guess, target = project(mine).flatten(0, 1), target.flatten(0, 1)
            wide = torch.promote_types(guess.dtype, torch.float32)
            guess, target = guess.to(wide), target.to(wide)
            if normalizer is None:
                error = (guess - target).square().sum(-1)
                each = error / target.square().sum(-1).clamp_min(1e-12)
            else:
                with torch.no_grad():
                    target = normalizer(target)
                each = (guess - target).square().mean(-1)
            total = total + torch.where(counted, each, 0).sum()
        return total / len(layers)

    def weight(self, label: str) -> Tensor:
        """Return α of a teacher."""
        return self.alpha[self.labels.index(label)]

    @torch.no_grad()
    def observe(self, means: Mapping[str, Tensor]) -> None:
        """Remember by how much a step's divergences were larger than its distances."""
        divergences = [value for name, value in means.items() if name.endswith("/kl")]
        shared = _mean(divergences) if divergences else means.get("ce")
        for row, label in enumerate(self.labels):
            divergence = means.get(f"{label}/kl", shared)
            if divergence is not None:
                found = divergence / means[f"{label}/hidden"]
                self.alpha[row] = found.nan_to_num(1.0).clamp(1e-6, 1e6)


def _mean(values: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(values)).mean()


def projection(ours: int, theirs: int, *, normalised: bool = False) -> nn.Linear:
    """Return a linear map that begins as the identity where the widths agree.

    Args:
        normalised: It answers in a space of its own, and begins as its mean, 0.
    """
    layer = nn.Linear(ours, theirs, bias=normalised)
    if normalised:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
        return layer
    nn.init.eye_(layer.weight) if ours == theirs else nn.init.orthogonal_(layer.weight)
    return layer
