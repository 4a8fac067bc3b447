"""Two different teachers into one student: hidden states as they are, scaled, or by PHI-S.

    python benchmarks/text_teachers.py --out runs/text_teachers [--seconds 200] [--seeds 3]

Bytes of the Python standard library. Two teachers learn them: a Llama, whose next tokens and hidden
states are learnt, and a Gemma 3 (windows of attention, other norms, other scales), whose hidden
states alone are. Then `zoo distill --text` distils both into a smaller Llama, for each seed and
each `--normalise`, next tokens alone beside them. What is measured on held-out files: bits a byte,
the divergence from the first teacher, and how much of each teacher's states a linear map of the
student's leaves unexplained (ridge regression on training rows): a measure in which no arm has its
own space. Each arm's row is written as it comes; the same command goes on. Nothing that may not end
in --seconds is begun.
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from zoo.commands.distill.text import distill_text
from zoo.experiments.corpus import standard_library
from zoo.experiments.tables import print_table
from zoo.experiments.verdict import judge_gaps, spread
from zoo.language.tokens import Tokens, read_tokens
from zoo.language.towers import create_language_model
from zoo.teachers.from_language import open_language
from zoo.train.config import Device, Every, Optim
from zoo.train.device import device_of
from zoo.train.distill.token_config import DistillText, TokenLosses

ARMS = ("none", "standardize", "phi_s")
"""Of hidden states; `logits` beside them has none."""
SIZES = dict[str, Any](
    full=dict(
        first=dict(d_model=512, num_hidden_layers=6),
        second=dict(d_model=384, num_hidden_layers=6),
        student=dict(d_model=256, num_hidden_layers=4),
        length=512, batch=32, teacher_steps=300, steps=200, rows=128, calibration=16,
    ),
    tiny=dict(
        first=dict(d_model=32, num_hidden_layers=2),
        second=dict(d_model=48, num_hidden_layers=2),
        student=dict(d_model=16, num_hidden_layers=1),
        length=32, batch=4, teacher_steps=3, steps=3, rows=16, calibration=2,
    ),
)  # fmt: skip
"""full: an H200, minutes. tiny: to see that it works."""
FAMILIES = dict(first="llama", second="gemma3", student="llama")


def main() -> None:
    """Train the teachers, distil every arm, print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/text_teachers"))
    parser.add_argument("--scale", default="full", choices=SIZES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    began, scale = time.perf_counter(), SIZES[args.scale]
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "rows.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    write_text(args.out, scale["length"])
    for name in ("first", "second"):
        teacher(args.out, name, scale, args.device)
    taken: list[float] = []
    for seed in range(args.seeds):
        for arm in ("logits", *ARMS):
            if any(row["arm"] == arm and row["seed"] == seed for row in rows):
                continue
            spent = time.perf_counter() - began
            if spent + (taken[-1] if taken else 0) > args.seconds:
                print(f"left out for time: {arm}, seed {seed}")
                continue
            row = distilled(args.out, arm, seed, scale, args.device)
            taken.append(row["seconds"])
            rows.append(row)
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
    report(rows, args.out)


def write_text(out: Path, length: int) -> None:
    """Write the standard library's bytes as two texts, to learn and to measure on."""
    corpus = standard_library(length)
    for name, source in dict(train=corpus.train, val=corpus.held).items():
        path = out / f"{name}.txt"
        if not path.is_file():
            path.write_text(source.tokens.tobytes().decode("utf-8", "replace"), encoding="utf-8")


def options(out: Path, scale: Mapping[str, Any], device: str, seed: int, steps: int) -> dict:
    """Return what all trainings share."""
    return dict(
        data=str(out / "train.txt"), val=str(out / "val.txt"), length=scale["length"],
        batch=scale["batch"], steps=steps, seed=seed, device=device, eval_rows=scale["rows"],
        calibration=scale["calibration"], every=Every(log=100, checkpoint=steps, evaluate=steps),
    )  # fmt: skip


def teacher(out: Path, name: str, scale: Mapping[str, Any], device: str) -> None:
    """Train a teacher on the text, unless it is there."""
    run = out / name
    if (run / "about.json").is_file():
        return
    begin = out / f"{name}_begin"
    torch.manual_seed(0)
    create_language_model(FAMILIES[name], **scale[name]).save_pretrained(begin)
    distill_text(
        DistillText(
            **options(out, scale, device, 0, scale["teacher_steps"]), student=f"lm:{begin}",
            out=run, losses=TokenLosses(kl=0.0, ce=1.0),
            optim=Optim(lr=1e-3, weight_decay=0.1, ema=0.0),
        )
    )  # fmt: skip


def distilled(
    out: Path, arm: Any, seed: int, scale: Mapping[str, Any], device: Device
) -> dict[str, Any]:
    """Distil one student and measure it."""
    began = time.perf_counter()
    begin = out / f"student_{seed}"
    torch.manual_seed(seed)
    create_language_model(FAMILIES["student"], **scale["student"]).save_pretrained(begin)
    first, second = (f"lm:{out / name / 'export'}" for name in ("first", "second"))
    hidden = arm != "logits"
    config = DistillText(
        **options(out, scale, device, seed, scale["steps"]),
        student=f"lm:{begin}",
        teachers=(first, f"{second},kl=0") if hidden else (first,),
        normalise=arm if hidden else "none",
        losses=TokenLosses(hidden=float(hidden)),
        optim=Optim(lr=1e-3, weight_decay=0.1, ema=0.0),
        out=out / f"{arm}_{seed}",
    )
    run = distill_text(config, resume=(config.out / "config.json").is_file())
    after = run.read_json("about.json")["after"]
    kl = next(value for name, value in after.items() if name.startswith("kl/"))
    left = unexplained(out, run.path / "export", scale, device)
    row = dict[str, Any](arm=arm, seed=seed, bpb=after["bpb"], kl=kl, **left)
    row["seconds"] = time.perf_counter() - began
    print(json.dumps(row), flush=True)
    return row


@torch.no_grad()
def unexplained(out: Path, student: Path, scale: Mapping[str, Any], device: Device) -> dict:
    """Return what share of the variance of each teacher's last states is left on held-out rows."""
    corpus, where = standard_library(scale["length"]), device_of(device)
    names = dict(student=str(student), first=str(out / "first/export"))
    names["second"] = str(out / "second/export")
    models = {
        name: open_language(f"lm:{place}", device=where).model for name, place in names.items()
    }
    states = []
    for source in (corpus.train, corpus.held):
        number = min(scale["rows"], len(source))
        parts: dict[str, list[torch.Tensor]] = {name: [] for name in models}
        for start in range(0, number, 16):
            ids = source.rows(range(start, min(start + 16, number))).ids.to(where)
            tokens = Tokens(ids, torch.zeros_like(ids))
            for name, model in models.items():
                parts[name].append(read_tokens(model, tokens).last.flatten(0, 1).double())
        states.append({name: torch.cat(part) for name, part in parts.items()})
    learned, held = states
    return {f"left/{name}": _left(learned, held, name) for name in ("first", "second")}


def _left(train: Mapping[str, torch.Tensor], held: Mapping[str, torch.Tensor], name: str) -> float:
    x, y = (_with_one(part["student"]) for part in (train, held))
    gram = x.T @ x
    gram += 1e-4 * gram.diagonal().mean() * torch.eye(len(gram)).to(gram)
    weight = torch.linalg.solve(gram, x.T @ train[name])
    error = (y @ weight - held[name]).square().sum()
    return (error / (held[name] - train[name].mean(0)).square().sum()).item()


def _with_one(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x, torch.ones_like(x[:, :1])], dim=1)


def report(rows: Sequence[Mapping[str, Any]], out: Path) -> None:
    """Print the arms, and PHI-S against each other arm by the experiments' rule."""
    measures = ("bpb", "kl", "left/first", "left/second")
    body, found = [], []
    for arm in ("logits", *ARMS):
        mine = sorted((row for row in rows if row["arm"] == arm), key=lambda row: row["seed"])
        if mine:
            body.append(
                [arm, *(spread([row[m] for row in mine]) for m in measures), str(len(mine))]
            )
    print_table("text teachers", ["hidden states", *measures, "seeds"], body)
    for other in ("logits", *ARMS[:-1]):
        for measure in measures:
            sides = [
                {r["seed"]: r[measure] for r in rows if r["arm"] == arm} for arm in ("phi_s", other)
            ]
            seeds = sorted(set(sides[0]) & set(sides[1]))
            if seeds:
                gaps = [sides[0][seed] - sides[1][seed] for seed in seeds]
                found.append(dict(other=other, measure=measure, gaps=gaps, **judge_gaps(gaps)))
    head = ["phi_s against", "measure", "mean (below 0: PHI-S is better)", "deviation", "verdict"]
    print_table(
        "verdicts",
        head,
        [
            [f["other"], f["measure"], f"{f['mean']:+.4f}", f"{f['deviation']:.4f}", f["verdict"]]
            for f in found
        ],
    )
    (out / "result.json").write_text(json.dumps(dict(rows=list(rows), verdicts=found), indent=2))


if __name__ == "__main__":
    main()
