"""Measure `zoo distill` itself on one GPU: rows of teachers and student, each in several forms.

    python benchmarks/distill_speed.py --out run.json --seconds 540 mamba:cold mamba:plain
    python benchmarks/distill_speed.py --report run.json

A job is ROW:FORM. They are done in the order given, those that a comma joins at the same time; each
is a process of its own, on JPEGs of 500 x 375 pixels that are written first. What is known is
written to --out after each, and a job that is there is not done again, so a call that was cut short
is simply repeated. A job is begun only if the time that it is expected to take is left.

A run is `zoo distill` with its default `--speed auto`, or plain. It is asked for 4,000 steps, so
that compiling pays, and ended once it has shown its speed; all rows share one cache.

    cold      auto, with empty caches
    plain     without anything compiled
    auto      auto, with warm caches; curves of losses are compared with plain's
    idle      auto, 14 workers and --profile: how long the GPU is idle
    dry       what --dry-run says a step holds
    spread    three runs of 150 steps, and one that is killed at step 75 and resumed; all at once
    parts     teachers, student and resizing alone, each in several forms
    ROW+ROW:prepare   compile all that these rows need, at once, and keep it in the cache; beside
              it only what tells nothing of speed can be done: dry, spread

    --list    list rows and forms        --tiny    rehearse on a CPU with tiny models
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

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
    """A run: its teachers, its student, and how many of its steps are seen."""

    teachers: tuple[str, ...]
    student: str
    size: int
    batch: int = 256
    curve: int = 300
    """Steps whose losses are compared; 0 for none."""
    shown: int = 60
    """Steps in the final form from which its speed is taken."""
    calibration: int = 8


ROWS = {
    "mamba": Row(LITES, "mambavision_t", 160),
    "fastervit": Row(LITES, "fastervit_0", 224),
    "eradio": Row(LITES, "eradio_xxxtiny", 256),
    "vit": Row(BASE, "vit_base_patch16_224", 224, curve=0, shown=40),
    "trio": Row(LARGE, "vit_base_patch16_224", 432, batch=128, curve=0, shown=20, calibration=2),
    "small": Row(BASE[:1], "vit_small_patch16_224", 224),
    "resnet": Row(BASE[:1], "resnet50", 224, curve=0),
}
TINY = Row(
    ("timm:test_efficientnet/random@96", "timm:test_vit/random@96"),
    "test_resnet", 64, batch=8, curve=15, shown=10,
)  # fmt: skip
FORMS = {
    "cold": ("--speed", "auto"),
    "plain": ("--speed", "plain"),
    "auto": ("--speed", "auto"),
    "idle": ("--speed", "auto", "--workers", "14", "--profile"),
    "dry": ("--speed", "auto", "--dry-run"),
    "spread": ("--speed", "auto", "--workers", "3", "--every.checkpoint", "50"),
    "parts": (),
    "prepare": (),
}
SECONDS = dict(cold=165, plain=55, auto=65, idle=65, dry=30, spread=130, parts=80, prepare=110)
"""What a job is expected to take on an H200 with 16 cores; a run of larger models takes more."""
MORE = dict(trio=60, vit=25)
STEPS, EVERY = 4000, 5
WINDOW = 60
"""The last steps, from which a speed is taken."""
LAST, KILLED = 150, 75
"""Steps of the runs of `spread`, and that after which one is killed."""


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
    if not (folder / "done").exists():
        folder.mkdir(exist_ok=True)
        parts = os.cpu_count() or 1
        with ProcessPoolExecutor(parts) as pool:
            share = -(-count // parts)
            starts = range(0, count, share)
            list(pool.map(write_photos, [folder] * len(starts), starts,
                          [min(share, count - s) for s in starts]))  # fmt: skip
        (folder / "done").touch()
    return folder


def row_of(name: str, args: argparse.Namespace) -> Row:
    """Return a row, with the options of the command line."""
    row = TINY if args.tiny else ROWS[name]
    return replace(row, batch=args.batch or row.batch)


def words_of(row: Row, form: str, place: Path, args: argparse.Namespace) -> list[str]:
    """Return the command line of a run."""
    if args.resumed:
        return ["distill", "--resume", str(place)]
    words = ["distill", "custom", "--data", str(photos(args.photos)), "--teachers", *row.teachers]
    words += ["--student", row.student, "--size", str(row.size), "--batch", str(row.batch)]
    words += ["--steps", str(STEPS), "--calibration", str(row.calibration)]
    words += ["--every.log", str(EVERY), "--eval-images", "256", "--every.evaluate", "100000"]
    words += ["--out", str(place), *FORMS[form]]
    if args.tiny:
        words = ["5" if word == "50" else word for word in words]  # the step of a checkpoint
    return words if form == "spread" else [*words, "--every.checkpoint", "100000"]


class Watch:
    """Sees the reports of a run, and ends its process once they show what is asked for.

    Args:
        until: A step before which it is not ended.
        shown: Steps in the final form that are waited for.
        kills: The process is killed at `until`, and leaves nothing.
    """

    def __init__(self, place: Path, *, until: int, shown: int, kills: bool = False):
        self.place, self.until, self.shown, self.kills = place, until, shown, kills
        self.began = float(os.environ["ZOO_BEGAN"])
        self.reports: list[dict[str, Any]] = []

    def hook(self) -> None:
        """Be told of each report from now on."""
        from zoo.train.run import Run

        plain = Run.log_speed

        def noted(run: Run, step: int, rate: float, seconds: float, **more: Any) -> None:
            plain(run, step, rate, seconds, **more)
            waited = (more.get("late") or {}).get("waited", 0)
            self.reports.append(
                dict(step=step, rate=rate, at=time.time() - self.began, waited=waited)
            )
            self.look(step)

        Run.log_speed = noted  # pyright: ignore[reportAttributeAccessIssue]

    def look(self, step: int) -> None:
        """End the process if it is time."""
        speed = json.loads((self.place / "about.json").read_text()).get("speed") or {}
        if self.kills and step >= self.until:
            os.kill(os.getpid(), signal.SIGKILL)
        waits = speed.get("form", "").startswith("plain, at first")
        chosen = speed.get("form", "").startswith("channels last")
        taken = (speed.get("compiled_from") or [None])[-1]
        if step < self.until or waits or (chosen and taken is None):
            return
        first = self.reports[0]["step"] if taken is None else taken
        if step >= first + self.shown:
            self.end(speed, first)

    def end(self, speed: dict[str, Any], first: int) -> NoReturn:
        """Write what was seen, and end the process and with it all that it started."""
        import statistics

        import torch

        late = [r for r in self.reports if r["step"] > first] or self.reports
        final = late[-WINDOW // EVERY :]
        rate = statistics.median(r["rate"] for r in final)
        on_gpu = torch.cuda.is_available()
        profile = self.place / "profile.txt"
        rows = [json.loads(x) for x in (self.place / "metrics.jsonl").read_text().splitlines()]
        found = dict(
            images_per_s=rate,
            images_per_s_mean=sum(r["rate"] for r in final) / len(final),
            to_95=next(r["at"] for r in self.reports if r["rate"] >= 0.95 * rate),
            first=self.reports[0]["at"],
            ended=self.reports[-1]["at"],
            waited=statistics.mean(r["waited"] for r in final),
            peak_gib=torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
            reserved_gib=torch.cuda.max_memory_reserved() / 2**30 if on_gpu else None,
            speed=speed,
            losses=[(r["step"], r["loss"]) for r in rows if r["kind"] == "train"],
            reports=[[r["step"], round(r["rate"]), round(r["at"], 1)] for r in self.reports],
            profile=profile.read_text().splitlines()[:24] if profile.is_file() else None,
        )
        write(Path(os.environ["ZOO_FOUND"]), found)
        sys.stdout.flush()
        os._exit(0)


def write(path: Path, found: Any) -> None:
    """Write a file whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(found))
    part.replace(path)


def ends_with(parent: int) -> None:
    """End this process, and all that it starts, when its parent is gone: a call was cut short."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def child(name: str, form: str, args: argparse.Namespace) -> None:
    """Do a job in this process."""
    ends_with(int(os.environ["ZOO_PARENT"]))
    place, found = Path(args.place), Path(os.environ["ZOO_FOUND"])
    if form == "prepare":
        write(found, prepare(name.split("+"), place, args))
        return
    row = row_of(name, args)
    words = words_of(row, form, place, args)
    if form == "parts":
        from distill_parts import Parts

        kept = Path(args.work) / "parts.json"
        write(found, dict(parts=Parts(config_of(words), kept).measure()))
        return
    print("phase imports begins", flush=True)
    import zoo.commands.distill.run as commands
    from zoo.cli import main as zoo

    carry_out = commands.carry_out

    def announced(phase: Any, work: Any) -> None:
        print(f"phase {phase.__name__} begins", flush=True)
        carry_out(phase, work)

    commands.carry_out = announced  # pyright: ignore[reportAttributeAccessIssue]
    until, shown = (row.curve, row.shown) if form in ("plain", "auto") else (0, row.shown)
    if form in ("cold", "idle"):  # after the profile, too
        shown = 2 * row.shown
    if form == "spread":
        until, shown = (KILLED if args.killed else LAST), 0
        until = until if not args.tiny else until // 10
    Watch(place, until=until, shown=shown, kills=args.killed).hook()
    sys.argv = ["zoo", *words]
    code = zoo(words)
    if code or form != "dry":
        raise SystemExit(code or "The run was over before it had shown its speed.")


def config_of(words: list[str]) -> Any:
    """Return the config of a run, a `Distill`."""
    from zoo.commands.distill.args import read_args

    (config,) = read_args(words[1:]).stages.values()
    return config


def prepare(names: list[str], place: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Compile what some rows need, each part once and all at the same time."""
    from zoo.train.device import cores, device_of
    from zoo.train.distill.compiling import mark_of, parts_of
    from zoo.train.distill.speed import choose, keep_compiled
    from zoo.train.run import Run

    keep_compiled()
    todo = dict[Path, tuple[Path, str]]()
    for name in names:
        config = config_of(words_of(row_of(name, args), "auto", place / name, args))
        Run.create(config)
        for part in parts_of(config, choose(config, device_of(config.device))):
            if not (mark := mark_of(config, part)).is_file():
                todo.setdefault(mark, (config.out, part))
    threads = str(max(1, cores() // max(1, len(todo))))
    env = dict(os.environ, TORCHINDUCTOR_COMPILE_THREADS=threads, OMP_NUM_THREADS=threads)
    began, running, took = time.perf_counter(), {}, dict[str, Any]()
    for run, part in todo.values():
        words = [sys.executable, "-m", "zoo.train.distill.compiling", str(run), part]
        running[f"{run.name} {part}"] = subprocess.Popen(words, env=env)
    while running:
        for key, process in list(running.items()):
            if (code := process.poll()) is not None:
                del running[key]
                took[key] = f"failed: {code}" if code else round(time.perf_counter() - began, 1)
                print(key, took[key], flush=True)
        time.sleep(0.2)
    return dict(compiled=took)


def run_child(
    name: str, form: str, args: argparse.Namespace, limit: float, *, tag: str = "", how: str = ""
) -> dict[str, Any]:
    """Do a job in a process of its own; what it says goes into the log, behind the seconds.

    Args:
        limit: Seconds after which it is killed.
        tag: Tells runs of one job apart.
        how: An option for the process, `--killed` or `--resumed`.
    """
    place = Path(args.work) / f"{name}-{form}{tag}"
    found, caches = Path(args.work) / f"{name}-{form}{tag}{how}.json", Path(args.work) / "cache"
    found.unlink(missing_ok=True)
    if form == "cold":
        subprocess.run(["rm", "-rf", str(caches)], check=True)
    if how != "--resumed":
        subprocess.run(["rm", "-rf", str(place)], check=True)
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    began = time.time()
    env = dict(
        os.environ, ZOO_CACHE=str(caches), PYTHONPATH=paths, COLUMNS="150", PYTHONUNBUFFERED="1",
        ZOO_BEGAN=str(began), ZOO_FOUND=str(found), ZOO_PARENT=str(os.getpid()),
    )  # fmt: skip
    words = [sys.executable, __file__, "--child", name, form, "--place", str(place)]
    words += ["--work", str(args.work), "--photos", str(args.photos), *filter(None, [how])]
    words += ["--tiny"] * args.tiny + (["--batch", str(args.batch)] if args.batch else [])
    child = subprocess.Popen(
        words, env=env, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert child.stdout is not None
    timer = threading.Timer(limit, end, [child])
    timer.start()
    lines = []
    with args.log.open("a") as log:
        for line in child.stdout:
            lines.append(line)
            log.write(f"{name}:{form}{tag}{how} {time.time() - began:7.1f} {line}")
            log.flush()
            if found.is_file():
                break  # a worker that is still there would hold the pipe
    timer.cancel()
    ended = found.is_file()
    code = 0 if ended else child.wait()
    end(child)
    result = json.loads(found.read_text()) if ended else {}
    result["seconds"] = time.time() - began
    if form == "dry":
        result["held"] = [x.strip() for x in lines if "a step holds" in x or "form:" in x]
    if code:
        killed = f"ended by signal {-code} after {result['seconds']:.0f} s; " if code < 0 else ""
        result["error"] = killed + "".join(lines[-12:])[-1500:]
    return result


def end(child: "subprocess.Popen[str]") -> None:
    """End a process and all that it started."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    child.wait()


def spread(name: str, args: argparse.Namespace, limit: float) -> dict[str, Any]:
    """Train three times alike, and once with a kill on the way, at the same time."""
    began = time.monotonic()

    def through(tag: str) -> dict[str, Any]:
        return run_child(name, "spread", args, limit, tag=tag)

    def killed(tag: str) -> dict[str, Any]:
        run_child(name, "spread", args, limit, tag=tag, how="--killed")
        left = limit - (time.monotonic() - began)
        return run_child(name, "spread", args, left, tag=tag, how="--resumed")

    with ThreadPoolExecutor(4) as pool:
        runs = [pool.submit(through, f"-{number}") for number in range(3)]
        runs.append(pool.submit(killed, "-3"))
        found = [run.result() for run in runs]
    result: dict[str, Any] = dict(runs=found, seconds=time.monotonic() - began)
    if errors := [run["error"] for run in found if "error" in run]:
        result["error"] = errors[0]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("jobs", nargs="*", metavar="ROW:FORM")
    parser.add_argument("--out", type=Path, default=Path("distill-speed.json"))
    parser.add_argument("--log", type=Path, default=Path("distill-speed.log"))
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "zoo-speed")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--photos", type=int, default=6144)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--report", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--place", help=argparse.SUPPRESS)
    for word in ("--killed", "--resumed"):  # how a process does its job
        parser.add_argument(word, action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.list:
        print(*ROWS, "|", *FORMS)
    elif args.report:
        from distill_report import report

        found = [json.loads(file.read_text()) for file in args.report]
        print(*report({k: v for part in found for k, v in part.items()}, ROWS), sep="\n")
    elif args.child:
        name, form = args.child
        child(name, form, args)
    else:
        do(checked(args.jobs, parser), args)


def checked(jobs: list[str], parser: argparse.ArgumentParser) -> list[list[tuple[str, str]]]:
    """Split jobs into row and form, and groups into their jobs."""
    found = [[(j.partition(":")[0], j.partition(":")[2]) for j in g.split(",")] for g in jobs]
    for name, form in (pair for group in found for pair in group):
        rows = name.split("+") if form == "prepare" else [name]
        if form not in FORMS or any(row not in ROWS for row in rows):
            parser.error(f"{name}:{form}: rows are {', '.join(ROWS)}, forms {', '.join(FORMS)}")
    return found


def do(groups: list[list[tuple[str, str]]], args: argparse.Namespace) -> None:
    """Do the jobs that fit into the time, and write down each."""
    from distill_report import summary

    end_of_time, began = time.monotonic() + args.seconds, time.monotonic()
    for folder in (args.work, args.out.absolute().parent, args.log.absolute().parent):
        folder.mkdir(parents=True, exist_ok=True)
    done = json.loads(args.out.read_text()) if args.out.is_file() else {}
    photos(args.photos)
    print(f"images are there after {time.monotonic() - began:.1f} s", flush=True)
    for group in groups:
        left = end_of_time - time.monotonic()
        todo = {f"{n}:{f}": (n, f) for n, f in group if f == "prepare" or not known(done, n, f)}
        needed = max((SECONDS[f] + MORE.get(n, 0) for n, f in todo.values()), default=0)
        if left < needed:
            print(
                f"{', '.join(todo)}: not begun, {left:.0f} s left, {needed:.0f} needed", flush=True
            )
            continue
        limit = min(left, 1.8 * needed + 600 * args.tiny)
        with ThreadPoolExecutor(len(group)) as pool:
            running = {pool.submit(job, *words, args, limit): key for key, words in todo.items()}
            for future in as_completed(running):
                done[running[future]] = future.result()
                write(args.out, done)
                print(f"{running[future]}: {summary(future.result())}", flush=True)


def known(done: dict[str, Any], name: str, form: str) -> bool:
    """Tell whether a job was done."""
    return "error" not in done.get(f"{name}:{form}", dict(error=""))


def job(name: str, form: str, args: argparse.Namespace, limit: float) -> dict[str, Any]:
    """Do one job."""
    if form == "spread":
        return spread(name, args, limit)
    return run_child(name, form, args, limit)


if __name__ == "__main__":
    main()
