"""Measure what share of a model's own speed `zoo embed` reaches, on a few repeated JPEGs.

    python benchmarks/embed_rate.py --model vit_large_patch16_224 --workers 16 --precision amp

The images are generated, encoded as JPEG and repeated, so that they cost as much to decode as real
ones and nothing has to be downloaded. The last line compares the speed after each part's first
shard with `zoo bench`.
"""

import io
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from PIL import Image

from zoo.commands.embed import Embed, embed

DISTINCT = 64


@dataclass(frozen=True, kw_only=True)
class Rate:
    model: str = "vit_large_patch16_224"
    images: int = 20_000
    side: int = 256
    """Pixels of the stored images, before they are cropped and resized."""
    batch: int = 128
    workers: int = 8
    rows: int = 4_000
    """Images per shard."""
    precision: Literal["float32", "amp"] = "amp"


def write_images(file: Path, count: int, side: int) -> None:
    """Write `count` JPEGs of smooth noise, a few of them repeatedly, as one `.npz`."""
    draws, coded = np.random.default_rng(0), []
    for _ in range(min(DISTINCT, count)):
        coarse = draws.integers(0, 255, (16, 16, 3), dtype=np.uint8)
        out = io.BytesIO()
        smooth = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
        grain = draws.integers(-20, 20, (side, side, 3))
        pixels = np.clip(np.asarray(smooth).astype(int) + grain, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(out, "JPEG", quality=85)
        coded.append(np.frombuffer(out.getvalue(), np.uint8))
    order = np.arange(count) % len(coded)
    lengths = np.array([len(coded[i]) for i in order])
    np.savez(
        file,
        data=np.concatenate([coded[i] for i in order]),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        labels=order,
    )


def main(args: Rate) -> None:
    """Embed, and print both speeds."""
    with tempfile.TemporaryDirectory() as place:
        data = Path(place) / "images"
        data.mkdir()
        write_images(data / "train.npz", args.images, args.side)
        write_images(data / "val.npz", DISTINCT, args.side)
        embed(
            Embed(
                data=data,
                out=Path(place) / "features",
                model=args.model,
                batch=args.batch,
                workers=args.workers,
                rows=args.rows,
                precision=args.precision,
                bench=True,
            )
        )


if __name__ == "__main__":
    main(tyro.cli(Rate, description=__doc__))
