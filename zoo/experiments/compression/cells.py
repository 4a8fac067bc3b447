"""The cells of the experiment: which there are, and what each trains and measures."""

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from zoo.data.plan import Plan, mix
from zoo.experiments.compression import units
from zoo.experiments.compression.config import CompressionExperiment
from zoo.experiments.compression.hybrid import build_hybrid
from zoo.experiments.corpus import ByteFeed, Corpus, standard_library
from zoo.experiments.fast_mamba import fast
from zoo.experiments.short_runs import ShortTraining, short_training, train_short
from zoo.students.prune.library import Parent, rebuilt
from zoo.students.prune.nm import Pattern, load_weights, prune_nm, sparse_layers
from zoo.teachers.from_language import LanguageTeacher
from zoo.train.config import Training
from zoo.train.device import autocast, device_of, tensor_cores
from zoo.train.distill.token_config import TokenLosses
from zoo.train.distill.token_task import TokenTask, evaluate_text
from zoo.train.masks import MaskTask, learn_masks
from zoo.train.task import Task

STUDENTS = ("prune_kd", "prune_ce", "random_kd", "scratch_kd", "scratch_ce", "scratch_ce_long")
"""Students of one size: cut by contribution or at random, or new; taught by the parent (kd) or by
the text (ce). `long` sees as many more bytes as the parent's passes cost."""
MASKS = (
    "magnitude", "wanda", "sparsegpt", "maskllm_magnitude", "maskllm_wanda", "maskllm_none",
    "trained_weights",
)  # fmt: skip
"""2:4 by one shot, by learned masks with a prior, and the control: the weights are trained under
the magnitude's mask."""
MASK_RATE = 1e-3
PLAIN_BATCH = 4
"""Rows at a time through transformers' own pass, whose plain scan in older versions (5.17) makes
tensors of 0.5 GB a row."""


@dataclass(frozen=True)
class Cell:
    """One student: what it is, and its seed."""

    arm: str
    way: str
    seed: int
    share: float = 1.0
    """Of heads or channels that stay."""
    rate: float = 0.0
    """Learning rate; 0 for no training."""

    @property
    def key(self) -> str:
        """Name it among all cells."""
        return f"{self.arm}-{self.way}-{self.share:g}-{self.rate:g}-{self.seed}"


def teachers(config: CompressionExperiment) -> list[Cell]:
    """Return the cells that come first."""
    rate = config.sizes.teacher_rate
    return [Cell("teacher", "teacher", seed, rate=rate) for seed in range(config.seeds)]


def cells(config: CompressionExperiment) -> Iterator[Cell]:
    """Yield the cells that need their teacher alone, in the order in which they should run.

    Of the students only the first seed's, with every rate; `tuned` has the rest.
    """
    scale = config.sizes
    for arm in config.arms:
        for seed in range(config.seeds):
            if arm in ("heads", "channels"):
                draws = [f"random_{i}" for i in range(scale.draws)]
                ways = [*units.HEADS, *draws] if arm == "heads" else [*units.CHANNELS]
                for share in scale.shares:
                    for way in ways:
                        draw = int(way[7:]) if way.startswith("random_") else 0
                        learns = share in scale.distilled_shares and draw < scale.distilled_draws
                        yield Cell(arm, way, seed, share, scale.rate if learns else 0.0)
            elif arm == "masks":
                for way in MASKS:
                    learns = way.startswith("maskllm") or way == "trained_weights"
                    rate = scale.rate if way == "trained_weights" else MASK_RATE
                    yield Cell(arm, way, seed, rate=rate if learns else 0.0)
            elif seed == 0:
                for way in STUDENTS:
                    yield from (Cell(arm, way, 0, rate=rate) for rate in scale.rates)


def tuned(config: CompressionExperiment, rows: Sequence[Mapping[str, Any]]) -> Iterator[Cell]:
    """Yield the students of the other seeds, each at the rate that was best on the first."""
    for seed in range(1, config.seeds):
        for way in STUDENTS:
            mine = [r for r in rows if (r["arm"], r["way"], r["seed"]) == ("students", way, 0)]
            if mine:
                best = min(mine, key=lambda row: row["curve"][-1][1])
                yield Cell("students", way, seed, rate=best["rate"])


@dataclass
class Subject:
    """A seed's teacher: whole on the CPU, to be cut, and with its scores."""

    parent: Parent
    scores: units.Scores
    columns: dict[str, Tensor]


class Bench:
    """Where cells are trained and measured: the text, the device, the teachers made so far."""

    def __init__(self, config: CompressionExperiment):
        self.config, self.scale = config, config.sizes
        self.device = device_of(config.device)
        self.compiled = config.compile == "yes" or (
            config.compile == "auto" and self.device.type == "cuda"
        )
        self.subject = cache(self._subject)
        self.teacher = cache(self._teacher)

    @cached_property
    def corpus(self) -> Corpus:
        """The standard library's files."""
        return standard_library(self.scale.length)

    def folder(self, seed: int) -> Path:
        """Return where a seed's teacher is kept."""
        return self.config.out / "teachers" / str(seed)

    def _subject(self, seed: int) -> Subject:
        saved = torch.load(self.folder(seed) / "teacher.pt", weights_only=True)
        model = build_hybrid(self.scale.shape)
        model.load_state_dict(saved["model"])
        return Subject(Parent(model.eval()), saved["scores"], saved["columns"])

    def _teacher(self, seed: int) -> LanguageTeacher:
        model = copy.deepcopy(self.subject(seed).parent.model).to(self.device)
        return LanguageTeacher("teacher", self.fast(model))

    def fast(self, model: Any) -> Any:
        """Let a model on the device run through the experiment's own functions."""
        return fast(model.to(self.device), compiled=self.compiled)

    def rows(self, seed: int, number: int, *, batch: int = PLAIN_BATCH) -> list[Tensor]:
        """Return rows of the training text, drawn by a seed, in batches of ids on the device."""
        plan = Plan(len(self.corpus.train), min(number, batch), mix(seed, 31))
        feed = ByteFeed(self.corpus.train, plan, self.device)
        return [tokens.ids for tokens in feed.batches(0, math.ceil(number / plan.batch))]

    def bits(self, model: Any) -> float:
        """Return bits a byte on the held-out rows."""
        training = model.training
        model.eval()
        rows, batch = min(self.scale.held, len(self.corpus.held)), self.scale.batch
        with tensor_cores(self.device), autocast(self.config.precision, self.device):
            found = dict(
                evaluate_text(model, {}, self.corpus.held, self.device, rows=rows, batch=batch)
            )
        model.train(training)
        return found["bpb"]

    def learn(self, model: Any, cell: Cell, task: Task, size: float, points: Sequence[float]):
        """Train on `size` bytes; return [bytes, bits a byte] before, at the points and at the end.

        All cells of a seed see the same rows in the same order.
        """
        curve = [[0, self.bits(model)]]
        if not cell.rate:
            return curve
        step_bytes = self.scale.batch * self.scale.length
        steps = max(1, round(size / step_bytes))
        marks = {math.ceil(point / step_bytes) for point in points}
        plan = Plan(len(self.corpus.train), self.scale.batch, mix(cell.seed, 32))
        feed = ByteFeed(self.corpus.train, plan, self.device)

        def evaluate(model: Any, step: int) -> None:
            if step in marks:
                curve.append([step * step_bytes, self.bits(model)])

        config = short_training(
            steps=steps, batch=self.scale.batch, length=self.scale.length, rate=cell.rate,
            seed=cell.seed, precision=self.config.precision,
        )  # fmt: skip
        train_short(model, task, feed, config, evaluate=evaluate, title=cell.key)
        curve.append([steps * step_bytes, self.bits(model)])
        return curve

    def task(self, cell: Cell, *, taught: bool) -> TokenTask:
        """Learn the teacher's next bytes, or the text's."""
        chunk = self.scale.batch * self.scale.length
        losses = TokenLosses(kl=float(taught), ce=float(not taught), chunk=chunk)
        return TokenTask(losses, {"teacher": self.teacher(cell.seed)} if taught else {})

    # What the arms do

    def run(self, cell: Cell) -> dict[str, Any]:
        """Make, train and measure the student of a cell, and return its row."""
        began = time.perf_counter()
        torch.manual_seed(mix(cell.seed, 30))
        found = getattr(self, f"_run_{cell.arm}")(cell)
        seconds = time.perf_counter() - began
        return dict(asdict(cell), key=cell.key, seconds=seconds, **found)

    def _run_teacher(self, cell: Cell) -> dict[str, Any]:
        scale = self.scale
        model = self.fast(build_hybrid(scale.shape))
        points = _log_grid(scale.teacher_bytes, 8)
        task = self.task(cell, taught=False)
        curve = self.learn(model, cell, task, scale.teacher_bytes, points)
        model.eval()
        rows = self.rows(cell.seed, scale.removed, batch=scale.removed)
        with autocast(self.config.precision, self.device):
            without = units.leave_one_out(model, rows[0])
        del model.base_model.forward  # hooks and taps look at modules
        scores, columns = units.score_units(model, self.rows(cell.seed, scale.calibration))
        scores["leave_one_out"] = without
        folder = self.folder(cell.seed)
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: t.cpu() for name, t in model.state_dict().items()}
        torch.save(dict(model=state, scores=scores, columns=columns), folder / "teacher.pt")
        return dict(parameters=_count(model), curve=curve)

    def _run_heads(self, cell: Cell) -> dict[str, Any]:
        return self._recover(cell, units.cut_heads, self.scale.shape.heads)

    def _run_channels(self, cell: Cell) -> dict[str, Any]:
        return self._recover(cell, units.cut_channels, self.scale.shape.channels)

    def _recover(self, cell: Cell, cut: Callable[..., Any], whole: int) -> dict[str, Any]:
        subject, number = self.subject(cell.seed), round(cell.share * whole)
        model = self.fast(cut(subject.parent, cell.way, number, subject.scores, cell.seed))
        task, points = self.task(cell, taught=True), self.scale.points
        curve = self.learn(model, cell, task, points[-1], points[:-1])
        return dict(parameters=_count(model), curve=curve)

    def _run_students(self, cell: Cell) -> dict[str, Any]:
        scale, subject = self.scale, self.subject(cell.seed)
        dim, ffn, heads = scale.student
        sizes = (("stream", dim), ("ffn", ffn), ("ssm_heads", heads // scale.shape.groups))
        draw = cell.seed if cell.way.startswith("random") else None
        child = units.cut_width(subject.parent, sizes, subject.columns, draw)
        scratch = cell.way.startswith("scratch")
        model = self.fast(rebuilt(child) if scratch else child.model)
        size, taught = scale.student_bytes, cell.way.endswith("kd")
        if cell.way.endswith("long"):  # 6 FLOPs a weight to learn, 2 for the teacher's forward pass
            size *= 1 + _count(subject.parent.model) / (3 * _count(model))
        task = self.task(cell, taught=taught)
        curve = self.learn(model, cell, task, size, _log_grid(size, 6))
        return dict(parameters=_count(model), curve=curve)

    def _run_masks(self, cell: Cell) -> dict[str, Any]:
        pattern = Pattern()
        model: Any = copy.deepcopy(self.subject(cell.seed).parent.model).to(self.device)
        layers = sparse_layers(model, pattern)

        def show() -> None:
            for ids in self.rows(cell.seed, self.scale.calibration):
                model.base_model(input_ids=ids, use_cache=False)

        method: Any = cell.way.rpartition("_")[2] if cell.way.startswith("maskllm") else cell.way
        method = "magnitude" if method == "weights" or cell.way == "trained_weights" else method
        thinned = None if method == "none" else prune_nm(layers, pattern, method, show)
        self.fast(model)
        task: Task = self.task(cell, taught=False)
        if cell.way.startswith("maskllm"):
            model.requires_grad_(False)
            learn_masks(layers, pattern, thinned)
            task = MaskTask(task, layers, self._mask_schedule())
        else:
            assert thinned is not None
            load_weights(layers, thinned)
            for layer in layers.values() if cell.rate else ():
                parametrize.register_parametrization(layer, "weight", FixedMask(layer.weight))
        size = self.scale.mask_bytes
        curve = self.learn(model, cell, task, size, _log_grid(size, 4))
        return dict(parameters=_count(self.subject(cell.seed).parent.model), curve=curve)

    def _mask_schedule(self) -> Training:
        steps = round(self.scale.mask_bytes / (self.scale.batch * self.scale.length))
        return ShortTraining(steps=max(1, steps))


class FixedMask(nn.Module):
    """A parametrization that keeps a weight's zeros."""

    kept: Tensor

    def __init__(self, weight: Tensor):
        super().__init__()
        self.register_buffer("kept", weight.detach() != 0, persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.kept


def _log_grid(size: float, number: int) -> list[float]:
    """Return points before `size`, each half of the next."""
    return [size / 2**i for i in range(number - 1, 0, -1)]


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
