"""What a resumed run, and every rank, must have the same: the teachers' weights, and the images."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from zoo.data.mixture import Mixture
from zoo.data.stream import StreamSource
from zoo.teachers.fingerprint import remembered_fingerprint
from zoo.teachers.teacher import Teacher, fingerprint
from zoo.train.distill.setup import Setup
from zoo.train.distill.sizes import at_size
from zoo.train.mesh import by_first, gather, same_on_all
from zoo.train.run import Run

IMAGES = "images.json"
"""In a run's folder: how many images it has, and the shards that were left out."""


def check_same_teachers(run: Run, setup: Setup) -> None:
    """Remember the teachers' weights in a new run; refuse others in a resumed one, or on a rank.

    Rank 0 alone hashes them; that the others have the same is told by sums.

    Raises:
        ValueError: there are others; they are named.
    """
    now = by_first(partial(_fingerprints, setup))
    other = [label for label, teacher in setup.teachers.items() if not _same_on_ranks(teacher)]
    if other:
        raise ValueError(
            f"The weights of {', '.join(other)} are not the same on all ranks; see that every node "
            "has the same files."
        )
    check_same_weights(run, now)


def check_same_weights(run: Run, now: dict[str, str]) -> None:
    """Remember hashes of teachers' weights in a new run; refuse others in a resumed one.

    Args:
        now: By label.

    Raises:
        ValueError: there are others; they are named.
    """
    if before := run.read_json("teachers.json", dict[str, str]):
        changed = [label for label in now if before.get(label) != now[label]]
        if changed:
            raise ValueError(
                f"The run in {run.path} was started with other weights of {', '.join(changed)}; "
                "bring those back, or start a new run with another --out."
            )
    run.write_json("teachers.json", now)


def _fingerprints(setup: Setup) -> dict[str, str]:
    size, config = setup.config.size, setup.config  # all sizes of a teacher share its weights
    names = dict(zip(config.labels, (spec.name for spec in config.teachers), strict=True))
    found = {}
    for label, teacher in setup.teachers.items():
        own = at_size(teacher, size)
        known = label in names
        found[label] = remembered_fingerprint(names[label], own) if known else fingerprint(own)
    return found


def _same_on_ranks(teacher: Teacher) -> bool:
    weights = teacher.state_dict().values() if isinstance(teacher, nn.Module) else ()
    return not weights or same_on_all([weight.nan_to_num() for weight in weights])


def check_same_images(run: Run, setup: Setup) -> None:
    """Remember the images of a new run; refuse others in a resumed one, or on another rank.

    Which image stands at which step depends on how many there are.

    Raises:
        ValueError: there are others; what differs is named.
    """
    lost = sorted(Path(shard).name for shard in setup.lost)
    now: dict[str, Any] = dict(count_images(setup), lost_shards=lost)
    if isinstance(setup.train, Mixture):
        now["sources"] = list(setup.train.lengths)
    for number, other in enumerate(gather(now)):
        refuse_other_images(now, other, f"those of rank {number}")
    if before := run.read_json(IMAGES):
        refuse_other_images(now, before, f"those with which the run in {run.path} began")
    run.write_json(IMAGES, now)


def count_images(setup: Setup) -> dict[str, int | None]:
    """Return how many images a run has; nobody knows how many a stream has."""
    train = None if isinstance(setup.train, StreamSource) else len(setup.train)
    return dict(train=train, val=len(setup.val))


def refuse_other_images(now: Mapping[str, Any], other: Mapping[str, Any], whose: str) -> None:
    """Raise a ValueError that says how two records of `check_same_images` differ, if they do."""
    text = [f"{k}: {other.get(k)} there, {v} here" for k, v in now.items() if v != other.get(k)]
    if text:
        raise ValueError(
            f"The images are not {whose} ({'; '.join(text)}). Bring those back (zoo data check "
            "finds damaged shards), or start a new run with another --out."
        )
