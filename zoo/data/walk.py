"""Find the image files below a folder: each real file once."""

import logging
import os
from pathlib import Path

from zoo.data.images import IMAGE_SUFFIXES

_log = logging.getLogger(__name__)


def image_files(root: Path, *, again: bool = False) -> list[str]:
    """List the image files below `root` by their sorted paths in it.

    Hidden files and folders are left out, and so is what is no regular file (a pipe, a device).
    Symbolic links are followed, but what they lead to is listed once: under its own path where it
    lies below `root` too. A link back to a folder that is listed already is named in a warning.

    Args:
        again: List every link to an image, also to one that is listed already.

    Raises:
        OSError: `root` itself cannot be listed.
    """
    files: list[str] = []
    links: list[str] = []
    top = os.path.realpath(root)
    todo, waiting = [("", top)], []
    entered = {top}
    while todo or waiting:
        if not todo:  # all that is no link comes first
            waiting.sort(reverse=True)
            link = waiting.pop()
            target = os.path.realpath(root / link)
            if target in entered or _is_inside(top, target):
                _log.warning("%s leads back to %s and is left out.", root / link, target)
                continue
            entered.add(target)
            todo.append((link, target))
        inside, real = todo.pop()
        for entry in _listed(root / inside, must=not inside):
            name = f"{inside}/{entry.name}" if inside else entry.name
            below = os.path.join(real, entry.name)  # noqa: PTH118  # a million of them
            if entry.name.startswith("."):
                continue
            if entry.is_symlink():
                (waiting if os.path.isdir(below) else links).append(name)  # noqa: PTH112
            elif entry.is_dir() and below not in entered:
                entered.add(below)
                todo.append((name, below))
            elif is_image(entry.name) and entry.is_file():
                files.append(name)
    links = sorted(link for link in links if is_image(link) and (root / link).is_file())
    return sorted(files + (links if again else _once(root, links, files)))


def is_image(name: str) -> bool:
    """Return whether a file's name ends as an image's does."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES  # noqa: PTH122


def _is_inside(path: str, folder: str) -> bool:
    return Path(folder) in Path(path).parents


def _listed(folder: Path, *, must: bool) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        if must:
            raise
        _log.warning("%s cannot be listed and is left out: %s", folder, error)
        return []


def _once(root: Path, links: list[str], files: list[str]) -> list[str]:
    """Return the links to images that are not among `files`, one for each image."""
    seen = {os.path.realpath(root / name) for name in files} if links else set()
    kept, double = [], []
    for link in links:
        target = os.path.realpath(root / link)
        (double if target in seen else kept).append(link)
        seen.add(target)
    if double:
        _log.warning(
            "%d links below %s lead to images that are listed already (%s first); each image is "
            "taken once.", len(double), root, double[0],
        )  # fmt: skip
    return kept
