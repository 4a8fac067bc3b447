"""Measure `zoo distill` itself, in each form of `--speed`, on one GPU.

    python benchmarks/distill_speed.py --out run.json --seconds 540

Each row is a run of the command in a process of its own, on JPEGs of 500 x 375 pixels that are
written first: compiled with empty caches, plain, compiled with warm caches, auto, which chooses,
and plain without workers, which were the defaults before. Then the parts are measured alone, each
in several forms. What is known is written to --out after each run; rows that are there are not
measured again.

    --list            list rows and forms
    --rows mamba      measure these rows only
    --forms auto warm measure these forms only
    --report          print what --out has: efficiency, gaps of losses, idle time, memory
    --tiny            rehearse on a CPU with tiny models
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # where zoo is not installed

LITES = ("timm:efficientnet_lite0/random@224", "timm:efficientnet_lite2/random@260")
BASE = ("timm:vit_base_patch14_dinov2/random@224", "timm:vit_base_patch16_clip_224/random@224")
LARGE = (
    "timm:vit_huge_patch14_clip_378/random@378",
    "timm:vit_giant_patch14_reg4_dinov2/random@224",
)


@dataclass(frozen=True)
class Row:
    """A run: its teachers, its student, and how long it is."""

    teachers: tuple[str, ...]
    student: str
    size: int
    batch: int = 256
    steps: int = 300
    calibration: int = 8


ROWS = {
    "mamba": Row(LITES, "mambavision_t", 160),
    "fastervit": Row(LITES, "fastervit_0", 224),
    "eradio": Row(LITES, "eradio_xxxtiny", 256),
    "vit": Row(BASE, "vit_base_patch16_224", 224),
    "trio": Row(LARGE, "vit_base_patch16_224", 432, batch=128, steps=100, calibration=2),
    "small": Row(BASE[:1], "vit_small_patch16_224", 224),
    "resnet": Row(BASE[:1], "resnet50", 224),
}
FORMS = {
    "cold": ("--speed", "compiled"),
    "plain": ("--speed", "plain"),
    "warm": ("--speed", "compiled"),
    "auto": ("--speed", "auto"),
    "before": ("--speed", "plain", "--workers", "0"),
    "profile": ("--speed", "compiled", "--profile"),
    "parts": (),
}
TINY = Row(
    ("timm:test_efficientnet/random@96", "timm:test_vit/random@96"), "test_resnet", 64, 8, 20
)


def write_photos(folder: Path, first: int, count: int) -> None:
    """Write noise that is blurred, and some that is not: JPEGs of about 60 kB."""
    import numpy as np
    from PIL import Image

    for number in range(first, first + count):
        draws = np.random.default_rng(number)
        coarse = draws.integers(0, 256, (94, 125, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC)
        image.save(folder / f"{number:06}.jpg", quality=85)


def photos(count: int) -> Path:
    """Return a folder of so many images."""
    folder = Path(tempfile.gettempdir()) / f"zoo-photos-{count}"
    if not (folder / f"{count - 1:06}.jpg").exists():
        folder.mkdir(exist_ok=True)
        parts = os.cpu_count() or 1
        with ProcessPoolExecutor(parts) as pool:
            share = -(-count // parts)
            starts = range(0, count, share)
            list(pool.map(write_photos, [folder] * len(starts), starts,
                          [min(share, count - s) for s in starts]))  # fmt: skip
    return folder


def run_child(row: str, form: str, args: argparse.Namespace, limit: float) -> dict[str, Any]:
    """Carry out one run in a process, with the seconds at which it said something."""
    place = Path(args.work) / f"{row}-{form}"
    log = Path(args.logs) / f"{row}-{form}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    caches = Path(args.work) / f"cache-{row}"
    if form == "cold":
        subprocess.run(["rm", "-rf", str(caches)], check=True)
    subprocess.run(["rm", "-rf", str(place)], check=True)
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    env = dict(os.environ, ZOO_CACHE=str(caches), PYTHONPATH=paths, COLUMNS="150")
    words = [sys.executable, __file__, "--child", row, form, "--work", str(args.work)]
    words += ["--tiny"] * args.tiny + (["--batch", str(args.batch)] if args.batch else [])
    words += ["--steps", str(args.steps)] if args.steps else []
    words += ["--photos", str(args.photos)]
    began = time.time()
    env["ZOO_BEGAN"] = str(began)
    child = subprocess.Popen(
        words,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert child.stdout is not None
    os.set_blocking(child.stdout.fileno(), True)
    import threading

    timer = threading.Timer(limit, lambda: os.killpg(child.pid, signal.SIGKILL))
    timer.start()
    lines = []
    with log.open("w") as file:
        for line in child.stdout:
            lines.append(line)
            file.write(f"{time.time() - began:7.1f} {line}")
            file.flush()
    timer.cancel()
    code = child.wait()
    found = place / "found.json"
    if form == "parts":
        found = Path(args.work) / f"{row}-parts.json"
    result = json.loads(found.read_text()) if found.is_file() else {}
    result["seconds"] = time.time() - began
    if code:
        result["error"] = "".join(lines[-12:])[-1500:]
    return result


def child(row: Row, form: str, args: argparse.Namespace, name: str) -> None:
    """Run the command in this process, and write what it took."""
    import torch

    print("phase imports begins", flush=True)
    import zoo.commands.distill.run as distill_commands
    from zoo.cli import main as zoo
    from zoo.train.run import Run

    place, began = Path(args.work) / f"{name}-{form}", float(os.environ["ZOO_BEGAN"])
    reports: list[dict[str, Any]] = []
    plain = Run.log_speed

    def noted(self: Run, step: int, rate: float, seconds: float, **more: Any) -> None:
        plain(self, step, rate, seconds, **more)
        late = more.get("late") or {}
        reports.append(dict(step=step, rate=rate, at=time.time() - began, **late))

    Run.log_speed = noted  # pyright: ignore[reportAttributeAccessIssue]
    commands, carry_out = distill_commands, distill_commands.carry_out

    def announced(phase: Any, work: Any) -> None:
        print(f"phase {phase.__name__} begins", flush=True)
        carry_out(phase, work)

    commands.carry_out = announced  # pyright: ignore[reportAttributeAccessIssue]
    words = ["distill", "custom", "--data", str(photos(args.photos)), "--teachers", *row.teachers]
    words += ["--student", row.student, "--size", str(row.size), "--batch", str(row.batch)]
    words += ["--steps", str(row.steps), "--calibration", str(row.calibration), "--every.log", "5"]
    words += ["--eval-images", "256", "--every.evaluate", "100000", "--out", str(place)]
    words += ["--every.checkpoint", "100000", *FORMS[form]]
    sys.argv = ["zoo", *words]
    try:
        code = zoo(words)
    except SystemExit as stop:
        code = stop.code
    if code:
        raise SystemExit(code)
    on_gpu = torch.cuda.is_available()
    losses = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
    final = statistics.median(r["rate"] for r in reports[-max(3, len(reports) // 3) :])
    found = dict(
        images_per_s=final,
        to_95=next(r["at"] for r in reports if r["rate"] >= 0.95 * final),
        first=reports[0]["at"],
        trained=reports[-1]["at"],
        whole=time.time() - began,
        waited=statistics.median(r.get("waited", 0) for r in reports[len(reports) // 2 :]),
        peak_gib=torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
        reserved_gib=torch.cuda.max_memory_reserved() / 2**30 if on_gpu else None,
        about=json.loads((place / "about.json").read_text()).get("speed"),
        losses=[(r["step"], r["loss"]) for r in losses if r["kind"] == "train"],
        reports=reports,
    )
    (place / "found.json").write_text(json.dumps(found))
    if (place / "profile.txt").is_file():
        print((place / "profile.txt").read_text())


class Parts:
    """The parts of a row alone, in several forms: milliseconds a batch, kept as they come."""

    def __init__(self, row: Row, out: Path):
        import torch

        self.row, self.out = row, out
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.found: dict[str, dict[str, float]] = {}
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")

    def measure(self) -> None:
        """Measure the teachers, the student, and what resizing a batch takes."""
        widths = {f"t{i}": self.teacher(f"t{i}", text) for i, text in enumerate(self.row.teachers)}
        self.student(widths)
        self.resizing()

    def keep(self, part: str, form: str, run: Callable[[], Any]) -> None:
        """Time a form of a part; one that fails is named with its error."""
        from zoo.eval.speed.models import timed

        try:
            for _ in range(4):
                run()
            found = 1e3 * statistics.median(timed(run, self.device.type, 12))
        except Exception as error:
            form, found = f"{form} failed: {str(error)[:200]}", float("inf")
        self.found.setdefault(part, {})[form] = found
        print(part, form, self.found[part], flush=True)
        self.out.write_text(json.dumps(self.found))

    def images(self, side: int) -> Any:
        """Return a batch on the device."""
        from zoo.commands.bench.step_parts import pink_noise
        from zoo.features import Batch

        some = pink_noise(min(self.row.batch, 64), side, self.device).images
        some = some.repeat(-(-self.row.batch // 64), 1, 1, 1)[: self.row.batch]
        return Batch(Batch(some).at((side, side)))

    def teacher(self, label: str, text: str) -> tuple[int | None, int | None]:
        """Measure a teacher; return the widths of its targets."""
        import torch

        from zoo.commands.bench.step_parts import free
        from zoo.teachers.open import open_teacher
        from zoo.train.distill.speed import is_convolutional
        from zoo.train.distill.teachers import compile_teacher

        teacher: Any = open_teacher(text, device=self.device)
        if self.device.type == "cuda":
            teacher.to_bf16()
        images = self.images(teacher.size[0])

        def ask(teacher: Any = teacher) -> None:
            with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16):
                teacher(images)

        self.keep(label, "eager", ask)
        if is_convolutional(teacher.network):
            teacher.to(memory_format=torch.channels_last)
            self.keep(label, "channels last", ask)
        compile_teacher(teacher)
        self.keep(label, "compiled", ask)
        widths = teacher.summary_dim, teacher.spatial_dim
        del teacher, ask
        free(self.device)
        return widths

    def student(self, widths: Mapping[str, Any]) -> None:
        """Measure the student's step, forward, backward and AdamW."""
        import torch

        from zoo.commands.bench.step_parts import free
        from zoo.students.build import build_student
        from zoo.train.config import Optim
        from zoo.train.distill.speed import FastStudent, Speed
        from zoo.train.state import TrainState

        row, on_gpu = self.row, self.device.type == "cuda"
        for form, speed in (
            ("eager", Speed()),
            ("channels last", Speed(channels_last=True)),
            ("graphs", Speed(channels_last=True, blocks=True, graphs=on_gpu)),
        ):
            torch.manual_seed(0)
            student = build_student(row.student, widths, size=row.size, device=self.device).train()
            state = TrainState.of(student, Optim(ema=0))
            fast, images = FastStudent(student, speed, say=print), self.images(row.size)

            def learn(fast: Any = fast, state: Any = state, images: Any = images) -> None:
                with torch.autocast(self.device.type, torch.bfloat16):
                    answers = fast(images)
                outputs = [t for f in answers.values() for t in f if t is not None]
                torch.autograd.backward(outputs, [o.new_ones(1).expand_as(o) for o in outputs])
                state.optimizer.step()
                state.optimizer.zero_grad(set_to_none=True)

            self.keep("student", form, learn)
            del student, state, fast, learn
            free(self.device)

    def resizing(self) -> None:
        """Measure the copy of a batch to the device, and its resizing to all sizes."""
        import torch

        from zoo.features import Batch

        host = torch.randint(0, 256, (self.row.batch, 3, 260, 260), dtype=torch.uint8)
        host = host.pin_memory() if self.device.type == "cuda" else host

        def resize() -> None:
            batch = Batch(host).to(self.device)
            for size in {self.row.size, 224, 260}:
                batch.at((size, size))

        self.keep("resize", "as it is", resize)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("distill-speed.json"))
    parser.add_argument("--logs", type=Path, default=Path("distill-speed-logs"))
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "zoo-speed")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--most", type=float, default=150, help="seconds of one run at most")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--forms", nargs="+", choices=list(FORMS), default=list(FORMS))
    parser.add_argument("--photos", type=int, default=6144)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--child", nargs=2)
    args = parser.parse_args()
    if args.list:
        print(*ROWS, "|", *FORMS)
        return
    if args.report:
        measured = json.loads(args.out.read_text())
        for name in args.rows:
            print(*report(name, args.batch or ROWS[name].batch, measured), sep="\n")
        return
    if args.child:
        from dataclasses import replace

        name, form = args.child
        row = TINY if args.tiny else ROWS[name]
        row = replace(row, batch=args.batch or row.batch, steps=args.steps or row.steps)
        if form == "parts":
            Parts(row, Path(args.work) / f"{name}-parts.json").measure()
        else:
            child(row, form, args, name)
        return
    end = time.monotonic() + args.seconds
    args.work.mkdir(parents=True, exist_ok=True)
    done = json.loads(args.out.read_text()) if args.out.is_file() else {}
    began = time.monotonic()
    photos(args.photos)
    print(f"images written in {time.monotonic() - began:.1f} s", flush=True)
    for name in args.rows:
        for form in args.forms:
            key, left = f"{name} {form}", end - time.monotonic()
            if key in done and "error" not in done[key]:
                continue
            if left < 15:
                print(f"{key}: not run, the time is over", flush=True)
                continue
            done[key] = run_child(name, form, args, min(args.most, left))
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(done, indent=1))
            print(f"{key}: {summary(done[key])}", flush=True)


def report(name: str, batch: int, measured: Mapping[str, Any]) -> list[str]:
    """Say what a row shows, as far as its runs are there and did not fail."""
    forms = {form: measured.get(f"{name} {form}", {}) for form in FORMS}
    runs = {form: found for form, found in forms.items() if "images_per_s" in found}
    fast = [runs[form] for form in ("warm", "cold", "auto") if form in runs]
    lines = [f"{name} {form}: {summary(found)}" for form, found in runs.items()]
    parts = {n: min(t.values()) for n, t in forms["parts"].items() if isinstance(t, dict)}
    if fast and "student" in parts:
        step = 1e3 * batch / max(found["images_per_s"] for found in fast)
        resizing = parts.pop("resize", 0.0)
        models = sum(parts.values())
        lines.append(
            f"{name}: models alone {models:.1f} ms / step {step:.1f} ms = {models / step:.3f}; "
            f"with copy and resizing, {resizing:.1f} ms, {(models + resizing) / step:.3f}"
        )
    if fast and (plain := runs.get("plain")):
        theirs = dict(plain["losses"])
        gaps = [abs(loss / theirs[s] - 1) for s, loss in fast[0]["losses"] if theirs.get(s)]
        rate = fast[0]["images_per_s"] / plain["images_per_s"]
        gap = max(gaps, default=0.0)
        lines.append(f"{name}: {rate:.2f} x plain; losses differ by {gap:.2%} at most")
        if plain["peak_gib"] and fast[0]["peak_gib"]:
            memory = fast[0]["peak_gib"] / plain["peak_gib"]
            lines.append(f"{name}: peak {memory:.2f} x plain's")
    return lines


def summary(found: dict[str, Any]) -> str:
    """Say what a run took, in one line."""
    if "images_per_s" not in found:
        return json.dumps(found)[:1500]
    return (
        f"{found['images_per_s']:,.0f} img/s, 95 % after {found['to_95']:.0f} s (first log "
        f"{found['first']:.0f} s, trained {found['trained']:.0f} s, whole {found['whole']:.0f} s), "
        f"waited {found['waited']:.0%}, peak {found['peak_gib'] or 0:.1f} GiB "
        f"({found['reserved_gib'] or 0:.1f} reserved), {found['about']}"
    )


if __name__ == "__main__":
    main()
