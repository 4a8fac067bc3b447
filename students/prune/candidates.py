"""The candidates of a search: settings of the knobs that meet a budget, built and counted."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from typing import Any

from zoo.axes import Shapes
from zoo.students.prune.budget import Budget
from zoo.students.prune.cost import Cost, CostModel, count_flops
from zoo.students.prune.latency import Predict, fit_latency
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

    def values(self) -> dict[str, float | int]:
        """Return the numbers that a budget may speak of."""
        known = self.cost.as_dict()
        return known if self.latency_ms is None else {**known, "latency_ms": self.latency_ms}

    def as_json(self) -> dict[str, Any]:
        """Return what a file holds of it."""
        return dict(words=self.words, cost=asdict(self.cost), latency_ms=self.latency_ms)


@dataclass
class Search:
    """Find candidates under budgets.

    Args:
        fixed: What the user has said; it stays as it is.
        rank_layers: As for `prune`; which layers go decides what is left to pay for.
        form: As for `prune`.
        measure: Milliseconds of a plan's model on the device at hand, for a budget of latency.
        parts: Of a model of images and text, those that may be cut; by default both.
    """

    parent: Parent
    shapes: Shapes
    budgets: tuple[Budget, ...]
    fixed: Plan
    costs: CostModel
    rank_layers: RankLayers | None = None
    form: str = "library"
    seed: int = 0
    measure: Callable[[Plan], float] | None = None
    parts: tuple[str, ...] = ()
    predict: Predict | None = field(default=None, init=False)

    def candidates(self, number: int) -> list[Candidate]:
        """Return up to `number` models that differ, the most even cut first.

        Raises:
            ValueError: nothing may vary, or no model that can be built meets the budgets.
        """
        knobs = find_knobs(self.shapes, self.fixed, self.fits, self.parts)
        if not knobs:
            raise ValueError(
                f"Nothing of {type(self.parent.model).__name__} can vary: its library builds no "
                "smaller one, or --to fixes all. Take --form zoo."
            )
        if self.measure:
            self.predict = self._fit(knobs)
        limits = self.limits()
        smallest = self.estimate(plan_of(knobs, (0,) * len(knobs), self.fixed))
        if _use(smallest, limits) > 1:
            raise ValueError(_impossible(self.budgets, smallest, self.parent_values()))
        found: dict[Setting, tuple[float, ...]] = {}
        use = self._use_of(knobs, limits)
        for direction in directions(knobs, self.seed):
            setting = settle(knobs, direction, use)
            if setting is not None:
                found.setdefault(setting, direction)
        best = max(map(use, found), default=0.0)
        near = [setting for setting in found if use(setting) >= CLOSE * best]
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

    def limits(self) -> dict[str, float | int]:
        """Return the number of each budget that must not be passed."""
        has = self.parent_values()
        return {budget.what: budget.limit(has) for budget in self.budgets}

    def parent_values(self) -> dict[str, float | int]:
        """Return what the parent costs."""
        return self.estimate(Plan({})).values()

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
            own = sum(count_flops(child, sample).values())
            return own + self.costs.text_flops(plan.sizes(self.shapes), self.layers(plan))
        except (RuntimeError, AssertionError) as error:  # tables of the old width
            raise NotExpressible(f"It does not run at these widths: {error}") from error

    def layers(self, plan: Plan) -> Kept:
        """Return the layers that a plan keeps, for each list that loses some."""
        return choose_layers(self.shapes, plan, self.rank_layers)

    def estimate(self, plan: Plan, words: str | None = None) -> Candidate:
        """Compute the cost of a plan's model from the named shapes."""
        layers = self.layers(plan)
        cost = self.costs.cost(plan.sizes(self.shapes), layers)
        latency = self.predict(self._features(cost, layers)) if self.predict else None
        return Candidate(words_of(plan) if words is None else words, cost, latency)

    def _features(self, cost: Cost, layers: Kept) -> list[float]:
        """Return what latency is made of: the call itself, layers, FLOPs, weights that are read."""
        lists = {entry.path: self.shapes.num_layers(entry.path) for entry in self.shapes.layers}
        stay = sum(len(layers.get(path, range(length))) for path, length in lists.items())
        whole = self.costs.cost()
        flops = cost.flops / whole.flops if cost.flops and whole.flops else 0.0
        return [1.0, stay / max(1, sum(lists.values())), flops, cost.params / whole.params]

    def _fit(self, knobs: list[Knob]) -> Predict:
        """Time the parent, and models with one knob and with all knobs half down."""
        assert self.measure
        top = tuple(len(knob.levels) - 1 for knob in knobs)
        half = tuple(level // 2 for level in top)
        settings = [top, *((*top[:i], half[i], *top[i + 1 :]) for i in range(len(knobs))), half]
        rows, times = [], []
        for setting in settings:
            plan = plan_of(knobs, setting, self.fixed) if setting != top else Plan({})
            if setting == top or self.fits(plan):
                layers = self.layers(plan)
                rows.append(
                    self._features(self.costs.cost(plan.sizes(self.shapes), layers), layers)
                )
                times.append(self.measure(plan))
        return fit_latency(rows, times)

    def _use_of(
        self,
        knobs: list[Knob],
        limits: Mapping[str, float | int],
        factors: Mapping[str, float | int] = {},
    ) -> Callable[[Setting], float]:
        @cache
        def use(setting: Setting) -> float:
            return _use(self.estimate(plan_of(knobs, setting, self.fixed)), limits, factors)

        return use

    def _exact(
        self,
        knobs: list[Knob],
        setting: Setting,
        direction: tuple[float, ...],
        limits: Mapping[str, float | int],
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
        latency = guess.latency_ms
        if self.measure and "latency_ms" in (budget.what for budget in self.budgets):
            latency = self.measure(plan)
        return Candidate(guess.words, cost, latency)


def _use(
    candidate: Candidate, limits: Mapping[str, float | int], factors: Mapping[str, float | int] = {}
) -> float:
    """Return the largest share of a budget that a candidate uses."""
    has = candidate.values()
    return max(has[what] * factors.get(what, 1.0) / limit for what, limit in limits.items())


def _impossible(
    budgets: tuple[Budget, ...], smallest: Candidate, parent: Mapping[str, float | int]
) -> str:
    asked = ",".join(f"{budget.what}={budget.amount:g}" for budget in budgets)
    has = smallest.values()
    nearest = ", ".join(
        f"{b.what}={has[b.what]:,.6g} ({has[b.what] / parent[b.what]:.1%} of the parent's)"
        for b in budgets
    )
    return f"{asked} is impossible here; the smallest model that may be made has {nearest}."
