"""The candidates of a search: settings of the knobs that meet a budget, built and counted."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from zoo.axes import Shapes
from zoo.students.prune.budget import Budget
from zoo.students.prune.cost import Cost, CostModel, count_flops
from zoo.students.prune.library import Kept, NotExpressible, Parent
from zoo.students.prune.outline import RankLayers, outline, sample_of
from zoo.students.prune.plan import Plan
from zoo.students.prune.prune import choose_layers
from zoo.students.prune.search import (
    CLOSE,
    Knob,
    Setting,
    directions,
    find_knobs,
    plan_of,
    settle,
    spread,
    words_of,
)

ROUNDS = 3
"""How often a candidate is moved after it was measured."""


@dataclass(frozen=True)
class Candidate:
    """A model that a library can build within a budget."""

    words: str
    """What `--to` takes to make it."""
    cost: Cost
    latency_ms: float | None = None

    def values(self) -> dict[str, float]:
        """Return the numbers that a budget may speak of."""
        known = self.cost.as_dict()
        return known if self.latency_ms is None else {**known, "latency_ms": self.latency_ms}


Predict = Callable[[Cost, int], float]
"""Milliseconds of a model with this cost and number of layers."""


@dataclass(frozen=True)
class Latency:
    """Milliseconds on the device at hand: measured for a plan, predicted for a cost."""

    measure: Callable[[Plan], float]
    predict: Predict
    parent: float


@dataclass
class Search:
    """Find candidates under budgets.

    Args:
        fixed: What the user has said; it stays as it is.
        rank_layers: As for `prune`; which layers go decides what is left to pay for.
        form: As for `prune`.
        latency: Needed for a budget of latency.
    """

    parent: Parent
    shapes: Shapes
    budgets: tuple[Budget, ...]
    fixed: Plan
    costs: CostModel
    rank_layers: RankLayers | None = None
    form: str = "library"
    seed: int = 0
    latency: Latency | None = None

    def candidates(self, number: int) -> list[Candidate]:
        """Return up to `number` models that differ, the most even cut first.

        Raises:
            ValueError: nothing may vary, or no model that can be built meets the budgets.
        """
        limits = self.limits()
        knobs = find_knobs(self.shapes, self.fixed, self.fits)
        if not knobs:
            raise ValueError(
                f"Nothing of {type(self.parent.model).__name__} can vary: its library builds no "
                "smaller one, or --to fixes all. Take --form zoo."
            )
        smallest = self.estimate(plan_of(knobs, (0,) * len(knobs), self.fixed))
        if _use(smallest, limits) > 1:
            raise ValueError(_impossible(self.budgets, smallest, self.parent_values()))
        found: dict[Setting, tuple[float, ...]] = {}
        for direction in directions(knobs, self.seed):
            setting = settle(knobs, direction, self._use_of(knobs, limits))
            if setting is not None:
                found.setdefault(setting, direction)
        uses = {s: _use(self.estimate(plan_of(knobs, s, self.fixed)), limits) for s in found}
        near = [s for s in found if uses[s] >= CLOSE * max(uses.values())]
        chosen: dict[str, Candidate] = {}
        for setting in spread(knobs, near):
            candidate = self._exact(knobs, setting, found[setting], limits)
            if candidate and candidate.words:
                chosen.setdefault(candidate.words, candidate)
            if len(chosen) == number:
                break
        if not chosen:
            raise ValueError(
                f"None of {len(near)} models at this budget can be built by the library of "
                f"{type(self.parent.model).__name__}; take --form zoo, or another budget."
            )
        return list(chosen.values())

    def limits(self) -> dict[str, float]:
        """Return the number of each budget that must not be passed."""
        has = self.parent_values()
        return {budget.what: budget.limit(has) for budget in self.budgets}

    def parent_values(self) -> dict[str, float]:
        """Return what the parent costs."""
        latency = self.latency.parent if self.latency else None
        return Candidate("", self.costs.cost(), latency).values()

    def fits(self, plan: Plan) -> bool:
        """Tell whether the library builds what a plan makes, and whether that runs."""
        try:
            self.count(plan)
        except NotExpressible:
            return False
        return True

    def count(self, plan: Plan) -> int | None:
        """Build a plan's model on the meta device and run an image through it; return its FLOPs."""
        child = outline(self.parent, self.shapes, plan, self.rank_layers, self.form)
        sample = sample_of(self.parent)
        if sample is None:
            return None
        try:
            return sum(count_flops(child, sample).values())
        except (RuntimeError, AssertionError) as error:  # tables of the old width
            raise NotExpressible(f"It does not run at these widths: {error}") from error

    def layers(self, plan: Plan) -> Kept:
        """Return the layers that a plan keeps, for each list that loses some."""
        return choose_layers(self.shapes, plan, self.rank_layers)

    def estimate(self, plan: Plan) -> Candidate:
        """Compute the cost of a plan's model from the named shapes."""
        layers = self.layers(plan)
        cost = self.costs.cost(plan.sizes(self.shapes), layers)
        lost = sum(self.shapes.num_layers(path) - len(kept) for path, kept in layers.items())
        total = sum(self.shapes.num_layers(entry.path) for entry in self.shapes.layers)
        latency = self.latency.predict(cost, total - lost) if self.latency else None
        return Candidate(words_of(plan), cost, latency)

    def _use_of(
        self, knobs: list[Knob], limits: Mapping[str, float], factors: Mapping[str, float] = {}
    ) -> Callable[[Setting], float]:
        return lambda setting: _use(
            self.estimate(plan_of(knobs, setting, self.fixed)), limits, factors
        )

    def _exact(
        self,
        knobs: list[Knob],
        setting: Setting,
        direction: tuple[float, ...],
        limits: Mapping[str, float],
    ) -> Candidate | None:
        """Build a candidate, count or measure it, and move it to where the budget is met."""
        best = None
        for _ in range(ROUNDS):
            plan = plan_of(knobs, setting, self.fixed)
            guess, exact = self.estimate(plan), self._measured(plan)
            if exact is None:
                break
            if _use(exact, limits) <= 1:
                best = exact
            theirs = guess.values()
            factors = {what: value / theirs[what] for what, value in exact.values().items()}
            moved = settle(knobs, direction, self._use_of(knobs, limits, factors))
            if moved is None or moved == setting:
                break
            setting = moved
        return best

    def _measured(self, plan: Plan) -> Candidate | None:
        guess = self.estimate(plan)
        try:
            flops = self.count(plan)
        except NotExpressible:
            return None
        cost = guess.cost if flops is None else replace(guess.cost, flops=flops)
        return Candidate(guess.words, cost, self.latency.measure(plan) if self.latency else None)


def _use(
    candidate: Candidate, limits: Mapping[str, float], factors: Mapping[str, float] = {}
) -> float:
    """Return the largest share of a budget that a candidate uses."""
    has = candidate.values()
    return max(has[what] * factors.get(what, 1.0) / limit for what, limit in limits.items())


def _impossible(
    budgets: tuple[Budget, ...], smallest: Candidate, parent: Mapping[str, float]
) -> str:
    asked = ",".join(f"{budget.what}={budget.amount:g}" for budget in budgets)
    has = smallest.values()
    nearest = ", ".join(
        f"{b.what}={has[b.what]:,.6g} ({has[b.what] / parent[b.what]:.1%} of the parent's)"
        for b in budgets
    )
    return f"{asked} is impossible here; the smallest model that may be made has {nearest}."
