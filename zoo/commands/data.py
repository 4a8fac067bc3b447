"""`zoo data`: shards of images, packed, indexed and checked."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from zoo.commands.parse import parse


@dataclass(frozen=True, kw_only=True)
class Index:
    path: tyro.conf.Positional[Path]
    """A folder of shards, or one whose sub-folders (train, val) hold them."""


def index(argv: list[str]) -> None:
    """Write where each image of a folder's shards lies into one file beside them.

    A million images then open in a tenth of a second, on every rank and worker. The file is used
    by itself; when shards change it no longer is, and a warning says so.

    Example: zoo data index PATH
    """
    args = parse(Index, argv, "data index", index.__doc__ or "")
    from rich.console import Console
    from rich.progress import track

    from zoo.data.index import ShardIndex
    from zoo.data.shards import folders_of_shards, shards_in

    for folder in folders_of_shards(args.path):
        shards = track(shards_in(folder), f"index {folder}", console=Console(stderr=True))
        made = ShardIndex.scan(shards)
        print(f"{made.save()}  {len(made):,} images in {len(made.shards):,} shards")


COMMANDS = {"index": index}


def main(argv: list[str]) -> None:
    """Work on shards of images; `zoo data` alone lists how."""
    if argv and argv[0] in COMMANDS:
        COMMANDS[argv[0]](argv[1:])
        return
    if argv and argv[0] not in ("-h", "--help"):
        raise ValueError(f"There is no zoo data {argv[0]!r}; there are {', '.join(COMMANDS)}.")
    print("\n".join(f"zoo data {name} --help" for name in COMMANDS))
