"""Hidden states of a student beside those of its teachers, through learned projections."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn


class HiddenMatch(nn.Module):
    """What is learnt, and remembered, of the distance between hidden states (2407.14679, 3.3).

    The distance is each token's squared error over its target's square, so that no tower's scale
    counts. It is weighed by α = KL / distance of the step before: the step's own would make slices
    of a batch wait for each other.

    Args:
        widths: Of each teacher, by label.
        ours: The student's width.
        count: Number of layers that are compared.
    """

    def __init__(self, ours: int, widths: Mapping[str, int], count: int):
        super().__init__()
        self.labels = tuple(widths)
        self.projections = nn.ModuleList(
            nn.ModuleList(projection(ours, width) for _ in range(count))
            for width in widths.values()
        )
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
        total = torch.zeros((), device=counted.device)
        for project, mine, target in zip(layers, ours, theirs, strict=True):
            guess, target = project(mine).flatten(0, 1), target.flatten(0, 1)
            wide = torch.promote_types(guess.dtype, torch.float32)
            error = (guess.to(wide) - target.to(wide)).square().sum(-1)
            share = error / target.to(wide).square().sum(-1).clamp_min(1e-12)
            total = total + torch.where(counted, share, 0).sum()
        return total / len(layers)

    def weight(self, label: str) -> Tensor:
        """Return α of a teacher."""
        return self.alpha[self.labels.index(label)]

    @torch.no_grad()
    def observe(self, means: Mapping[str, Tensor]) -> None:
        """Remember by how much a step's divergences were larger than its distances."""
        found = [means[f"{label}/kl"] / means[f"{label}/hidden"] for label in self.labels]
        self.alpha.copy_(torch.stack(found).nan_to_num(1.0).clamp(1e-6, 1e6))


def projection(ours: int, theirs: int) -> nn.Linear:
    """Return a linear map that begins as the identity where the widths agree."""
    layer = nn.Linear(ours, theirs, bias=False)
    nn.init.eye_(layer.weight) if ours == theirs else nn.init.orthogonal_(layer.weight)
    return layer
