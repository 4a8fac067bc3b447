"""Measure LightlyTrain's distillation, with its defaults, beside `distill_speed.py`.

    python benchmarks/beside_lightly_train.py --out lightly.json --seconds 240

Needs the package `lightly_train`. Teacher DINOv2 ViT-B/14 with random weights at 224 px, the photos
of `distill_speed.py`, batch 256; each student runs in a process of its own. What is known is
written to --out after each; students that are there are not measured again. Compare with the rows
"small" and "resnet" of `distill_speed.py`.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from distill_speed import photos

STUDENTS = {"small": "timm/vit_small_patch16_224", "resnet": "timm/resnet50"}
TEACHER = "dinov2/vitb14-noreg-notpretrained"
WINDOW = 5
"""Steps of which a rate is taken, as `distill_speed.py` has them logged."""


def train(student: str, args: argparse.Namespace, began: float) -> dict[str, Any]:
    """Train for some steps in this process; return what they took."""
    import lightly_train  # pyright: ignore[reportMissingImports]
    import torch
    from pytorch_lightning import Trainer  # pyright: ignore[reportMissingImports]
    from pytorch_lightning.profilers import Profiler  # pyright: ignore[reportMissingImports]

    on_gpu, ends = torch.cuda.is_available(), list[float]()

    class Steps(Profiler):
        """Notes when steps end, without touching what is trained."""

        def start(self, action_name: str) -> None: ...
        def stop(self, action_name: str) -> None:
            if action_name == "run_training_batch":
                ends.append(time.time())

    plain, place = Trainer.__init__, args.work / "run"

    def timed(self: Any, *words: Any, **more: Any) -> None:
        plain(self, *words, profiler=Steps(), **more)  # its own options must be plain data

    Trainer.__init__ = timed
    lightly_train.pretrain(
        out=place,
        data=photos(args.photos),
        model=STUDENTS.get(student, student),
        method="distillation",
        method_args=dict(teacher=args.teacher),
        batch_size=args.batch,
        epochs=10**6,
        overwrite=True,
        num_workers="auto" if args.workers is None else args.workers,
        loggers=dict(tensorboard=None),
        trainer_args=dict(max_steps=args.steps),
    )
    if on_gpu:
        torch.cuda.synchronize()
    tail = ends[-max(WINDOW + 1, len(ends) // 3) :]
    windows = [b - a for a, b in zip(tail, tail[WINDOW:], strict=False)]
    return dict(
        version=lightly_train.__version__,
        images_per_s=WINDOW * args.batch / statistics.median(windows),
        images_per_s_mean=args.batch * (len(tail) - 1) / (tail[-1] - tail[0]),
        first=ends[0] - began,
        twentieth=ends[min(19, len(ends) - 1)] - began,
        trained=ends[-1] - began,
        steps=len(ends),
        peak_gib=torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
        timing=profiled(place),
    )


def profiled(place: Path) -> dict[str, float]:
    """Return the seconds of a step and of its wait for data, as LightlyTrain logs them last."""
    found: dict[str, float] = {}
    for file in place.rglob("metrics.jsonl"):
        for line in file.read_text().splitlines():
            found |= {k: v for k, v in json.loads(line).items() if k.startswith("profiling/")}
    return found


def run_child(student: str, args: argparse.Namespace, limit: float) -> dict[str, Any]:
    """Measure a student in a process that is ended after `limit` seconds."""
    found = args.work / "found.json"
    found.unlink(missing_ok=True)
    words = [sys.executable, __file__, "--child", student, "--work", str(args.work)]
    words += ["--photos", str(args.photos), "--batch", str(args.batch), "--steps", str(args.steps)]
    words += ["--teacher", args.teacher]
    words += [] if args.workers is None else ["--workers", str(args.workers)]
    env = dict(os.environ, LIGHTLY_TRAIN_EVENTS_DISABLED="1", BEGAN=str(time.time()))
    log = args.work / f"{student.replace('/', '-')}.log"
    with log.open("w") as file:
        child = subprocess.Popen(words, env=env, stdout=file, stderr=file, start_new_session=True)
        try:
            code = child.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            code = child.wait()
    if code:
        return dict(error=log.read_text()[-1500:])
    return json.loads(found.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("lightly-train.json"))
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "zoo-lightly")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--most", type=float, default=150, help="seconds of one run at most")
    parser.add_argument("--students", nargs="+", default=list(STUDENTS))
    parser.add_argument("--teacher", default=TEACHER)
    parser.add_argument("--photos", type=int, default=6144)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--workers", type=int, help="by default what LightlyTrain chooses")
    parser.add_argument("--child")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.child:
        found = train(args.child, args, float(os.environ["BEGAN"]))
        (args.work / "found.json").write_text(json.dumps(found))
        return
    end = time.monotonic() + args.seconds
    photos(args.photos)
    done = json.loads(args.out.read_text()) if args.out.is_file() else {}
    for student in args.students:
        left = end - time.monotonic()
        if "images_per_s" in done.get(student, {}):
            continue
        if left < min(60, args.most):
            print(f"{student}: not run, the time is over", flush=True)
            continue
        done[student] = run_child(student, args, min(args.most, left))
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(done, indent=1))
        print(f"LightlyTrain {student}: {json.dumps(done[student])}", flush=True)
    shutil.rmtree(args.work / "run", ignore_errors=True)


if __name__ == "__main__":
    main()
