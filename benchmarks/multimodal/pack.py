"""Draw the pictures of the collapse experiment and pack them, in easy-VQA's layout.

python3 -m benchmarks.multimodal.pack DATA [--train 12000] [--easy-vqa FOLDER]

DATA gets `drawn/` (train.npz, val.npz and their questions), `pictures.npz`, the training pictures
alone for `zoo distill`, and, if a folder is given, `easy_vqa/`, a copy of it.
"""

import argparse
import io
import json
import shutil
from pathlib import Path

import numpy as np

from zoo.data.generated_vqa import Generated


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--train", type=int, default=12000)
    parser.add_argument("--val", type=int, default=2000)
    parser.add_argument("--easy-vqa", type=Path)
    args = parser.parse_args()
    folder = args.data / "drawn"
    folder.mkdir(parents=True, exist_ok=True)
    for part, (name, count) in enumerate((("train", args.train), ("val", args.val))):
        drawn = [Generated(count, part=part).drawn(i) for i in range(count)]
        np.savez_compressed(
            folder / f"{name}.npz", images=np.stack([np.asarray(d.image) for d in drawn])
        )
        rows = [[d.question, d.answer, i, d.kind] for i, d in enumerate(drawn)]
        (folder / f"{name}_questions.json").write_text(json.dumps(rows))
        if name == "train":
            encoded = []
            for each in drawn:
                buffer = io.BytesIO()
                each.image.save(buffer, "PNG")
                encoded.append(buffer.getvalue())
            offsets = np.cumsum([0, *map(len, encoded)])
            np.savez(
                args.data / "pictures.npz", data=np.frombuffer(b"".join(encoded), np.uint8),
                offsets=offsets, labels=np.array([i % 4 for i in range(count)]),
            )  # fmt: skip
    if args.easy_vqa:
        shutil.copytree(args.easy_vqa, args.data / "easy_vqa", dirs_exist_ok=True)
    total = sum(f.stat().st_size for f in args.data.rglob("*") if f.is_file())
    print(f"{args.data}: {total / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
