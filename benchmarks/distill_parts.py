"""The parts of a row of `distill_speed.py` alone, each in several forms."""

import json
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


class Parts:
    """Milliseconds a batch of teachers, student and resizing, kept as they come.

    Models are built, and compiled code is looked up, as the run of the same config does.

    Args:
        config: Of the run, a `Distill`.
        kept: What is known of parts lies there; rows that share a teacher measure it once.
    """

    def __init__(self, config: Any, kept: Path):
        import torch

        from zoo.train.device import device_of
        from zoo.train.distill.speed import keep_compiled

        keep_compiled()
        self.config, self.kept = config, kept
        self.device = device_of(config.device)
        self.all: dict[str, dict[str, float]] = {}
        if kept.is_file():
            self.all = json.loads(kept.read_text())
        torch.backends.cudnn.benchmark = True

    def measure(self) -> dict[str, dict[str, float]]:
        """Measure what is not known yet; return all parts of this row."""
        from zoo.teachers.name import TeacherName
        from zoo.train.device import tensor_cores

        config, found = self.config, dict[str, str]()
        with tensor_cores(self.device):
            for label, spec in zip(config.labels, config.teachers, strict=True):
                found[label] = f"{spec.describe()} of {config.batch}"
                if found[label] not in self.all:
                    self.teacher(found[label], label, spec)
            found["student"] = f"{config.student} of {config.batch} at {config.size}"
            if found["student"] not in self.all:
                self.student(found["student"])
            asked = (TeacherName.parse(spec.name).resolution for spec in config.teachers)
            sides = {config.size, *(side for side in asked if side)}
            found["resize"] = f"resizing {config.batch} to {sorted(sides)}"
            if found["resize"] not in self.all:
                self.resizing(found["resize"], sides)
        return {part: self.all[key] for part, key in found.items()}

    def keep(self, part: str, form: str, run: Callable[[], Any]) -> None:
        """Time a form of a part; one that fails is named with its error."""
        from zoo.eval.speed.models import timed

        try:
            for _ in range(4):
                run()
            found = 1e3 * statistics.median(timed(run, self.device.type, 12))
        except Exception as error:
            form, found = f"{form} failed: {str(error)[:200]}", 1e9
        self.all.setdefault(part, {})[form] = found
        print(part, form, f"{found:.2f} ms", flush=True)
        self.kept.write_text(json.dumps(self.all))

    def images(self, side: int) -> Any:
        """Return a batch on the device."""
        from zoo.commands.bench.step_parts import pink_noise
        from zoo.features import Batch

        count = self.config.batch
        some = pink_noise(min(count, 64), side, self.device).images
        some = some.repeat(-(-count // 64), 1, 1, 1)[:count]
        return Batch(Batch(some).at((side, side)))

    def autocast(self) -> Any:
        from zoo.train.device import autocast

        return autocast(self.config.precision, self.device)

    def teacher(self, key: str, label: str, spec: Any) -> None:
        """Measure a teacher."""
        import torch

        from zoo.commands.bench.step_parts import free
        from zoo.train.distill.plan_step import grids_of
        from zoo.train.distill.setup import open_spec
        from zoo.train.distill.sizes import frozen
        from zoo.train.distill.speed import is_convolutional
        from zoo.train.distill.teachers import compile_teacher

        teacher: Any = open_spec(spec, self.config, self.device, grids_of(self.config))
        (network,) = frozen(teacher)
        if self.device.type == "cuda":
            network.to_bf16()
        images = self.images(teacher.size[0])

        def ask(teacher: Any = teacher) -> None:
            with torch.no_grad(), self.autocast():
                teacher(images)

        self.keep(key, "eager", ask)
        if is_convolutional(network):
            network.to(memory_format=torch.channels_last)
            self.keep(key, "channels last", ask)
        compile_teacher(network)
        self.keep(key, "compiled", ask)
        del teacher, network, ask
        free(self.device)

    def student(self, key: str) -> None:
        """Measure the student's step, forward, backward and AdamW."""
        import torch

        from zoo.commands.bench.step_parts import free
        from zoo.train.distill.compiling import bare_student
        from zoo.train.distill.speed import FastStudent, Speed
        from zoo.train.state import TrainState

        config, on_gpu = self.config, self.device.type == "cuda"
        for form, speed in (
            ("eager", Speed()),
            ("channels last", Speed(channels_last=True)),
            ("in graphs", Speed(channels_last=True, blocks=True, graphs=on_gpu)),
            ("bf16 weights, in graphs", Speed(channels_last=True, blocks=True, graphs=on_gpu)),
        ):
            if form.startswith("bf16") and not on_gpu:
                continue
            torch.manual_seed(0)
            student = bare_student(config).to(self.device).train()
            if form.startswith("bf16"):
                to_bf16(student)
            state = TrainState.of(student, config.optim)
            state.ema = None
            fast, images = FastStudent(student, speed, say=print), self.images(config.size)

            def learn(fast: Any = fast, state: Any = state, images: Any = images) -> None:
                with self.autocast():
                    answers = fast(images)
                outputs = [t for f in answers.values() for t in f if t is not None]
                torch.autograd.backward(outputs, [o.new_ones(1).expand_as(o) for o in outputs])
                state.optimizer.step()
                state.optimizer.zero_grad(set_to_none=True)

            self.keep(key, form, learn)
            del student, state, fast, learn
            free(self.device)

    def resizing(self, key: str, sides: set[int]) -> None:
        """Measure the copy of a batch to the device, and its resizing to all sizes."""
        import torch

        from zoo.features import Batch

        side, batch = max(sides), self.config.batch
        host = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8)
        host = host.pin_memory() if self.device.type == "cuda" else host

        def resize() -> None:
            batch = Batch(host).to(self.device)
            for side in sides:
                batch.at((side, side))

        self.keep(key, "as it is", resize)


def to_bf16(student: Any) -> None:
    """Give a student weights in bfloat16, all but those of batch norms; the best of `zoo bench`."""
    from torch import nn

    student.backbone.bfloat16()
    for part in student.backbone.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.float()


def fastest(parts: Mapping[str, Mapping[str, float]]) -> dict[str, tuple[str, float]]:
    """Return the fastest form of each part, and its milliseconds."""
    return {part: min(forms.items(), key=lambda pair: pair[1]) for part, forms in parts.items()}
