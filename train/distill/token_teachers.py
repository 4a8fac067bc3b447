"""A teacher of tokens in a run: its name, and what of it counts how much."""

from dataclasses import dataclass
from typing import Annotated

from zoo.train.ranges import at_least, check_ranges


@dataclass(frozen=True, kw_only=True)
class TokenTeacher:
    """A frozen tower, and what its next tokens and its hidden states count."""

    name: str
    """lm:FOLDER or lm:NAME"""
    kl: Annotated[float, at_least(0, "off")] = 1.0
    """Its share of losses.kl; 0 for one whose head has other rows than the student's."""
    hidden: Annotated[float, at_least(0, "off")] = 1.0
    """Its share of losses.hidden."""

    def __post_init__(self):
        check_ranges(self, f"The teacher {self.name}: ")

    @classmethod
    def parse(cls, text: str) -> "TokenTeacher":
        """Read a name and options: `lm:FOLDER,kl=0,hidden=2`.

        Raises:
            ValueError: there is no such option, or it has no number.
        """
        name, *options = text.split(",")
        numbers = {}
        for option in options:
            key, _, value = option.partition("=")
            if key not in ("kl", "hidden"):
                raise ValueError(
                    f"{option!r} in {text!r}: the options of a teacher of tokens are kl=, hidden=."
                )
            try:
                numbers[key] = float(value)
            except ValueError:
                raise ValueError(f"{option!r} in {text!r} needs a number.") from None
        return cls(name=name, **numbers)
