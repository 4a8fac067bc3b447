"""Images that cannot be read: training replaces them, an evaluation leaves them out and counts."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol, TypeVar

from zoo.data.images import UnreadableImage

UNREADABLE = (UnreadableImage, OSError)
"""Errors that are the image's fault: it cannot be decoded, or its file cannot be read."""

TRIES = 16
"""Fewest files in a row that must be unreadable before a folder is taken for a wrong one."""

T = TypeVar("T")
_log = logging.getLogger(__name__)


class Named(Protocol):
    """Samples with names."""

    def __len__(self) -> int: ...
    def key(self, index: int) -> str: ...


class Lost(NamedTuple):
    """An image that could not be read."""

    position: int
    key: str
    reason: str


def try_read(samples: Named, index: int, read: Callable[[int], T]) -> T | Lost:
    """Return `read(index)`, or `Lost` if that sample is unreadable."""
    try:
        return read(index)
    except UNREADABLE as error:
        return Lost(index, samples.key(index), str(error))


def read_next(samples: Named, index: int, read: Callable[[int], T]) -> tuple[T, list[Lost]]:
    """Read a sample of a training, or the next one that can be read; return those before it too.

    The replacement depends on the files alone, so a resumed run makes the same one.

    Raises:
        ValueError: `TRIES` in a row are unreadable, or all.
    """
    lost: list[Lost] = []
    for number in range(min(TRIES, len(samples))):
        found = try_read(samples, (index + number) % len(samples), read)
        if not isinstance(found, Lost):
            return found, lost
        lost.append(found)
    raise wrong_folder(lost)


def readable(
    found: Iterable[T | Lost], known: set[str] | None = None, *, all_of_them: bool = True
) -> Iterator[T]:
    """Yield what an evaluation could read; note the rest.

    Args:
        known: Takes the names of those that are left out; each new one is logged.
        all_of_them: Of a share alone nothing follows from its being unreadable.

    Raises:
        ValueError: none can be read, or not one of the first `TRIES`.
    """
    known = set() if known is None else known
    lost: list[Lost] = []
    some = not all_of_them
    for one in found:
        if not isinstance(one, Lost):
            some = True
            yield one
            continue
        note_lost([one], known)
        lost.append(one)
        if not some and len(lost) == TRIES:
            break
    if lost and not some:
        raise wrong_folder(lost)


def note_lost(lost: Sequence[Lost], known: set[str]) -> None:
    """Add the names of unreadable images to `known`, and log each new one."""
    for _, name, reason in lost:
        if name not in known:
            _log.warning("%s is left out of the evaluation: %s", name, reason)
        known.add(name)


def wrong_folder(lost: Sequence[Lost]) -> ValueError:
    """Return the error for a folder in which one image after another is unreadable."""
    return ValueError(
        f"{len(lost)} images in a row are unreadable, from {lost[0].key} on ({lost[0].reason}); is "
        "this the right folder?"
    )
