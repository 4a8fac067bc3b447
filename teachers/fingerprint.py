"""The hash of a teacher's weights, remembered: seven billion of them take a minute to hash."""

import hashlib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from torch import nn

from zoo.files import cache_dir, written_whole
from zoo.teachers.name import FOLDER, TeacherName
from zoo.teachers.teacher import Teacher, fingerprint

LIBRARIES = ("backbone-zoo", "torch", "timm", "transformers", "open_clip_torch", "safetensors")
"""What makes a network of a file: another version may make another one."""


def remembered_fingerprint(name: str, teacher: Teacher) -> str:
    """Return `fingerprint(teacher)`, hashed once for each state of the files that it comes from.

    A file counts as the same by its path, size and time; the hashes stand in the user's cache
    folder. A teacher without a file (random, of a rule) is hashed each time.

    Args:
        name: As `open_teacher` took it.
    """
    files = weight_files(TeacherName.parse(name))
    if not files or not isinstance(teacher, nn.Module):
        return fingerprint(teacher)
    dtypes = sorted({str(value.dtype) for value in teacher.state_dict().values()})
    about = [name, type(teacher), teacher.size, teacher.summary_dim, teacher.spatial_dim, dtypes]
    about += [(path.resolve(), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    about += [_version(library) for library in LIBRARIES]
    key = hashlib.sha256("\n".join(map(str, about)).encode()).hexdigest()[:32]
    path = cache_dir() / "fingerprints" / key
    try:
        if len(known := path.read_text()) == 16:
            return known
    except (OSError, ValueError):
        pass
    found = fingerprint(teacher)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as temporary:
            temporary.write_text(found)
    except OSError:  # a cache that cannot be written costs time, no more
        pass
    return found


def weight_files(name: TeacherName) -> list[Path]:
    """List the files on this machine that a teacher's weights come from, as far as they are known.

    Of a folder, or a repository that the hub's cache has, all that lie in it count.
    """
    if name.weights == "random":
        return []
    if name.weights and Path(name.weights).is_file():
        return [Path(name.weights)]
    folder: Path | None = None
    if name.name.startswith(FOLDER):
        folder = Path(name.name.removeprefix(FOLDER))
    elif name.kind == "hf" and Path(name.name).is_dir():
        folder = Path(name.name)
    elif name.kind == "hf" and name.name.count("/") == 1:
        kept = try_to_load_from_cache(name.name, "config.json")
        folder = Path(kept).parent if isinstance(kept, str) else None
    if folder is None or not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_file())


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "none"
