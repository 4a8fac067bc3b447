"""What decoding JPEGs on the GPU would give the loader: nvJPEG through torchvision.

    python benchmarks/gpu_jpeg.py --out gpu-jpeg.json

Decodes batches of 256 JPEGs of 500 x 375 pixels, crops each at random and resizes it to 224 px, as
`zoo.data.views.View.train` does in a worker, and prints images a second of both, how long the host
is busy for a batch (it launches training steps, too), and how far pixels are from Pillow's.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from distill_speed import photos

from zoo.data.images import EncodedImage


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("gpu-jpeg.json"))
    parser.add_argument("--photos", type=int, default=6144)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=8)
    args = parser.parse_args()
    files = sorted(photos(args.photos).glob("*.jpg"))[: args.batch]
    data = [torch.from_numpy(np.frombuffer(f.read_bytes(), np.uint8).copy()) for f in files]
    draws = np.random.default_rng(0)

    def decode() -> Any:
        from torchvision.io import ImageReadMode, decode_jpeg

        return decode_jpeg(data, mode=ImageReadMode.RGB, device=args.device)

    def resize(images: Any) -> Any:
        found = []
        for image in images:
            height, width = image.shape[1:]
            h, w = (int(side * draws.uniform(0.75, 1)) for side in (height, width))
            top, left = draws.integers(0, height - h + 1), draws.integers(0, width - w + 1)
            part = image[None, :, top : top + h, left : left + w].float()
            size = (args.size, args.size)
            found.append(F.interpolate(part, size, mode="bicubic", antialias=True))
        return torch.cat(found).round().clamp(0, 255).byte()

    found = dict[str, Any](device=args.device, batch=len(data))
    for name, work in (("decode", decode), ("decode, crop, resize", lambda: resize(decode()))):
        whole, host = timed(work, args)
        found[name] = dict(images_per_s=len(data) / whole, host_ms=1e3 * host)
        print(f"{name}: {len(data) / whole:,.0f} img/s, host busy {1e3 * host:.1f} ms", flush=True)
    theirs = [np.asarray(EncodedImage(file.read_bytes()).rgb()) for file in files[:8]]
    gaps = [np.abs(a.cpu().permute(1, 2, 0).numpy().astype(int) - b)
            for a, b in zip(decode()[:8], theirs, strict=True)]  # fmt: skip
    found["to Pillow"] = dict(
        most=int(max(g.max() for g in gaps)), mean=float(np.mean([g.mean() for g in gaps]))
    )
    print(f"beside Pillow: {found['to Pillow']}")
    args.out.write_text(json.dumps(found, indent=1))


def timed(work: Any, args: argparse.Namespace) -> tuple[float, float]:
    """Return the median seconds of a batch, and those until the host could do something else."""
    whole, host = [], []
    for _ in range(args.rounds):
        settle(args.device)
        began = time.perf_counter()
        work()
        host.append(time.perf_counter() - began)
        settle(args.device)
        whole.append(time.perf_counter() - began)
    return statistics.median(whole[2:]), statistics.median(host[2:])


def settle(device: str) -> None:
    """Wait until the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
