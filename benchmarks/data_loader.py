"""How much of the rate of `View.train` in a plain loop the loader keeps, with one worker.

    python benchmarks/data_loader.py --images 512 --size 224

JPEGs of 512 x 342 pixels are packed into a shard and indexed. Three rounds of each, in turn. On a
busy machine the seconds of both go up and down; what a worker computes for an image, and the main
process beside it, does not.
"""

import argparse
import gc
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from zoo.data.loader import train_batches
from zoo.data.pack import open_folders, write_shards
from zoo.data.plan import Plan
from zoo.data.sources import open_source
from zoo.data.views import View

BATCH = 32


def write_photos(folder: Path, count: int) -> None:
    """Write blurred noise: JPEGs of about 40 kB, as photographs of that size are."""
    folder.mkdir()
    for number in range(count):
        draws = np.random.default_rng(number)
        coarse = Image.fromarray(draws.integers(0, 256, (86, 128, 3), dtype=np.uint8))
        coarse.resize((512, 342), Image.Resampling.BICUBIC).save(
            folder / f"{number}.jpg", quality=90
        )


def computed(who: int) -> float:
    """Return the seconds that this process has computed, or its children that have ended."""
    used = resource.getrusage(who)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--size", type=int, default=224)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_photos(folder / "photos", args.images)
        write_shards(open_folders(folder / "photos"), folder / "shards", shard_bytes=10**9)
        source, view = open_source(folder / "shards"), View(size=args.size)
        plan, steps = Plan(len(source), BATCH, 0), args.images // BATCH
        for _ in range(3):
            start, here = time.perf_counter(), computed(resource.RUSAGE_SELF)
            for position in range(steps * BATCH):
                view.train(source.read(position), plan.draws(position))
            loop = steps * BATCH / (time.perf_counter() - start)
            alone = (computed(resource.RUSAGE_SELF) - here) / (steps * BATCH)
            here, below = map(computed, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
            batches = train_batches(source, view, plan, steps=steps + 4, workers=1)
            for _ in range(4):  # the worker has started and is ahead
                next(batches)
            start = time.perf_counter()
            rest = sum(len(batch["keys"]) for batch in batches)
            loaded = rest / (time.perf_counter() - start)
            print(f"loop {loop:.0f} img/s, loader {loaded:.0f} img/s: {loaded / loop:.0%}")
            del batches
            gc.collect()  # the worker ends, and its time is known
            worker = (computed(resource.RUSAGE_CHILDREN) - below) / ((steps + 4) * BATCH)
            main = (computed(resource.RUSAGE_SELF) - here) / ((steps + 4) * BATCH)
            print(
                f"computed for an image: loop {alone * 1e3:.2f} ms, worker {worker * 1e3:.2f} ms "
                f"({alone / worker:.0%}), main process {main * 1e3:.2f} ms"
            )


if __name__ == "__main__":
    main()
