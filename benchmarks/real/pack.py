"""Pack files into parts of a limited size, for a machine that takes no more at a time.

python3 -m benchmarks.real.pack PARTS pool caltech99 cifar10_small *.whl [--most 58]

PARTS gets part-1.tar, part-2.tar, ..., of whole files, under their names below the parents of the
given paths; `tar -xf PARTS/part-N.tar -C DATA` for each makes DATA hold what was given. With
--short-side N photographs in a folder whose shorter side is larger are shrunk to it (JPEG, quality
85); shards stay as they are. Packing changes nothing of whose the pictures are and of what their
licences ask: no part is for publishing.
"""

import argparse
import io
import tarfile
from pathlib import Path

from PIL import Image

PHOTOS = (".jpg", ".jpeg", ".png")


def content(path: Path, short: int) -> bytes:
    """Return a file, or a photograph that was larger as a smaller JPEG."""
    data = path.read_bytes()
    if not short or path.suffix.lower() not in PHOTOS:
        return data
    with Image.open(io.BytesIO(data)) as image:
        if min(image.size) <= short:
            return data
        factor = short / min(image.size)
        size = (round(image.width * factor), round(image.height * factor))
        buffer = io.BytesIO()
        shrunk = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
        shrunk.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def dealt(sizes: dict[str, int], most: int) -> list[list[str]]:
    """Share out files over as few parts as largest first makes.

    Raises:
        ValueError: a file alone is too large.
    """
    parts: list[list[str]] = []
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        if sizes[name] > most:
            raise ValueError(f"{name} has {sizes[name]:,} bytes, and a part at most {most:,}.")
        room = (part for part in parts if sum(sizes[n] for n in part) + sizes[name] <= most)
        part = next(room, None)
        if part is None:
            parts.append([name])
        else:
            part.append(name)
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", type=Path)
    parser.add_argument("paths", type=Path, nargs="+")
    parser.add_argument("--most", type=float, default=58.0, help="megabytes of a part")
    parser.add_argument("--short-side", type=int, default=0)
    args = parser.parse_args()
    files: dict[str, bytes] = {}
    for path in args.paths:
        inside = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        for file in inside:
            name = file.relative_to(path.parent).as_posix()
            files[name] = content(file, args.short_side)
    # a tar member is padded to 512 bytes behind a header of as many
    sizes = {name: len(data) + 1024 for name, data in files.items()}
    args.parts.mkdir(parents=True, exist_ok=True)
    for number, names in enumerate(dealt(sizes, int(args.most * 1e6) - 20_480), 1):
        target = args.parts / f"part-{number}.tar"
        with tarfile.open(target, "w") as archive:
            for name in sorted(names):
                member = tarfile.TarInfo(name)
                member.size = len(files[name])
                archive.addfile(member, io.BytesIO(files[name]))
        print(f"{target}: {target.stat().st_size / 1e6:.1f} MB, {len(names)} files")


if __name__ == "__main__":
    main()
