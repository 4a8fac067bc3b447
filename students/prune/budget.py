"""Budgets: what a smaller model may cost at most, in words such as `params=0.5,latency_ms=3`."""

import re
from collections.abc import Mapping
from typing import NamedTuple

BUDGETS = ("params", "active", "memory", "flops", "latency_ms")
"""Parameters; those that a token meets; bytes of weights, caches and states; FLOPs of a sample;
milliseconds of a batch on the device at hand."""
UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
AMOUNT = re.compile(r"(\d+\.?\d*(?:e[+-]?\d+)?)([KMGT]?)B?", re.IGNORECASE)


class Budget(NamedTuple):
    """At most `amount` of `what`; as a share of the parent's if it is one."""

    what: str
    amount: float
    is_share: bool

    def limit(self, parent: Mapping[str, float | int]) -> float | int:
        """Return the number that must not be passed.

        Raises:
            ValueError: the parent keeps it already, or has no such number.
        """
        has = parent.get(self.what)
        if has is None:
            raise ValueError(
                f"There is no {self.what} of this model to count; budgets here: "
                f"{', '.join(parent)}."
            )
        limit = self.amount * has if self.is_share else self.amount
        if limit >= has:
            raise ValueError(
                f"{self.what}={self.amount:g} keeps the whole model, which has {has:,.6g}; give "
                "less, or a share such as 0.5."
            )
        return limit


def split_budgets(text: str) -> tuple[tuple[Budget, ...], str]:
    """Take the budgets out of words such as `params=0.5,layers=0.9`.

    Up to 1.0 an amount is a share of the parent's, above it the number itself, which may end in
    K, M, G or T; `latency_ms` is always milliseconds.

    Returns:
        The budgets, and the words that are none.

    Raises:
        ValueError: a budget has no amount above 0, or stands there twice.
    """
    budgets: list[Budget] = []
    words = []
    for word in filter(None, text.replace(" ", "").split(",")):
        what, _, amount = word.partition("=")
        if what not in BUDGETS:
            words.append(word)
            continue
        match = AMOUNT.fullmatch(amount)
        value = float(match[1]) * UNITS[match[2].upper()] if match else 0.0
        if value <= 0 or what in (budget.what for budget in budgets):
            raise ValueError(
                f"{word!r} is no budget; give each once, as a share up to 1 (params=0.5) or a "
                "number (params=20M, latency_ms=3)."
            )
        budgets.append(Budget(what, value, value <= 1 and what != "latency_ms"))
    return tuple(budgets), ",".join(words)
