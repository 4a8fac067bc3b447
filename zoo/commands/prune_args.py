"""`zoo prune`: what its command line says, read without torch."""

from dataclasses import dataclass

import tyro

from zoo.commands.parse import parse


@dataclass(frozen=True, kw_only=True)
class PruneArgs:
    model: tyro.conf.Positional[str]
    """A registered model (vit_small_patch16_224; with /random, its random weights), a folder of
    timm or transformers, or a run."""
    shapes: bool = False
    """Only show what each dim of each tensor is made of."""


def main(argv: list[str]) -> None:
    """Show the named shapes of a model, along which it can be cut.

    Example: zoo prune vit_small_patch16_224/random --shapes
    """
    args = parse(PruneArgs, argv, "prune", main.__doc__ or "")
    from zoo.commands.prune import print_shapes

    print_shapes(args.model)
