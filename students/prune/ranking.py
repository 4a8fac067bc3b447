"""A score by its name, and what it needs of a model and its data, measured once."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor, nn

from zoo.axes import Axis, Shapes
from zoo.students.prune import score
from zoo.students.prune.proof import is_experts
from zoo.students.prune.removal import removal
from zoo.students.prune.taps import Inputs, OverSamples, OverTokens, Total, alone
from zoo.students.prune.taylor import LossOf, taylor

BLIND = ("magnitude", "random")
"""Those that look at no data."""


@dataclass(kw_only=True)
class Measure:
    """A model, its data, and every score of the axes that are cut.

    Args:
        batches: Gives the samples again, each time it is asked.
        experts: "load": how many tokens a router gives them; "routing": with which probability.
        loss: Of Taylor's score; `zoo.students.prune.taylor.own_loss` if None.
    """

    model: nn.Module
    shapes: Shapes
    batches: Callable[[], Iterable[Inputs]]
    axes: tuple[Axis, ...]
    seed: int = 0
    tokens: OverTokens = "mean"
    samples: OverSamples = "l2"
    experts: str = "load"
    loss: LossOf | None = None
    total: Total = alone
    known: dict[tuple[str, Axis], tuple[Tensor, tuple[Axis, ...]]] = field(default_factory=dict)
    left_out: dict[Axis, tuple[Tensor, tuple[Axis, ...]]] = field(default_factory=dict)
    """Axes that no product reads: their units were left out one by one."""

    def rank(self, name: str) -> Callable[[Axis], tuple[Tensor, tuple[Axis, ...]]]:
        """Return the score of a name: from an axis to its units' scores [*by, units], and `by`.

        Raises:
            ValueError: by the score, a weight that reads an axis was not seen.
        """

        def score(axis: Axis) -> tuple[Tensor, tuple[Axis, ...]]:
            if (name, axis) not in self.known:
                self.known[name, axis] = self._score(name, axis)
            return self.known[name, axis]

        return score

    @cached_property
    def _columns(self) -> dict[str, Tensor]:
        return score.activation(
            self.model,
            self.shapes,
            self.batches(),
            self.axes,
            tokens=self.tokens,
            samples=self.samples,
            total=self.total,
        )

    @cached_property
    def _weighed(self) -> dict[str, Tensor]:
        return score.contribution(self._columns, self.shapes, self.model.state_dict())

    @cached_property
    def _wanda(self) -> dict[str, Tensor]:
        norms = score.activation(
            self.model, self.shapes, self.batches(), self.axes, tokens="l2", total=self.total
        )
        return score.contribution(norms, self.shapes, self.model.state_dict(), order=1)

    @cached_property
    def _gradients(self) -> dict[Axis, Tensor]:
        return taylor(
            self.model, self.shapes, self.batches(), self.axes, self.loss, total=self.total
        )

    def _score(self, name: str, axis: Axis) -> tuple[Tensor, tuple[Axis, ...]]:
        model, shapes, batches = self.model, self.shapes, self.batches
        if name == "random":
            return score.random(shapes, axis, self.seed), ()
        if name == "magnitude":
            return score.magnitude(shapes, model.state_dict(), axis), ()
        if name == "taylor":
            return self._gradients[axis], score.outer_axes(shapes, axis)
        if name == "x" and score.x_rows(shapes, axis):
            return score.x_score(model, shapes, batches(), axis, total=self.total)
        if is_experts(shapes, axis) and self.experts == "routing":
            return score.routing(model, shapes, batches(), [axis], total=self.total)[axis], ()
        if not shapes.readers(axis) and not is_experts(shapes, axis):
            if axis not in self.left_out:
                self.left_out[axis] = removal(model, shapes, batches(), axis, total=self.total)
            return self.left_out[axis]
        columns = {"contribution": "_weighed", "wanda": "_wanda"}.get(name, "_columns")
        return score.unit_scores(getattr(self, columns), shapes, axis)
