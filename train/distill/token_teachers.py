"""A teacher of tokens in a run: its name, and what of it counts how much."""

from dataclasses import dataclass
from typing import Annotated, Any, get_args

from zoo.train.distill.config import Place
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
    place: Place = "replicate"
    """shard: its blocks are cut over the processes of a node, and gathered when they run."""

    def __post_init__(self):
        if self.place not in get_args(Place):
            raise ValueError(
                f"The teacher {self.name} has place={self.place}; it is replicate (a whole copy on "
                "each process) or shard (cut over the processes of a node)."
            )
        check_ranges(self, f"The teacher {self.name}: ")

    @classmethod
    def parse(cls, text: str) -> "TokenTeacher":
        """Read a name and options: `lm:FOLDER,kl=0,hidden=2,place=shard`.

        Raises:
            ValueError: there is no such option, or it has no number.
        """
        name, *options = text.split(",")
        given: dict[str, Any] = {}
        for option in options:
            key, _, value = option.partition("=")
            if key not in ("kl", "hidden", "place"):
                raise ValueError(
                    f"{option!r} in {text!r}: the options of a teacher of tokens are kl=, hidden=, "
                    "place=."
                )
            if key == "place":
                given[key] = value
                continue
            try:
                given[key] = float(value)
            except ValueError:
                raise ValueError(f"{option!r} in {text!r} needs a number.") from None
        return cls(name=name, **given)
