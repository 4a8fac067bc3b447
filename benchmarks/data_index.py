"""Open a million images in tar shards: without an index, with one, and in workers.

    python benchmarks/data_index.py --images 1000000 --before

It prints the seconds and the memory of each way to open, the start of two workers (forked, and
spawned), and a process's memory over three epochs of `key`, `label` and `read`. Shards are links
to one file of 10,000 tiny members, so they take 20 MB on the disk.
"""

import argparse
import io
import pickle
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from torch.utils.data import DataLoader, Dataset

from zoo.data.index import ShardIndex
from zoo.data.plan import Plan
from zoo.data.shards import shards_in
from zoo.data.sources import Source, open_source

EACH = 10_000
"""Images a shard."""


class Reads(Dataset):
    """The bytes of each image, undecoded."""

    def __init__(self, source: Source):
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> int:
        return len(self.source.key(index)) + len(self.source.read(index))


def write_shards(folder: Path, images: int) -> None:
    file = folder / "of-all"
    with tarfile.open(file, "w") as tar:
        for number in range(EACH):
            for end, data in (("jpg", b"x"), ("cls", str(number % 1000).encode())):
                info = tarfile.TarInfo(f"n{number % 1000:08d}/image_{number:08d}.{end}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    for number in range(-(-images // EACH)):
        (folder / f"train-{number:05d}.tar").symlink_to(file.name)


def memory() -> float:
    """Return the memory of this process in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def opened(folder: Path) -> None:
    """Open it in a process of its own, and print what that took."""
    import safetensors.torch  # noqa: F401  # a run has it loaded already

    before, start = memory(), time.perf_counter()
    source = open_source(folder)
    seconds = time.perf_counter() - start
    print(f"open {len(source):,} images: {seconds:.2f} s, +{memory() - before:.0f} MB", flush=True)
    start = time.perf_counter()
    size = len(pickle.dumps(source))
    print(f"pickle: {size:,} bytes, {time.perf_counter() - start:.2f} s", flush=True)
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch.utils.data"], check=True)
    print(f"python -c 'import torch.utils.data': {time.perf_counter() - start:.2f} s", flush=True)
    for method in ("fork", "spawn"):
        start = time.perf_counter()
        loader = DataLoader(
            Reads(source), 64, sampler=range(128), num_workers=2, multiprocessing_context=method
        )
        next(iter(loader))
        print(f"first batch of two workers ({method}): {time.perf_counter() - start:.2f} s")
    plan = Plan(len(source), 1000, 0)
    for epoch in range(3):
        for step in range(20):
            for index in plan.indices(epoch * len(source) // 1000 + step):
                Reads(source)[int(index)]
        print(f"after 20,000 images of epoch {epoch}: +{memory() - before:.0f} MB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--before", action="store_true", help="open it without an index, too")
    parser.add_argument("--open", type=Path, help="a folder that this process alone opens")
    args = parser.parse_args()
    if args.open:
        opened(args.open)
        return
    again = [sys.executable, __file__, "--open"]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_shards(folder, args.images)
        if args.before:
            print("without an index")
            subprocess.run([*again, place], check=True)
        start = time.perf_counter()
        file = ShardIndex.scan(shards_in(folder)).save()
        size = file.stat().st_size
        print(
            f"index: {time.perf_counter() - start:.1f} s to make, {size / 1e6:.0f} MB", flush=True
        )
        subprocess.run([*again, place], check=True)


if __name__ == "__main__":
    main()
