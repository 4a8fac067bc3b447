"""What a mixture of experts gains in its first steps over the dense model that it was made of.

A byte-level Llama learns the Python standard library. Then, for each seed, it goes on for STEPS
steps as it is, and so do mixtures that `zoo upcycle` makes of it: E8G4T4, which costs a token what
the dense model does, with its whole scale in the down-projection and with its cube root in each
matrix (as the paper has it, 2410.07524), and E8G1T2, whose MLPs cost twice as much. A seed is one
order of the rows and one draw of the routers; all arms of a seed see the same rows.

A row is written as soon as it is there; rows that are there are not made again.

    python benchmarks/upcycling_steps.py --out /tmp/upcycling --seconds 280
    python benchmarks/upcycling_steps.py --out /tmp/tiny --tiny
"""

import argparse
import json
import shutil
import sysconfig
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from zoo.cli import main as zoo
from zoo.files import written_whole
from zoo.train.device import device_of, machine

ARMS = {
    "dense": None,
    "e8g4t4": ("--experts", "8", "--groups", "4", "--top-k", "4"),
    "e8g4t4, cube root": (
        "--experts", "8", "--groups", "4", "--top-k", "4", "--scale", "cube-root",
    ),
    "e8g1t2": ("--experts", "8", "--groups", "1", "--top-k", "2"),
}  # fmt: skip
SEEDS = (0, 1, 2)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for models and runs")
    parser.add_argument("--results", type=Path, help="JSON file; OUT/results.json by default")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no row that ends later")
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--parent-steps", type=int, default=600)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--megabytes", type=float, default=12.0)
    parser.add_argument("--tiny", action="store_true", help="a rehearsal of seconds on a CPU")
    args = parser.parse_args()
    if args.tiny:
        small = dict(hidden=32, layers=2, length=64, batch=4, parent_steps=8, steps=6)
        vars(args).update(small, megabytes=0.2)
    args.results = args.results or args.out / "results.json"
    return args


def write_text(path: Path, megabytes: float) -> None:
    """Write the sources that come with Python, a document a file."""
    size = 0
    with path.open("w") as file:
        for source in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
            if {"site-packages", "test"} & set(source.parts) or size > megabytes * 1e6:
                continue
            text = source.read_text(errors="ignore")
            size += len(text)
            file.write(json.dumps(dict(text=text)) + "\n")


def train(args: argparse.Namespace, model: Path, out: Path, steps: int, *more: str) -> None:
    """Train a model on the text, by the command; what an earlier call left half done goes on."""
    if (out / "config.json").is_file():
        zoo(["distill", "--resume", str(out)])
        return
    shutil.rmtree(out, ignore_errors=True)
    every = max(1, args.steps // 4)
    how = dict(
        text=args.out / "python.jsonl", model=f"lm:{model}", out=out, length=args.length,
        batch=args.batch, steps=steps, eval_rows=64,
    )  # fmt: skip
    words = [w for name, v in how.items() for w in (f"--{name.replace('_', '-')}", str(v))]
    words += [
        w for what in ("evaluate", "log", "checkpoint") for w in (f"--every.{what}", str(every))
    ]
    zoo(["train-lm", *words, *more])


def parent(args: argparse.Namespace) -> Path:
    """Return the dense model that all arms begin with, trained once."""
    folder = args.out / "parent"
    if not (folder / "about.json").is_file():
        args.out.mkdir(parents=True, exist_ok=True)
        write_text(args.out / "python.jsonl", args.megabytes)
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=257, hidden_size=args.hidden, intermediate_size=3 * args.hidden,
            num_hidden_layers=args.layers, num_attention_heads=8, num_key_value_heads=2,
            head_dim=args.hidden // 8, max_position_embeddings=args.length,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(args.out / "untrained")
        train(args, args.out / "untrained", folder, args.parent_steps, "--optim.lr", "1e-3")
    return folder / "export"


def measure(args: argparse.Namespace, arm: str, seed: int) -> dict[str, Any]:
    """Train one arm, and return its bits a byte on the way."""
    began, dense = time.perf_counter(), parent(args)
    name = arm.replace(", ", "_").replace(" ", "_")
    start, run = dense, args.out / "runs" / f"{name}_{seed}"
    if how := ARMS[arm]:
        start = args.out / "mixtures" / f"{name}_{seed}"
        if not start.is_dir():  # it is written whole or not at all
            zoo(["upcycle", f"lm:{dense}", *how, "--seed", str(seed), "--out", str(start)])
    balance = ("--losses.balance", "0.01", "--losses.router-z", "0.001") if how else ()
    seeded = ("--seed", str(seed + 1))  # 0 is the parent's order of rows
    train(args, start, run, args.steps, "--optim.lr", "3e-4", *seeded, *balance)
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    curve = {row["step"]: row["bpb"] for row in rows if row["kind"] == "eval"}
    seconds = round(time.perf_counter() - began, 1)
    for left in (run / "checkpoints", run / "export"):
        shutil.rmtree(left, ignore_errors=True)
    return dict(arm=arm, seed=seed, bpb=curve, seconds=seconds)


def missing(found: list[dict[str, Any]]) -> Iterator[tuple[str, int]]:
    """Yield what is not measured yet, a seed after the other: each has its control first.

    The side row, which costs a token more than the dense one, comes after all seeds of the rest.
    """
    known, (*main_arms, side) = {(row["arm"], row["seed"]) for row in found}, ARMS
    order = [*product(SEEDS, main_arms), *product(SEEDS, [side])]
    yield from ((arm, seed) for seed, arm in order if (arm, seed) not in known)


def compared(found: list[dict[str, Any]]) -> Iterator[str]:
    """Yield what each arm has at its last step beside the dense model of its seed."""
    last = {(row["arm"], row["seed"]): list(row["bpb"].values()) for row in found}
    for arm in ARMS:
        seeds = [s for s in SEEDS if (arm, s) in last and ("dense", s) in last]
        gains = [last["dense", s][-1] - last[arm, s][-1] for s in seeds]
        if seeds:
            first = sum(last[arm, s][0] for s in seeds) / len(seeds)
            ends = sum(last[arm, s][-1] for s in seeds) / len(seeds)
            yield (
                f"{arm:20} bpb {first:.4f} -> {ends:.4f}; below the dense one by "
                f"{', '.join(f'{gain:+.4f}' for gain in gains)}"
            )


def main() -> None:
    args, began = arguments(), time.perf_counter()
    kept = json.loads(args.results.read_text()) if args.results.is_file() else dict(rows=[])
    rows, longest = kept["rows"], 0.0
    parent(args)
    for arm, seed in missing(rows):
        if time.perf_counter() - began + longest > args.seconds:
            print("No time for another row; the same command goes on.")
            break
        rows.append(measure(args, arm, seed))
        longest = max(longest, rows[-1]["seconds"])
        config = {name: value for name, value in vars(args).items() if isinstance(value, int)}
        about = dict(machine=machine(device_of("auto")), torch=torch.__version__, config=config)
        args.results.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(args.results) as temporary:
            temporary.write_text(json.dumps(dict(about, rows=rows), indent=1) + "\n")
    print(*compared(rows), sep="\n")


if __name__ == "__main__":
    main()
