"""Compile a run's networks in processes beside it, while its first steps run as they are written.

Compiling is mostly Python, which a second thread would have to share with the steps. What a process
beside the run has compiled lies in torch's caches, where the run then finds it: it takes over in
seconds. A process that fails costs nothing but this: the run compiles that network itself.

Of several processes of a run the first on each machine starts them, and all take over at one step.
The others find the kernels, which Triton keeps by what they do, but not the code around them, which
Inductor keeps by the number of its GPU: that they write anew, once.

    python -m zoo.train.distill.compiling RUN student
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import zoo
from zoo.features import Batch
from zoo.students.build import build_student
from zoo.students.lora import add_adapters
from zoo.students.student import Student
from zoo.teachers.teacher import Frozen, Teacher
from zoo.train.device import autocast, cores, device_of, in_precision, tensor_cores
from zoo.train.distill.config import Distill
from zoo.train.distill.placement import idle, sharded, sizes_here
from zoo.train.distill.plan_step import grids_of
from zoo.train.distill.setup import Setup, backbone_options, meta_models, open_spec, widths
from zoo.train.distill.sizes import at_size, frozen
from zoo.train.distill.speed import (
    FastStudent,
    Speed,
    about_speed,
    compiled_folder,
    convolutions_as_before,
    is_convolutional,
    keep_compiled,
)
from zoo.train.distill.task import DistillTask
from zoo.train.distill.teachers import (
    compile_teacher,
    is_compiled,
    optimize_teachers,
    teacher_precision,
    uncompile_teacher,
)
from zoo.train.distill.worth import SETTLING, Pace, too_short
from zoo.train.freeze import freeze
from zoo.train.mesh import (
    any_rank,
    first_of_machine,
    from_first,
    is_first,
    rank,
    slices_of_rank,
    world,
)
from zoo.train.run import Run
from zoo.train.shard import is_cut, is_sharded
from zoo.train.state import TrainState

STUDENT = "student"
"""The part that is no teacher; no teacher is called so, or it is compiled by the run itself."""
NICENESS = 10
"""Of processes that compile: the run itself and its loader go first."""


class Compiling:
    """The processes that compile the parts of a run which no earlier one has compiled.

    Args:
        parts: `STUDENT` and labels of teachers.
        say: Takes a line for the log.
        lost: Takes a line about what did not compile; `say` by default.
    """

    def __init__(
        self,
        run: Path,
        config: Distill,
        parts: Sequence[str],
        say: Callable[[str], None],
        lost: Callable[[str], None] | None = None,
    ):
        self.run, self.say, self.lost, self.began = run, say, lost or say, time.perf_counter()
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - as long as they write to it
        new = not_compiled_yet(config, parts)
        self._left = {part: self._start(part, len(new)) for part in new}
        if new:
            say(f"compiling {', '.join(new)} beside the first steps, which go on meanwhile")

    def _start(self, part: str, count: int) -> "subprocess.Popen[bytes]":
        threads = str(max(1, cores() // 2 // count))
        paths = [str(Path(zoo.__file__).parent.parent), *filter(None, sys.path)]
        env = dict(os.environ, PYTHONPATH=os.pathsep.join(paths))
        env.setdefault("TORCHINDUCTOR_COMPILE_THREADS", threads)
        env.setdefault("OMP_NUM_THREADS", threads)
        words = [sys.executable, "-m", __name__, str(self.run), part]
        return subprocess.Popen(
            words, env=env, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log
        )

    def done(self) -> bool:
        """Tell whether all have ended; of each that has, say so once."""
        for part, process in list(self._left.items()):
            if (code := process.poll()) is not None:
                del self._left[part]
                after = f"{time.perf_counter() - self.began:.0f} s"
                if code:
                    why = f"after {after}: {self._last_line()}"
                    self.lost(f"{part} did not compile beside the run, {why}")
                else:
                    self.say(f"compiled {part} beside the run in {after}")
        return not self._left

    def _last_line(self) -> str:
        self._log.seek(0)
        lines = [line.strip() for line in self._log.read().splitlines() if line.strip()]
        return lines[-1][:300] if lines else "it said nothing"

    def stop(self) -> None:
        """End those that still work."""
        for process in self._left.values():
            process.terminate()
        for process in self._left.values():
            process.wait()
        self._left.clear()
        self._log.close()


def parts_of(config: Distill, speed: Speed) -> list[str]:
    """List what may be compiled beside a run.

    Teachers in 8 bits are measured first, by the run; what is cut, no process has alone.
    """
    alone = config.teacher_precision not in ("int8", "fp8") and not sharded(config)
    teachers = config.labels if speed.teachers and alone else []
    return [*([STUDENT] if speed.blocks else []), *(n for n in teachers if n != STUDENT)]


def not_compiled_yet(config: Distill, parts: Sequence[str]) -> list[str]:
    """List the parts that no earlier run has compiled."""
    return [part for part in parts if not mark_of(config, part).is_file()]


def mark_of(config: Distill, part: str) -> Path:
    """Return the file that says that a part was compiled, in this form and by this version."""
    losses, optim = config.losses, config.optim
    about: list[Any] = [part == STUDENT, zoo.__version__, config.slice_images, config.precision]
    about.append(torch.cuda.get_device_name() if torch.cuda.is_available() else "")
    names = [spec.describe() for spec in config.teachers]
    if part == STUDENT:
        about += [config.student, config.student_options, config.heads.options(), names]
        about += [config.spectral, bool(losses.mesa), optim.drop_path, optim.freeze, optim.lora]
    else:
        spec = config.teachers[config.labels.index(part)]
        about += [spec.describe(), config.teacher_precision, config.student if spec.follow else ""]
    digest = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:24]
    return compiled_folder() / "done" / digest


def compile_part(config: Distill, part: str, device: torch.device) -> None:
    """Compile a part as a run will: on black images of its shapes, forward and, if it learns, back.

    Raises:
        ValueError: as the run itself would, about its models.
    """
    with tensor_cores(device):  # as in the loop: the caches keep the code of each setting apart
        if part == STUDENT:
            compile_student(config, device)
        else:
            compile_one_teacher(config, part, device)


def compile_student(config: Distill, device: torch.device) -> None:
    """Compile the student with random weights, for each of its sizes."""
    student = bare_student(config).to(device).train()
    fast = FastStudent(student, Speed(channels_last=True, blocks=True), say=print, strict=True)
    for size, count in config.slice_images.items():
        images = Batch(torch.zeros(count, 3, size, size, device=device))
        with autocast(config.precision, device):
            fast(images, size=(size, size), mesa=bool(config.losses.mesa))


def bare_student(config: Distill) -> Student:
    """Build the student of a run with random weights and without what calibration finds."""
    teachers, _ = meta_models(config)
    student = build_student(
        config.student,
        widths(config, teachers),
        size=config.size,
        **config.heads.options(),
        drop_path_rate=config.optim.drop_path,
        **backbone_options(config),
    )
    if config.optim.lora:
        add_adapters(student, config.optim.lora, config.optim.lora_layers)
    if config.optim.freeze:
        freeze(student, config.optim.freeze)
    return in_precision(student, config.precision)


def compile_one_teacher(config: Distill, label: str, device: torch.device) -> None:
    """Compile a teacher for each size of its images."""
    spec = config.teachers[config.labels.index(label)]
    teacher = open_spec(spec, config, device, grids_of(config))
    optimize_teachers(
        {label: teacher},
        precision=teacher_precision(config, device),
        compiled=False,
        sample=lambda: Batch(torch.zeros(0)),  # for 8 bits alone
    )
    _run_compiled(teacher, frozen(teacher), config, device)


def _run_compiled(
    teacher: Teacher, networks: Sequence[Frozen], config: Distill, device: torch.device
) -> None:
    _in_channels_last(networks)
    for network in networks:
        compile_teacher(network)
    here = sizes_here(config, slices_of_rank(config.num_slices))
    for size, count in ((s, n) for s, n in config.slice_images.items() if s in here):
        sized = at_size(teacher, size)
        images = Batch(torch.zeros(count, 3, *sized.size, device=device))
        with torch.no_grad(), autocast(config.precision, device):
            sized(images)


def _in_channels_last(networks: Iterable[Frozen]) -> None:
    for network in networks:  # FSDP2 keeps what it cut contiguous
        if is_convolutional(network) and not any(map(is_cut, network.parameters())):
            network.to(memory_format=torch.channels_last)


def take_over_teachers(setup: Setup, say: Callable[[str], None]) -> None:
    """Compile a run's teachers, from the caches; one that cannot be compiled stays as it is.

    So do those that other ranks run. A rank may fail here by itself: no other waits for it.
    """
    away = idle(setup.config, slices_of_rank(setup.config.num_slices))
    for label, teacher in setup.teachers.items():
        networks = [network for network in frozen(teacher) if not is_compiled(network)]
        if label in away:
            continue
        try:
            if networks:
                _run_compiled(teacher, networks, setup.config, setup.device)
        except Exception as error:  # a compiler may raise anything
            for network in networks:
                uncompile_teacher(network)
            reason = (str(error).splitlines() or [""])[0][:200]
            say(f"the teacher {label} is not compiled: {type(error).__name__}: {reason}")


def of_state(speed: Speed, state: TrainState) -> Speed:
    """Return the form that is left for a student whose weights may be cut."""
    if not is_sharded(state.learned):
        return speed
    reason = "a student whose weights are cut is not compiled"
    return speed.without(reason, blocks=False, graphs=False)


class TakeOver:
    """When compiled code takes over: asked at each slice, it answers at the first of a step.

    The first steps run plain. With `speed` auto they tell how long the rest would take so, and
    where compiling would not pay, the run stays plain; `compiled` does not ask. The ranks of a run
    get one answer: by rank 0's clock, and once nothing compiles on any of them. They need none for
    their numbers; but one that stands still holds up all, so all do at once.

    Args:
        state: Its step is where the run is.
        say: Takes a line for the log.
        lost: Takes a line about what did not compile.
        note: Takes the form of the run, in words, for about.json.
    """

    def __init__(
        self,
        config: Distill,
        speed: Speed,
        state: TrainState,
        *,
        say: Callable[[str], None],
        lost: Callable[[str], None],
        note: Callable[[str], None],
    ):
        self.config, self.speed, self.state = config, speed, state
        self.say, self.lost, self.note = say, lost, note
        self.parts = parts_of(config, speed)
        self.starts = first_of_machine()
        self.warm = not any_rank(bool(not_compiled_yet(config, self.parts)))
        self.pace = Pace(state.device, state.step)
        self.compiling: Compiling | None = None
        self._stays_plain = False
        self._asked, self._answer = -1, False

    def __call__(self) -> bool:
        if self.state.step != self._asked:
            self._asked, self._answer = self.state.step, self._is_time()
        return self._answer

    def _is_time(self) -> bool:
        if self._stays_plain:
            return False
        if self.compiling is None and self._decided():
            parts = self.parts if self.starts else []
            self.compiling = Compiling(self.config.out, self.config, parts, self.say, self.lost)
        return self.compiling is not None and not any_rank(not self.compiling.done())

    def _decided(self) -> bool:
        """Tell whether it is time to compile; if it never will be, say why."""
        step = self.state.step
        if self.config.speed == "compiled":
            return self.warm or step >= self.pace.first + SETTLING
        self.pace.saw(step)
        if (seconds := self.pace.seconds()) is None:
            return False
        left = self.config.steps - step
        if reason := from_first(too_short(seconds, left, warm=self.warm)):
            self._stays_plain = True
            self.say(f"speed auto: plain: {reason}")
            self.note(f"plain ({reason})")
            return False
        self.say(f"speed auto: {self.speed.describe()}")
        self.note(self.speed.describe())
        return True

    def stop(self) -> None:
        """End what still compiles."""
        if self.compiling:
            self.compiling.stop()


@contextmanager
def in_form(
    setup: Setup, speed: Speed, task: DistillTask, state: TrainState, run: Run | None
) -> Iterator[None]:
    """Within this context a task trains in the form of its run, which is said.

    Args:
        run: Its about.json takes the form, and the step at which compiled code takes over.
    """
    config = setup.config
    console = Console(stderr=True, highlight=False)

    def say(text: str) -> None:
        if is_first():
            console.print(text, soft_wrap=True)

    def lost(text: str) -> None:  # on any rank: the others do not know
        console.print(f"rank {rank()}: {text}" if world() > 1 else text, soft_wrap=True)

    def pauses() -> None:
        state.pauses = True

    def note(form: str, step: int | None = None) -> None:
        about = run.read_json("about.json") or {} if run else {}
        found = about_speed(form, about.get("speed"), step)
        if run:
            run.write_json("about.json", about | dict(speed=found))

    if not speed.beside:
        note(speed.describe())
        if speed.why:
            say(f"speed {config.speed}: {speed.describe()}")
        yield
        return
    asks = config.speed != "compiled"
    note("plain, at first" if asks else speed.describe())
    take_over = TakeOver(config, speed, state, say=say, lost=lost, note=note)

    def begin() -> None:
        note(speed.describe(), state.step)
        _begin(setup, speed, say, lost)

    task.fast = FastStudent(
        state.model,
        speed,
        say=say,
        when=take_over,
        ready=begin,
        lost=lost,
        stands=pauses,
        accumulates=config.num_slices > 1,
    )
    try:
        with convolutions_as_before():
            yield
    finally:
        take_over.stop()


def _begin(
    setup: Setup, speed: Speed, say: Callable[[str], None], lost: Callable[[str], None]
) -> None:
    """Bring all but the student into the form of the run."""
    if speed.blocks:  # DDP would cut what is compiled within it to its buckets; blocks are small
        torch._dynamo.config.optimize_ddp = False
    if setup.device.type == "cuda":
        torch.cuda.synchronize(setup.device)  # teachers may work on a stream of their own
        torch.cuda.empty_cache()  # of blocks whose sizes compiled code does not ask for
        torch.backends.cudnn.benchmark |= speed.channels_last
    if speed.teachers:
        took = time.perf_counter()
        take_over_teachers(setup, lost)
        say(f"the teachers run compiled, after {time.perf_counter() - took:.0f} s")
    else:
        _in_channels_last(chain.from_iterable(map(frozen, setup.teachers.values())))


def main(folder: str, part: str) -> None:
    """Compile a part of the run in a folder, and leave its mark."""
    if hasattr(os, "nice"):
        os.nice(NICENESS)  # the compilers that it starts inherit it
    keep_compiled()
    config = Run(Path(folder)).config(Distill)
    compile_part(config, part, device_of(config.device))
    mark = mark_of(config, part)
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.touch()


if __name__ == "__main__":
    main(*sys.argv[1:])
