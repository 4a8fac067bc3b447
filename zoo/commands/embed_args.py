"""`zoo embed`: what its command line says, read without torch."""

import shlex
from dataclasses import replace

from zoo.commands.embed_request import Embed
from zoo.commands.parse import parse


def main(argv: list[str]) -> None:
    """Write the features of many images in shards; zoo eval --features reads them.

    Example: zoo embed PHOTOS features/mine --model runs/mine/export --workers 8
    """
    request = parse(Embed, argv, "embed", main.__doc__ or "")
    from zoo.commands.embed import embed

    print(embed(replace(request, command=shlex.join(["zoo", "embed", *argv]))))
