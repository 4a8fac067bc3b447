"""One elastic model against models pruned and distilled one by one, at equal total tokens.

A byte-level Llama learns the Python standard library. Then one run of `zoo elastic` trains all
sizes for STEPS steps; and each size is cut by `zoo prune` and distilled by `zoo distill --text` for
STEPS / (number of sizes) steps, from the same parent, by the same scores. Sizes that were never
named are cut out afterwards too.

    python benchmarks/elastic_twins.py --out /tmp/twins
    python benchmarks/elastic_twins.py --out /tmp/twins --hidden 512 --layers 8 --length 512 \
        --batch 32 --parent-steps 1000 --steps 1200 --megabytes 12
"""

import argparse
import json
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from zoo.cli import main as zoo
from zoo.data.text import open_text
from zoo.language.tokenizers import open_tokenizer
from zoo.train.device import device_of
from zoo.train.distill.token_task import evaluate_text

SIZES = {
    "small": "ffn=0.5,stream=0.5,heads=0.5,layers=0.75",
    "medium": "ffn=0.5,stream=0.75,heads=0.75",
    "large": "ffn=0.75,layers=0.75",
}
BETWEEN = ("ffn=0.6,stream=0.625,heads=0.5,layers=0.75", "ffn=0.75,stream=0.75", "ffn=0.6")
"""Cut out when training is over; no run has seen them."""


def standard_library(place: Path, megabytes: float) -> Path:
    """Write the sources that come with Python, a document a file."""
    out, size = place / "python.jsonl", 0
    if out.exists():
        return out
    with out.open("w") as file:
        for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
            if "site-packages" in path.parts or "test" in path.parts or size > megabytes * 1e6:
                continue
            text = path.read_text(errors="ignore")
            size += len(text)
            file.write(json.dumps(dict(text=text)) + "\n")
    return out


def run(command: str, *words: str, **options: Any) -> None:
    """Call a command of zoo."""
    for name, value in options.items():
        several = isinstance(value, list)
        words += (f"--{name}", *(map(str, value) if several else (str(value),)))
    zoo([command, *words])


def train_parent(args: argparse.Namespace, common: dict[str, Any]) -> None:
    """Train the model that all others come from, on the text alone."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257, hidden_size=args.hidden, intermediate_size=3 * args.hidden,
        num_hidden_layers=args.layers, num_attention_heads=8, num_key_value_heads=2,
        head_dim=args.hidden // 8, max_position_embeddings=args.length, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(args.out / "untrained")
    alone = {"losses.kl": 0, "losses.ce": 1, "optim.lr": 3 * args.lr, "steps": args.parent_steps}
    student, out = f"lm:{args.out / 'untrained'}", args.out / "parent"
    run("distill", student=student, out=out, **alone, **common)


def cut(args: argparse.Namespace, text: Path, words: str, out: Path) -> None:
    """Cut the parent to a size, untrained."""
    options = dict(to=words, data=text, score="activation", samples=128, length=args.length)
    run("prune", str(args.out / "parent" / "export"), out=out, **options)


def train_twins(args: argparse.Namespace, text: Path, common: dict[str, Any], seed: int) -> None:
    """Cut and distil each size on its own."""
    common = common | {"steps": args.steps // len(SIZES), "optim.lr": args.lr, "seed": seed}
    teacher = f"lm:{args.out / 'parent' / 'export'}"
    for name, words in SIZES.items():
        small, out = args.out / f"cut-{name}-{seed}", args.out / f"twin-{name}-{seed}"
        cut(args, text, words, small)
        run("distill", teachers=teacher, student=f"lm:{small}", out=out, **common)


def train_elastic(args: argparse.Namespace, common: dict[str, Any], seed: int) -> None:
    """Train all sizes in one model."""
    sizes = ";".join(f"{name}:{words}" for name, words in SIZES.items())
    common = common | {"steps": args.steps, "optim.lr": args.lr, "seed": seed}
    parent, out = f"lm:{args.out / 'parent' / 'export'}", args.out / f"elastic-{seed}"
    options = dict(sizes=sizes, shares=args.shares, slices=args.slices, out=out)
    run("elastic", parent, **options, **common)


def loss_of(folder: Path, args: argparse.Namespace, text: Path) -> float:
    """Measure a plain checkpoint on the held-out rows."""
    device = device_of("auto")
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    model = model.to(device).eval()
    _, held = open_text(text, open_tokenizer("bytes"), args.length).split(0.05)
    return dict(evaluate_text(model, {}, held, device, rows=256, batch=args.batch))["loss"]


def report(args: argparse.Namespace, text: Path, seeds: list[int]) -> dict:
    """Compare the losses, size by size and seed by seed."""

    def about(name: str) -> dict:
        return json.loads((args.out / name / "about.json").read_text())

    rows = {}
    for name in SIZES:
        ours = [about(f"elastic-{s}")["after"][name]["loss"] for s in seeds]
        theirs = [about(f"twin-{name}-{s}")["after"]["loss"] for s in seeds]
        before = about(f"elastic-{seeds[0]}")["before"][name]["loss"]
        apart = [a / b - 1 for a, b in zip(ours, theirs, strict=True)]
        numbers = about(f"elastic-{seeds[0]}")["numbers"][name]
        rows[name] = dict(numbers=numbers, cut=before, elastic=ours, twin=theirs, apart=apart)
    whole = about(f"elastic-{seeds[0]}")
    between = {}
    for i, words in enumerate(BETWEEN):
        out = args.out / f"between-{i}"
        run("export", str(args.out / f"elastic-{seeds[0]}"), size=words, out=out)
        raw = args.out / f"raw-{i}"
        cut(args, text, words, raw)
        losses = [loss_of(folder, args, text) for folder in (out, raw)]
        between[words] = dict(zip(("elastic", "cut"), losses, strict=True))
    full = dict(before=whole["before"]["full"]["loss"], after=whole["after"]["full"]["loss"])
    return dict(sizes=rows, full=full, between=between)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    for name, default in dict(
        hidden=96, layers=4, length=128, batch=8, parent_steps=500, steps=600, seeds=1, slices=1
    ).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--megabytes", type=float, default=6.0)
    parser.add_argument("--shares", type=float, nargs=4, default=[1, 1, 1, 1])
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    text = standard_library(args.out, args.megabytes)
    common = {"text": text, "length": args.length, "batch": args.batch}
    began, seeds = time.perf_counter(), list(range(args.seeds))
    if not (args.out / "parent" / "about.json").exists():
        train_parent(args, common)
    for seed in seeds:
        if not (args.out / f"elastic-{seed}" / "about.json").exists():
            train_elastic(args, common, seed)
            train_twins(args, text, common, seed)
    found: dict[str, Any] = report(args, text, seeds)
    found["seconds"] = time.perf_counter() - began
    (args.out / "twins.json").write_text(json.dumps(found, indent=2) + "\n")
    for name, row in found["sizes"].items():
        pairs = zip(row["elastic"], row["twin"], row["apart"], strict=True)
        losses = ", ".join(f"{a:.4f} against {b:.4f} ({c:+.1%})" for a, b, c in pairs)
        print(f"{name:8} {row['numbers']:>12,} numbers  cut {row['cut']:.4f}  {losses}")
    print(f"full     before {found['full']['before']:.4f}  after {found['full']['after']:.4f}")
    for words, row in found["between"].items():
        print(f"{words:42} elastic {row['elastic']:.4f}  cut {row['cut']:.4f}")
    print(f"{found['seconds']:.0f} seconds on {device_of('auto')}")


if __name__ == "__main__":
    sys.exit(main())
