"""`zoo data`: shards of images, packed, indexed and checked."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import tyro
from rich.console import Console
from rich.progress import Progress, track

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
    from zoo.data.index import ShardIndex
    from zoo.data.shards import folders_of_shards, shards_in

    if not (folders := folders_of_shards(args.path)):
        raise ValueError(
            f"{args.path} is no folder of .tar shards, nor has it a sub-folder of them."
        )
    for folder in folders:
        shards = track(shards_in(folder), f"index {folder}", console=Console(stderr=True))
        made = ShardIndex.scan(shards)
        print(f"{made.save()}  {len(made):,} images in {len(made.shards):,} shards")


@dataclass(frozen=True, kw_only=True)
class Pack:
    folder: tyro.conf.Positional[Path]
    """A folder of images; sub-folders are classes, train and val are packed as such."""
    shards: tyro.conf.Positional[Path]
    """The folder to write; it must not exist yet."""
    shard_mb: int = 1000
    """Megabytes (10^6 bytes) of images after which a shard is closed."""
    dry_run: bool = False
    """Print what would be written, and write nothing."""

    def __post_init__(self):
        if self.shard_mb < 1:
            raise ValueError(f"--shard-mb {self.shard_mb}: a shard takes 1 MB or more.")


def pack(argv: list[str]) -> None:
    """Write a folder of images as webdataset's shards, with their index; whole or not at all.

    Images keep their order and their bytes, so a run on the shards is the run on the folder.

    Example: zoo data pack PHOTOS SHARDS --shard-mb 500
    """
    args = parse(Pack, argv, "data pack", pack.__doc__ or "")
    from zoo.data.pack import open_folders, refuse_existing, write_shards

    refuse_existing(args.shards)
    parts = open_folders(args.folder)
    total = sum(map(len, parts.values()))
    for name, part in parts.items():
        size = sum((part.root / file).stat().st_size for file in part.files)
        print(
            f"{name}  {len(part):,} images of {len(part.classes):,} classes, {size / 1e6:,.1f} MB "
            f"in about {-(-size // (args.shard_mb * 10**6)):,} shards"
        )
    if args.dry_run:
        return
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task(f"pack {args.shards}", total=total)
        written = partial(bar.advance, task)
        made = write_shards(parts, args.shards, shard_bytes=args.shard_mb * 10**6, written=written)
    print(f"{args.shards}  {len(made):,} images in {len(made.shards):,} shards")


@dataclass(frozen=True, kw_only=True)
class Check:
    path: tyro.conf.Positional[Path]
    """A shard, a folder of shards (or of folders of them), a folder of images, or a .npz."""
    workers: int = min(8, os.cpu_count() or 1)
    """Threads that read and decode."""

    def __post_init__(self):
        if self.workers < 1:
            raise ValueError(f"--workers {self.workers}: one thread or more.")


def check(argv: list[str]) -> None:
    """Read every byte and decode every image; list what is wrong, and leave with exit code 1.

    Listed are shards that are cut, damaged or compressed, members that come twice, lead out of the
    folder, are links or declare gigabytes, images that cannot be decoded, labels that are no
    numbers, and an index or list of classes that does not fit.

    Example: zoo data check SHARDS --workers 8
    """
    args = parse(Check, argv, "data check", check.__doc__ or "")
    from zoo.data.check import units

    problems = images = 0
    with Progress(console=Console(stderr=True)) as bar, ThreadPoolExecutor(args.workers) as threads:
        todo = units(args.path)
        task = bar.add_task(f"check {args.path}", total=len(todo))
        for found in threads.map(lambda unit: unit(), todo):
            for problem in found.problems:
                print(f"{problem.place}: {problem.reason}", flush=True)
            problems += len(found.problems)
            images += found.images
            bar.advance(task)
    print(f"{images:,} images can be read; {problems:,} problems.")
    if problems:
        raise SystemExit(1)


COMMANDS = {"pack": pack, "index": index, "check": check}


def main(argv: list[str]) -> None:
    """Work on shards of images; `zoo data` alone lists how."""
    if argv and argv[0] in COMMANDS:
        COMMANDS[argv[0]](argv[1:])
        return
    if argv and argv[0] not in ("-h", "--help"):
        raise ValueError(f"There is no zoo data {argv[0]!r}; there are {', '.join(COMMANDS)}.")
    print("\n".join(f"zoo data {name} --help" for name in COMMANDS))
