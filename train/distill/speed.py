"""In which form a run is computed (`speed`): what is chosen on a GPU, and the student in that form.

Nothing here changes what is learnt but by rounding, and by which random numbers drop paths draw.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from zoo.compiled_blocks import compile_blocks
from zoo.features import Batch, Features
from zoo.files import cache_dir
from zoo.students.student import Student
from zoo.teachers.teacher import share_weights
from zoo.train.distill.config import Distill
from zoo.train.graphs import Graphed, left_as_it_was, warm_up
from zoo.train.mesh import world

FEWEST_CONVS = 4
"""Convolutions from which a network counts as convolutional: a ViT's patches, or SAM's neck, are
fewer."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """The form of a run; the plain one by default."""

    channels_last: bool = False
    """Of networks with convolutions: colours lie together in memory, as tensor cores want them."""
    blocks: bool = False
    """The student is compiled block by block."""
    graphs: bool = False
    """Its kernels are recorded, and launched as one."""
    teachers: bool = False
    """Teachers are compiled."""
    overlap: bool = False
    """Teachers work one batch ahead, beside the student."""
    beside: bool = False
    """The first steps run plain; what is compiled is so beside them, by other processes."""
    why: tuple[str, ...] = ()
    """What was left out, and the reason."""

    def without(self, reason: str, **parts: bool) -> "Speed":
        """Return this form with some parts left out, if it has them, and the reason."""
        lost = [name for name, value in parts.items() if getattr(self, name) and not value]
        if not lost:
            return self
        return replace(self, **parts, why=(*self.why, reason))

    def describe(self) -> str:
        """Say what was chosen, and what was not and why."""
        words = dict(
            channels_last="channels last",
            blocks="student compiled",
            graphs="in CUDA graphs",
            teachers="teachers compiled",
            overlap="teachers a batch ahead",
        )
        chosen = ", ".join(text for name, text in words.items() if getattr(self, name)) or "plain"
        return chosen + (f" (not all: {'; '.join(self.why)})" if self.why else "")


def choose(
    config: Distill, device: torch.device, *, nested: bool = False, processes: int | None = None
) -> Speed:
    """Choose the form of a run, before its student is there.

    Args:
        nested: Each slice trains another size of the student.
        processes: Of the run; those that there are by default.
    """
    wanted = Speed(teachers=config.compile_teachers, overlap=config.overlap)
    if config.speed == "plain" or device.type != "cuda":
        return wanted
    speed = Speed(
        channels_last=True, blocks=True, graphs=True, teachers=True, overlap=True, beside=True
    )
    if (processes or world()) > 1:
        speed = _on_several(speed, config)
    if config.cache:
        speed = speed.without("their features come from a cache", teachers=False)
    alone = dict(blocks=False, graphs=False)
    if nested:
        speed = speed.without("a student of several sizes cannot be compiled", **alone)
    if config.attention_windows:
        speed = speed.without("the windows of its attention change", **alone)
    if config.precision == "float64":
        speed = speed.without("float64 is for tests", **alone)
    if config.compile:
        speed = speed.without("--compile compiles the student whole", **alone)
    return speed


def _on_several(speed: Speed, config: Distill) -> Speed:
    """Return what is left of a form on several processes.

    Each may be in another form than its neighbours for a while, and compile as long as it takes:
    nothing that is left waits for another process, but the student's gradients, which DDP sums in
    the order of its buckets whatever computes them. Teachers that are cut do wait.
    """
    reason = "a recording would give all gradients at its end, and hide none of their sums"
    speed = speed.without(reason, graphs=False)
    if all(spec.place != "shard" for spec in config.teachers):
        return speed
    reason = "beside teachers that are cut (place=shard) all run as options ask, in step"
    return speed.without(reason, teachers=config.compile_teachers, overlap=config.overlap)


@contextmanager
def uncompiled(device: torch.device) -> Iterator[None]:
    """Within this context networks run as they are written: each other shape would be compiled."""
    if device.type != "cuda":
        yield
        return
    chosen = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        torch.backends.cudnn.benchmark = chosen


@contextmanager
def convolutions_as_before() -> Iterator[None]:
    """After this context cuDNN chooses its convolutions as it did before."""
    before = torch.backends.cudnn.benchmark
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def compiled_folder() -> Path:
    """Return where compiled code is kept: in the user's cache folder, apart for each version."""
    return cache_dir() / "compiled" / f"torch-{torch.__version__}"


def keep_compiled() -> None:
    """Let the compilers keep what they write in `compiled_folder`, unless they are told where."""
    place = compiled_folder()
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(place / "inductor"))
    os.environ.setdefault("TRITON_CACHE_DIR", str(place / "triton"))


def is_convolutional(network: nn.Module) -> bool:
    """Tell whether a network is made of convolutions, not only begun by one."""
    convs = sum(isinstance(part, nn.Conv2d) for part in network.modules())
    return convs >= FEWEST_CONVS


class _Answer(nn.Module):
    """A student's answer as a function of one tensor that returns a tuple of tensors."""

    def __init__(self, student: Student, mesa: bool, channels_last: bool):
        super().__init__()
        self.student, self.mesa, self.channels_last = student, mesa, channels_last
        self.parts: list[tuple[str, int]] = []

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        kind = images.device.type
        # A cast that autocast keeps would be missing in a recording.
        with torch.autocast(kind, enabled=torch.is_autocast_enabled(kind), cache_enabled=False,
                            dtype=torch.get_autocast_dtype(kind)):  # fmt: skip
            answers = self.student.answer(images, mesa=self.mesa)
        found = [(n, i) for n, f in answers.items() for i, part in enumerate(f) if part is not None]
        self.parts = found
        return tuple(answers[name][i] for name, i in found)  # pyright: ignore[reportReturnType]

    def named(self, tensors: tuple[Tensor, ...]) -> dict[str, Features]:
        """Return the tensors as the student's answer."""
        found: dict[str, list[Tensor | None]] = {name: [None, None] for name, _ in self.parts}
        for (name, i), tensor in zip(self.parts, tensors, strict=True):
            found[name][i] = tensor
        return {name: Features(*pair) for name, pair in found.items()}


class FastStudent:
    """A student as training runs it: compiled by blocks, recorded for each size of its images.

    It is a second tree of modules around the same weights, so the student itself is evaluated,
    averaged and saved as if there were none. What cannot be compiled or recorded runs without, and
    that is said.

    Args:
        say: Takes a line for the log.
        when: Asked at each slice whether it is time to compile; until then the student itself runs.
        ready: Is called when compiled code takes over.
        lost: Takes a line about what cannot be compiled; `say` by default.
        stands: Is called before each pause in which code is compiled.
        accumulates: Whether a step has several backward passes.
        strict: Let the error of a compiler through.
    """

    def __init__(
        self,
        student: Student,
        speed: Speed,
        *,
        say: Callable[[str], None],
        when: Callable[[], bool] = lambda: True,
        ready: Callable[[], None] = lambda: None,
        lost: Callable[[str], None] | None = None,
        stands: Callable[[], None] = lambda: None,
        accumulates: bool = False,
        strict: bool = False,
    ):
        self.student, self.speed, self.say = student, speed, say
        self.when, self.ready, self._begun = when, ready, False
        self.lost, self.stands = lost or say, stands
        self.accumulates, self.strict, self._pool = accumulates, strict, None
        self.channels_last = speed.channels_last and is_convolutional(student.backbone)
        self._twin: Student | None = None
        self._by_shape: dict[Any, Callable[[Tensor], dict[str, Features]]] = {}

    def __call__(
        self, batch: Batch, *, size: tuple[int, int] | None = None, mesa: bool = False
    ) -> dict[str, Features]:
        if not self._begun:
            if not self.when():
                return self.student(batch, size=size, mesa=mesa)
            self._begun = True
            self.ready()
        images = batch.at(size or self.student.size)
        key = tuple(images.shape), mesa
        if key not in self._by_shape:
            self.stands()
            self._by_shape[key] = self._prepared(images, mesa)
        return self._by_shape[key](images)

    def _prepared(self, images: Tensor, mesa: bool) -> Callable[[Tensor], dict[str, Features]]:
        count, _, _, side = images.shape
        began, what = perf_counter(), f"{count} images of {side} px"
        if not self.speed.blocks:
            answer = _Answer(self.student, mesa, self.channels_last)
            return lambda x: answer.named(answer(x))
        self.say(f"taking over compiled code of the student for {what}")
        answer = _Answer(self._compiled(), mesa, self.channels_last)
        learned = [p for p in answer.parameters() if p.requires_grad]
        try:
            with left_as_it_was(answer, images.device):
                warm_up(answer, images, learned)
        except Exception as error:  # a compiler may raise anything, and a run goes without it
            if self.strict:
                raise
            self.lost(f"the student is not compiled: {_first_line(error)}")
            answer = _Answer(self.student, mesa, self.channels_last)
            return lambda x: answer.named(answer(x))
        call: Callable[[Tensor], tuple[Tensor, ...]] = answer
        if self.speed.graphs:
            try:
                record = partial(Graphed, pool=self._pool, accumulates=self.accumulates)
                call = record(answer, images)
                self._pool = call.pool
            except Exception as error:
                self.lost(f"the student is not recorded in CUDA graphs: {_first_line(error)}")
                torch.cuda.empty_cache()
        self.say(f"the student runs compiled for {what}, after {perf_counter() - began:.0f} s")
        return lambda x: answer.named(call(x))

    def _compiled(self) -> Student:
        if self._twin is not None:
            return self._twin
        twin: Student = share_weights(self.student)
        compile_blocks(twin.backbone)
        for head in twin.heads.values():
            head.compile(dynamic=False)
        self._twin = twin
        return twin


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def about_speed(form: str, before: Mapping[str, Any] | None, step: int | None) -> dict[str, Any]:
    """Return what about.json says of a run's form.

    Args:
        form: It, in words.
        before: What it said so far.
        step: At which compiled code takes over now; a resumed run has one more.
    """
    steps = [*(before or {}).get("compiled_from", []), *([] if step is None else [step])]
    return dict(form=form, compiled_from=steps)
