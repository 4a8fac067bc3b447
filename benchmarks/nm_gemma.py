"""2:4 on a language model: one-shot masks, learned masks, and a mask whose weights are trained.

python3 benchmarks/nm_gemma.py MODEL --train SAMPLES.npy wikitext2_valid.txt \
    --valid wikitext2_valid.txt --test wikitext2_test.txt --json nm.json
python3 benchmarks/nm_gemma.py ... --json nm.json --resume

MODEL is a folder of transformers or a GGUF file; texts are .txt and .jsonl, or .npy with token ids.
MaskLLM's masks learn with the weights frozen, from the divergence to the dense model. The control
takes the mask by magnitude and trains the weights that are left instead, on the same tokens by the
same loss. Where an arm has several rates, all run with the first seed, and the best on the text of
--valid with the others. Perplexity is over all whole rows of the test text. The file is written
after every cell; --resume leaves out those it has; --deadline begins no cell that would end later.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch.nn.utils import clip_grad_norm_

from zoo.data.plan import Plan
from zoo.data.text import TextSource, open_text
from zoo.language.open import open_language_model
from zoo.language.tokenizers import has_tokenizer, open_tokenizer
from zoo.language.tokens import read_tokens, separates_documents
from zoo.students.prune.nm import Layers, Pattern, load_weights, prune_nm, sparse_layers
from zoo.teachers.from_language import LanguageTeacher
from zoo.train.config import Optim
from zoo.train.device import autocast, tensor_cores
from zoo.train.distill.mask_config import ONE_SHOT, Mask
from zoo.train.distill.token_config import TokenLosses
from zoo.train.distill.token_task import TokenTask, evaluate_text
from zoo.train.masks import MaskTask, bake, learn_masks
from zoo.train.optim import build_optimizer, learning_rate
from zoo.train.task import Task

LEARNED = ("learned", "weights")
"""MaskLLM, and the control: magnitude's mask, its weights trained."""


def read_text(path: Path, place: str, length: int) -> TextSource:
    """Open a text or token ids as rows."""
    if path.suffix == ".npy":
        tokens = np.load(path, mmap_mode="r").reshape(-1)
        return TextSource(path.name, tokens, np.array([0, len(tokens)]), length, 1.0)
    return open_text(path, open_tokenizer(place if has_tokenizer(Path(place)) else "bytes"), length)


class Bench:
    """A dense model and what is compared on it."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.pattern = args, Pattern.parse(args.pattern)
        self.device = torch.device(args.device)
        self.model = open_language_model(args.model, device=self.device)
        place = self.model.config.name_or_path or args.model
        mixed = separates_documents(self.model)

        def opened(path: Path) -> TextSource:
            return replace(read_text(path, place, args.length), mixed=mixed)

        self.train = [opened(path) for path in args.train]
        self.valid, self.test = opened(args.valid), opened(args.test)
        self.teacher = LanguageTeacher("dense", copy.deepcopy(self.model))
        self.layers: Layers = sparse_layers(self.model, self.pattern)
        self.dense = {name: m.weight.detach().clone() for name, m in self.layers.items()}
        thinned = sum(weight.numel() for weight in self.dense.values())
        total = sum(p.numel() for p in self.model.parameters())
        print(f"{len(self.layers)} layers, {thinned:,} of {total:,} weights; {self.device}")

    def batches(self, seed: int) -> Iterator[Any]:
        """Return the batches of a seed: the same ones for every arm, files as long as they are."""
        rows = self.args.tokens // self.args.length
        lengths = [len(source) for source in self.train]
        plan = Plan(sum(lengths), rows, seed)
        for step in range(self.args.steps):
            found = []
            for index in plan.indices(step).tolist():
                which = 0
                while index >= lengths[which]:
                    index, which = index - lengths[which], which + 1
                found.append(self.train[which].rows([index]))
            ids, segments = (torch.cat([getattr(t, n) for t in found]) for n in ("ids", "segments"))
            yield replace(found[0], ids=ids, segments=segments, keys=()).to(self.device)

    def perplexity(self, source: TextSource) -> float:
        """Measure the model on a text."""
        self.model.eval()
        rows = min(len(source), self.args.rows)
        with autocast("auto", self.device):
            found = evaluate_text(
                self.model, {}, source, self.device, rows=rows, batch=self.args.eval_batch
            )
            return dict(found)["perplexity"]

    def show(self) -> None:
        """Show the model the calibration rows."""
        rows = range(min(self.args.calibration, len(self.valid)))
        with autocast("auto", self.device):
            for start in rows[:: self.args.eval_batch]:
                part = [i for i in range(start, start + self.args.eval_batch) if i in rows]
                read_tokens(self.model, self.valid.rows(part).to(self.device))

    def restore(self) -> None:
        """Put the dense weights back."""
        load_weights(self.layers, self.dense)
        self.model.requires_grad_(False).eval()

    def one_shot(self, method: str) -> dict[str, Any]:
        """Thin by one look."""
        self.restore()
        if method != "dense":
            name: Any = method
            load_weights(self.layers, prune_nm(self.layers, self.pattern, name, self.show))
        return {}

    def learned(self, seed: int, lr: float) -> dict[str, Any]:
        """Learn masks from a prior, the weights frozen."""
        self.restore()
        prior = None
        if self.args.prior != "none":
            prior = prune_nm(self.layers, self.pattern, self.args.prior, self.show)
        torch.manual_seed(seed)
        masks = learn_masks(self.layers, self.pattern, prior)
        del prior
        begins = self.perplexity(self.valid)
        for mask in masks.values():
            mask.train()
        config = Mask(student="dense", data="text", steps=self.args.steps)
        task = MaskTask(self.inner(), self.layers, config)
        found = self.fit(task, [mask.logits for mask in masks.values()], seed, lr, 0.1)
        bake(self.layers)
        return dict(found, begins_valid=begins)

    def weights(self, seed: int, lr: float) -> dict[str, Any]:
        """Train the weights that magnitude leaves, in the same layers."""
        self.restore()
        load_weights(self.layers, prune_nm(self.layers, self.pattern, "magnitude"))
        kept = {name: layer.weight != 0 for name, layer in self.layers.items()}
        begins, weights = self.perplexity(self.valid), []
        for layer in self.layers.values():
            weights.append(layer.weight.requires_grad_(True))

        def drop() -> None:
            with torch.no_grad():
                for name, layer in self.layers.items():
                    layer.weight.mul_(kept[name])
                    if layer.weight.grad is not None:
                        layer.weight.grad.mul_(kept[name])

        found = self.fit(self.inner(), weights, seed, lr, 0.0, drop)
        return dict(found, begins_valid=begins)

    def inner(self) -> Task:
        return TokenTask(TokenLosses(chunk=self.args.chunk), {"dense": self.teacher})

    def fit(
        self,
        task: Task,
        learn: list[Any],
        seed: int,
        lr: float,
        weight_decay: float,
        drop: Callable[[], None] = lambda: None,
    ) -> dict[str, Any]:
        """Train; return the seconds, and the loss in steps."""
        steps = self.args.steps
        optim = Optim(lr=lr, weight_decay=weight_decay, ema=0.0)
        groups = [dict(params=learn, weight_decay=weight_decay)]
        optimizer = build_optimizer(self.model, optim, groups)
        state: Any = SimpleNamespace(model=self.model)
        losses, began = [], time.perf_counter()
        with tensor_cores(self.device):
            for step, batch in enumerate(self.batches(seed)):
                with autocast("auto", self.device):
                    targets = task.targets(batch, step)
                    found = task.losses(state, batch, targets, step)
                    count = int(batch.counted.sum())
                    total = task.weigh({n: part.total / count for n, part in found.items()}, step)
                total.backward()
                drop()
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, steps, optim)
                clip_grad_norm_(learn, optim.clip)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                drop()
                losses.append(next(iter(found.values())).total.detach() / count)
        values = torch.stack(losses).tolist()
        shown = {str(step): values[step] for step in sorted({0, steps // 4, steps // 2, steps - 1})}
        return dict(
            train_seconds=time.perf_counter() - began, kl=shown,
            last_kl=statistics.fmean(values[-max(1, steps // 10) :]),
        )  # fmt: skip


def cells(args: argparse.Namespace, done: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield what is to be measured, in order; `done` grows while it runs."""
    for method in args.methods:
        if method not in LEARNED:
            yield dict(method=method)
            continue
        rates = args.mask_lr if method == "learned" else args.weight_lr
        first, *others = args.seeds
        for lr in rates:
            yield dict(method=method, seed=first, lr=lr)
        tried = [row for row in done if row["method"] == method and row["seed"] == first]
        if len(tried) == len(rates):
            best = min(tried, key=lambda row: row["valid"])["lr"]
            for seed in others:
                yield dict(method=method, seed=seed, lr=best)


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure every cell that is not there yet."""
    began, settings = time.perf_counter(), settings_of(args)
    done: list[dict[str, Any]] = []
    if args.resume and args.json and args.json.is_file():
        before = json.loads(args.json.read_text())
        if before["settings"] != settings:
            raise SystemExit(f"{args.json} was measured with other settings; give another --json.")
        done = before["cells"]
    bench = Bench(args)
    longest: dict[bool, float] = {}
    for cell in cells(args, done):
        if any(cell.items() <= row.items() for row in done):
            continue
        start, learns = time.perf_counter(), cell["method"] in LEARNED
        if start - began + longest.get(learns, 0.0) > args.deadline:
            print(f"{args.deadline:g} s are over: {cell} and what follows is left for --resume")
            break
        if learns:
            found = getattr(bench, cell["method"])(cell["seed"], cell["lr"])
        else:
            found = bench.one_shot(cell["method"])
        found |= dict(valid=bench.perplexity(bench.valid), test=bench.perplexity(bench.test))
        for name, layer in bench.layers.items():
            assert cell["method"] == "dense" or bench.pattern.holds(layer.weight), name
        done.append(cell | found | dict(seconds=time.perf_counter() - start))
        longest[learns] = max(longest.get(learns, 0.0), done[-1]["seconds"])
        row = done[-1]
        about = " ".join(f"{key} {value}" for key, value in cell.items())
        print(
            f"{about:40} test {row['test']:.3f}  valid {row['valid']:.3f}  {row['seconds']:.1f} s"
        )
        if args.json:
            save(args.json, settings, done)
    return done


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return what a resumed file must have been measured with."""
    free = ("json", "resume", "deadline", "methods", "seeds", "mask_lr", "weight_lr", "device")
    return json.loads(
        json.dumps({k: v for k, v in vars(args).items() if k not in free}, default=str)
    )


def save(path: Path, settings: dict[str, Any], done: list[dict[str, Any]]) -> None:
    """Write the file whole."""
    cuda = torch.cuda.is_available()
    about = dict(
        torch=torch.__version__, device=torch.cuda.get_device_name() if cuda else "cpu",
        settings=settings, cells=done,
    )  # fmt: skip
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(about, indent=1) + "\n")
    temporary.rename(path)


def table(done: list[dict[str, Any]]) -> None:
    """Print perplexities: mean and deviation over seeds at each arm's best rate."""
    print(f"\n{'method':12} {'lr':>8} {'seeds':>5} {'test':>18}")
    for method in dict.fromkeys(row["method"] for row in done):
        rows = [row for row in done if row["method"] == method]
        by_rate: dict[Any, list[dict[str, Any]]] = {}
        for row in rows:
            by_rate.setdefault(row.get("lr"), []).append(row)
        for lr, same in by_rate.items():
            values = [row["test"] for row in same]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            mean = f"{statistics.fmean(values):.3f}{spread}"
            print(f"{method:12} {lr or '':>8} {len(same):>5} {mean:>18}")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    made.add_argument("model", help="a folder of transformers, or a GGUF file")
    made.add_argument("--train", type=Path, nargs="+", required=True)
    made.add_argument("--valid", type=Path, required=True, help="calibration, and choice of rates")
    made.add_argument("--test", type=Path, required=True)
    made.add_argument("--json", type=Path)
    made.add_argument("--resume", action="store_true")
    made.add_argument("--deadline", type=float, default=float("inf"), help="seconds")
    made.add_argument("--pattern", default="2:4")
    made.add_argument("--methods", nargs="+", default=["dense", *ONE_SHOT, *LEARNED])
    made.add_argument("--prior", default="magnitude", choices=[*ONE_SHOT, "none"])
    made.add_argument("--steps", type=int, default=150)
    made.add_argument("--tokens", type=int, default=8192, help="a step")
    made.add_argument("--length", type=int, default=1024)
    made.add_argument("--chunk", type=int, default=1024)
    made.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    made.add_argument("--mask-lr", type=float, nargs="+", default=[1e-3])
    made.add_argument("--weight-lr", type=float, nargs="+", default=[1e-4, 3e-4])
    made.add_argument("--calibration", type=int, default=128, help="rows of --valid")
    made.add_argument("--rows", type=int, default=10**9, help="most rows that are evaluated")
    made.add_argument("--eval-batch", type=int, default=8)
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return made


if __name__ == "__main__":
    table(run(parser().parse_args()))
