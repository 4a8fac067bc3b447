"""How much of the rate of `View.train` in a plain loop the loader keeps, with one worker.

    python benchmarks/data_loader.py --images 512 --size 224

JPEGs of 512 x 342 pixels are packed into a shard and indexed. Three rounds of each, in turn.
"""

import argparse
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
            start = time.perf_counter()
            for position in range(steps * BATCH):
                view.train(source.read(position), plan.draws(position))
            loop = steps * BATCH / (time.perf_counter() - start)
            batches = train_batches(source, view, plan, steps=steps + 4, workers=1)
            for _ in range(4):  # the worker has started and is ahead
                next(batches)
            start = time.perf_counter()
            rest = sum(len(batch["keys"]) for batch in batches)
            loaded = rest / (time.perf_counter() - start)
            print(f"loop {loop:.0f} img/s, loader {loaded:.0f} img/s: {loaded / loop:.0%}")


if __name__ == "__main__":
    main()
