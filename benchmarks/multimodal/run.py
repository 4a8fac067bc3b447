"""Images and text: easy-VQA from scratch, a mixture of encoders collapsed into one student, a cut.

python3 -m benchmarks.multimodal.run DATA --out results --seconds 480
python3 -m benchmarks.multimodal.run DATA --out results --seconds 480   # goes on from there
python3 -m benchmarks.multimodal.run DATA --out results --table         # prints tables alone

DATA is what `pack` wrote. Each show and seed is a process of its own; several share the GPU, whose
time is the host's to launch small kernels. Results stand in results/SHOW-SEED.json after each cell.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SHOWS = ("easy", "collapse", "latency", "cut")


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=480)
    parser.add_argument("--shows", nargs="+", default=list(SHOWS), choices=SHOWS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--at-once", type=int, default=6, help="processes")
    parser.add_argument("--workers", type=int, default=2, help="reading threads of a process")
    parser.add_argument("--steps", type=int, default=1500, help="on easy-VQA")
    parser.add_argument("--align", type=int, default=400, help="of a ResNet alone; others more")
    parser.add_argument("--second", type=int, default=300, help="a mixture or what stands in")
    parser.add_argument("--distil", type=int, default=500)
    parser.add_argument("--parent-steps", type=int, default=900, help="of what is cut, on easy-VQA")
    parser.add_argument("--recover", type=int, default=300, help="steps of each cut model")
    parser.add_argument("--budget", choices=("latency", "flops"), default="latency")
    parser.add_argument("--share", type=float, default=0.5, help="of that, which cuts keep")
    parser.add_argument("--cut-batch", type=int, default=1024, help="images at once, for latency")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--most", type=int, default=5000, help="questions that are evaluated")
    parser.add_argument("--evaluate", type=int, default=300, help="steps between evaluations")
    parser.add_argument("--tiny", action="store_true", help="rehearse it on a CPU")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--show", choices=SHOWS, help="of this one process")
    parser.add_argument("--seed", type=int, default=0, help="of this one process")
    args = parser.parse_args()
    if args.tiny:
        args.steps = args.align = args.second = args.distil = 2
        args.batch, args.most, args.workers, args.evaluate = 8, 16, 0, 2
        args.parent_steps = args.recover = args.cut_batch = 2
    return args


def main() -> None:
    args = arguments()
    if args.table:
        print(tables(args.out))
    elif args.show:
        carry_out(args)
    else:
        launch(args)
        print(tables(args.out))


def carry_out(args: argparse.Namespace) -> None:
    """Run the cells of one show and seed that are not done, while there is time."""
    import torch

    from benchmarks.multimodal.cells import Cells

    torch.set_num_threads(max(1, args.workers))
    began, file = time.perf_counter(), args.out / f"{args.show}-{args.seed}.json"
    done: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    cells = Cells(args)
    for name, run in getattr(cells, args.show)():
        left = args.seconds - (time.perf_counter() - began)
        if name in done:
            continue
        if left <= 0:
            print(f"{args.show}-{args.seed}: no time for {name}", flush=True)
            break
        done[name] = run()
        temporary = file.with_suffix(".tmp")
        temporary.write_text(json.dumps(done, indent=2) + "\n")
        temporary.replace(file)
        shown = done[name].get("after", {}).get("exact", "")
        used = time.perf_counter() - began
        print(f"[{used:4.0f} s] {args.show}-{args.seed} {name} {shown}", flush=True)


def launch(args: argparse.Namespace) -> None:
    """Start the processes, so many at once, and stop those that are left at the deadline."""
    args.out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    waiting = [
        (show, seed)
        for show in args.shows
        for seed in range(1 if show == "latency" else args.seeds)
    ]
    running: list[tuple[str, subprocess.Popen]] = []
    while waiting or running:
        left = args.seconds - (time.perf_counter() - began)
        while waiting and len(running) < args.at_once and left > 10:
            show, seed = waiting.pop(0)
            own = ["--show", show, "--seed", str(seed), "--seconds", f"{left - 5:.0f}"]
            words = [w for w in sys.argv[1:] if w != "--table"]
            log = (args.out / f"{show}-{seed}.log").open("a")
            command = [sys.executable, "-m", "benchmarks.multimodal.run", *words, *own]
            running.append(
                (f"{show}-{seed}", subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT))
            )
        if left <= 0:
            for name, process in running:
                process.terminate()  # a run saves its step first
                print(f"{name} is stopped; the same command goes on with it", flush=True)
            for _, process in running:
                process.wait()
            return
        for name, process in running:
            if process.poll() is not None:
                used = time.perf_counter() - began
                print(f"[{used:4.0f} s] {name} ended with {process.returncode}", flush=True)
        running = [(name, process) for name, process in running if process.poll() is None]
        time.sleep(0.2)


def tables(out: Path) -> str:
    """Return what was found, as tables of Markdown."""
    found: dict[str, dict[str, Any]] = {
        file.stem: json.loads(file.read_text()) for file in sorted(out.glob("*-*.json"))
    }
    lines = []
    for show in ("easy", "collapse", "cut"):
        seeds = {name: cells for name, cells in found.items() if name.startswith(show)}
        kinds = sorted(
            {k for cells in seeds.values() for c in cells.values() for k in c.get("after", {})}
        )
        kinds = [k for k in kinds if k.endswith("exact")]
        if not seeds:
            continue
        lines += ["", f"| {show} | seed | " + " | ".join(kinds) + " | shuffled | blind | alone |"]
        lines += ["| --- " * (len(kinds) + 5) + "|"]
        for name, cells in seeds.items():
            for cell, values in cells.items():
                if "after" not in values:
                    continue
                row = [f"{values['after'].get(k, float('nan')):.1f}" for k in kinds]
                row += [f"{values[c]['exact']:.1f}" for c in ("shuffled", "blind")]
                row += [f"{values['question_alone']:.1f}"]
                lines.append(f"| {cell} | {name.rpartition('-')[2]} | " + " | ".join(row) + " |")
        lines += costs(seeds) if show == "cut" else differences(seeds)
    for cell, values in found.get("latency-0", {}).items():
        lines.append(f"latency {cell}: {json.dumps(values)}")
    return "\n".join(lines)


def costs(seeds: dict[str, dict[str, Any]]) -> list[str]:
    """Return what each cut keeps and costs, and the joint one's difference from the others'."""
    from zoo.experiments.intervals import compare_seeds

    lines = ["", "| cut | seed | ms | of the parent | before training | millions | keeps |"]
    lines += ["| --- " * 7 + "|"]
    for name, cells in seeds.items():
        whole = cells.get("parent", {}).get("latency_ms")
        for cell, values in cells.items():
            if "latency_ms" not in values:
                lines.append(f"{cell}, seed {name.rpartition('-')[2]}: {values.get('refused', '')}")
                continue
            share = f"{100 * values['latency_ms'] / whole:.0f} %" if whole else ""
            size = sum(values["parameters"].values()) / 1e6
            lines.append(
                f"| {cell} | {name.rpartition('-')[2]} | {values['latency_ms']:.2f} | {share} | "
                f"{values.get('before_training', float('nan')):.1f} | {size:.2f} | "
                f"{values.get('keeps', '')} |"
            )
    for other in ("cut_vision", "cut_language"):
        both = [c for c in seeds.values() if "after" in c.get(other, {}) and "cut_all" in c]
        sides = [[c[side]["after"]["exact"] for c in both] for side in ("cut_all", other)]
        if both:
            lines.append(f"cut_all - {other}: {compare_seeds(*sides).describe()}")
    return lines


def differences(seeds: dict[str, dict[str, Any]]) -> list[str]:
    """Return the mean difference of cells over seeds, with its 95 % interval (Student's t)."""
    from zoo.experiments.intervals import compare_seeds

    lines = []
    pairs = [
        ("adaptors", "mixture"), ("adaptors_tuned", "mixture_tuned"),
        ("adaptors", "without_teachers"), ("adaptors_tuned", "without_teachers"),
    ]  # fmt: skip
    for ours, theirs in pairs:
        both = [
            c for c in seeds.values() if "after" in c.get(ours, {}) and "after" in c.get(theirs, {})
        ]
        if both:
            sides = [[c[side]["after"]["exact"] for c in both] for side in (ours, theirs)]
            lines.append(f"{ours} - {theirs}: {compare_seeds(*sides).describe()}")
    mine, best = [], []
    for cells in seeds.values():
        alone = [v["after"]["exact"] for n, v in cells.items() if n.startswith("alone_")]
        if alone and "after" in cells.get("adaptors", {}):
            mine.append(cells["adaptors"]["after"]["exact"])
            best.append(max(alone))
    if best:
        lines.append(f"adaptors - best single encoder: {compare_seeds(mine, best).describe()}")
    return lines


if __name__ == "__main__":
    main()
