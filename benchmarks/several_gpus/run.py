"""What several GPUs of one host do: equality, speed, memory, checkpoints, long texts, links.

    python -m benchmarks.several_gpus.run --out several.json --seconds 560      # 2 GPUs
    python -m benchmarks.several_gpus.run --device cpu --tiny                   # a rehearsal
    python -m benchmarks.several_gpus.run --gpus 1                              # world size 1

Every run is the product's own command in processes of its own. What is known is written to --out
after each; what is there is not measured again. Rows come by how much they are wanted, so a call
that is too short leaves out the least; what failed is tried again.

A fifth of a run is training: on two H200s expect half an hour in all, in calls of --seconds.
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.distill_speed import ROWS, TINY, Row, photos
from benchmarks.several_gpus.launch import ROOT, Machine, distance, machine_facts, report

SPEEDS = ("mamba", "fastervit", "eradio")
EQUAL = (
    "distill custom --data embedded/photos --teachers rule:colour@64 rule:edges@64,summary=0 "
    "--student eradio_nano --size 64 --batch 16 --normalise alpha_only --calibration 2 "
    "--eval-images 16 --probe-images 32 --every.log 1 --every.checkpoint 1 --keep 99 "
    "--optim.drop-path 0.3 --optim.clip 0.5 --losses.teacher-drop 0.5 --losses.mesa 1 "
    "--losses.weighting uncertainty --speed plain"
)
LLAMA = dict(hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, num_attention_heads=16,
             num_key_value_heads=8, vocab_size=257, max_position_embeddings=32768)  # fmt: skip
MIXTRAL = LLAMA | dict(intermediate_size=1408, num_local_experts=8, num_experts_per_tok=2)
SMALL = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2)  # fmt: skip
Part = Iterator[tuple[str, Callable[[], Any]]]


class Parts:
    """The rows of the table; each is a name, and a function that measures it."""

    def __init__(self, machine: Machine, tiny: bool):
        self.machine, self.tiny, self.done = machine, tiny, dict[str, Any]()

    def rows(self) -> Part:
        parts = (
            self.links, self.equality, lambda: self.speed("trio"), self.planned, self.stalls,
            self.memory, self.texts,
            *(partial(self.speed, name) for name in SPEEDS * (not self.tiny)),
        )  # fmt: skip
        for part in parts:
            yield from part()

    def links(self) -> Part:
        if self.machine.gpus > 1:
            yield "links", self._links

    def _links(self) -> dict[str, Any]:
        out = self.machine.work / "links.json"
        words = ["-m", "zoo", "bench", "links", "--device", self.machine.device, "--out", str(out)]
        words += ["--most", "4", "--rounds", "2"] if self.tiny else []
        self.machine.launch("links", words, processes=self.machine.gpus)
        found = json.loads(out.read_text())
        figures = {name: float(f"{found[name]:.3g}") for name in ("within", "hop_within")}
        print(f"for the GPU in train/constants.json: {json.dumps(figures)}; links {found['how']}")
        return found

    def equality(self) -> Part:
        """The same slices on one process, again on one, and cut and shared in each way.

        In float64 as on a CPU, and as runs compute on a GPU: there "again" tells what is noise.
        """
        gpus = self.machine.gpus
        words = self.equal()
        exact = [*words, "--precision", "float64"]
        groups = ["1"] * max(gpus, 2)
        parted = [*exact, "--sizes", "64", "96", "--partition", *groups[:2]]
        forms = {
            "float64, ddp": (exact, (), gpus, 1),
            "float64, fsdp": (exact, ("--ranks", "fsdp"), gpus, 1),
            "again": (words, (), 1, 1),
            "ddp": (words, (), gpus, 1),
            "fsdp": (words, ("--ranks", "fsdp"), gpus, 1),
            "float64, partition": (parted, (), gpus, 1),
            "float64, hsdp on two agents": (exact, ("--ranks", "hsdp"), gpus, 2),
        }
        ones = dict[tuple[str, ...], Any]()

        def gap(form: str) -> float:
            same, more, processes, nodes = forms[form]
            if (key := tuple(same)) not in ones:
                ones[key] = self.machine.run(f"equal-one-{len(ones)}", same, processes=1)
            name = "equal-" + form.replace(", ", "-").replace(" ", "-")
            done = self.machine.run(
                name, [*same, *more], processes=processes, nodes=nodes, torchrun=bool(more)
            )
            return distance(done, ones[key])

        for form, (*_, processes, nodes) in forms.items():
            if nodes == 1 or nodes < processes:  # else each node has one, and hsdp is fsdp
                yield f"equality, {form}", partial(gap, form)

    def equal(self, *more: str) -> list[str]:
        """Return the command whose runs are compared: as many slices as processes."""
        steps = ("--steps", "4" if self.tiny else "20")
        return [*shlex.split(EQUAL), *steps, "--slices", str(max(self.machine.gpus, 2)), *more]

    def speed(self, name: str) -> Part:
        """`zoo distill` on one GPU and on all, with as many images for each; plain on both."""
        row, steps = (TINY, 8) if self.tiny else (ROWS[name], 150)
        counts = tuple(dict.fromkeys((1, self.machine.gpus)))
        for n in counts:
            yield f"img/s, {name}, {n} GPU", partial(self._rate, name, row, n, steps)
        one, *several = [self.done.get(f"img/s, {name}, {n} GPU") for n in counts]
        if one and several and several[0]:
            yield f"share of {counts[1]} x 1, {name}", lambda: several[0] / one / counts[1]

    def _rate(self, name: str, row: Row, processes: int, steps: int) -> float:
        words = self.words(row, processes, steps, "--speed", "plain")
        return self.machine.run(f"speed-{name}-{processes}", words, processes=processes).rates()

    def words(self, row: Row, processes: int, steps: int, *more: str) -> list[str]:
        """Return the command of a row, with as many images for each process."""
        data = photos(64 if self.tiny else 6144)
        words = ["distill", "custom", "--data", str(data), "--teachers", *row.teachers, "--student"]
        words += [row.student, "--size", str(row.size), "--batch", str(row.batch * processes)]
        words += ["--steps", str(steps), "--calibration", str(row.calibration), "--every.log"]
        words += ["5", "--eval-images", "64", "--every.evaluate", "100000"]
        return [*words, "--every.checkpoint", "100000", *more]

    def planned(self) -> Part:
        n = self.machine.gpus
        yield "img/s, trio, planned", self._planned
        measured, told = (self.done.get(f"img/s, trio, {end}") for end in (f"{n} GPU", "planned"))
        if measured and told:
            yield "planned over measured, trio", lambda: told / measured

    def _planned(self) -> float:
        links = self.machine.work / "links.json"
        row, n = (TINY if self.tiny else ROWS["trio"]), self.machine.gpus
        words = [
            sys.executable,
            "-m",
            "zoo",
            "plan",
            *self.words(row, n, 150, "--speed", "plain")[1:],
        ]
        words += ["--gpus", str(n)]
        if found := self.done.get("links"):  # of an earlier call, perhaps on another machine
            links.write_text(json.dumps(found))
            words += ["--links", str(links)]
        out = subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        line = next(line for line in out.splitlines() if "img/s" in line and "modelled" in line)
        return float(line.split("│")[-2].replace(",", ""))

    def memory(self) -> Part:
        """A large student in each way, and a teacher of 7 B parameters whole and cut."""
        n, student = self.machine.gpus, "vit_huge_patch14_224"
        seven = "timm:vit_7b_patch16_dinov3/random@224"
        base, few = "vit_base_patch16_224", dict(batch=16, calibration=1)
        large = Row((f"timm:{base}/random@224",), student, 224, **few)
        taught, steps = Row((seven,), base, 224, **few), 12
        if self.tiny:
            large = taught = replace(TINY, calibration=1)
            steps = 4
        cut = replace(taught, teachers=tuple(f"{t},place=shard" for t in taught.teachers[-1:]))
        forms = {
            "student, ddp": (large, "ddp", n, 1),
            "student, fsdp": (large, "fsdp", n, 1),
            "teacher, whole": (taught, "ddp", n, 1),
            "teacher, cut": (cut, "ddp", n, 1),
            "student, hsdp on two agents": (large, "hsdp", n, 2),
        }

        def measure(form: str) -> dict[str, Any]:
            row, method, processes, nodes = forms[form]
            words = self.words(row, processes, steps, "--ranks", method, "--speed", "plain")
            name = "memory-" + form.replace(", ", "-").replace(" ", "-")
            done = self.machine.run(name, words, processes=processes, nodes=nodes, torchrun=True)
            return dict(peak_gb=done.peak_gb, img_s=done.rates())

        for form, (*_, processes, nodes) in forms.items():
            if nodes == 1 or nodes < processes:
                yield f"memory, {form}", partial(measure, form)

    def stalls(self) -> Part:
        yield "checkpoint stall", self._stall
        yield "resume of all GPUs' checkpoint on one", self._resume

    def _stall(self) -> dict[str, Any]:
        out = self.machine.work / "stall.json"
        words = ["benchmarks/checkpoint_stall.py", "--device", self.machine.device]
        words += ["--json", str(out), "--steps", "220"]
        if self.tiny:
            words += ["--model", "test_vit", "--size", "160", "--batch", "2", "--every", "4"]
            words += ["--steps", "12"]
        self.machine.launch("stall", words, processes=self.machine.gpus)
        return json.loads(out.read_text())

    def _resume(self) -> float:
        """Cut the last half of a cut run off, and let one process go on."""
        words = self.equal("--ranks", "fsdp", "--precision", "float64")
        n = self.machine.gpus
        whole = self.machine.run("resume-whole", words, processes=n, torchrun=True)
        half = self.machine.work / "resume-half"
        shutil.rmtree(half, ignore_errors=True)
        shutil.copytree(whole.out, half)
        saved = sorted((half / "checkpoints").glob("step_*"))
        for path in saved[len(saved) // 2 :]:
            shutil.rmtree(path)
        again = self.machine.run(
            half.name, ["distill", "--resume", str(half), "--ranks", "ddp"], processes=1
        )
        return distance(again, whole)

    def texts(self) -> Part:
        """Rows of 32,768 tokens: one over the heads of all (Ulysses), and experts over the GPUs."""
        n = self.machine.gpus
        spread = dict(llama=(LLAMA, "--sequence", 1), mixtral=(MIXTRAL, "--experts", n))
        for kind, (shape, option, batch) in spread.items():
            for processes in dict.fromkeys((1, n)):
                own = (option, str(n)) if processes > 1 else ()
                yield (
                    f"32k tokens, {kind}, {processes} GPU",
                    lambda k=kind, s=shape, p=processes, b=batch, o=own: self._text(k, s, p, b, *o),
                )

    def _text(
        self, kind: str, shape: dict[str, Any], processes: int, batch: int, *more: str
    ) -> dict[str, Any]:
        """Train on the same rows as one GPU does, and tell how far its losses are."""
        import transformers

        folder, text = self.machine.work / kind, self.machine.work / "text.txt"
        if not folder.is_dir():
            torch.manual_seed(0)
            config = getattr(transformers, f"{kind.capitalize()}Config")(
                **shape | (SMALL if self.tiny else {})
            )
            getattr(transformers, f"{kind.capitalize()}ForCausalLM")(config).save_pretrained(folder)
        sources = sorted(Path(json.__file__).parents[1].glob("*.py"))
        text.write_text("".join(p.read_text(errors="replace") for p in sources)[: 4 * 2**20])
        words = shlex.split(
            f"train-lm --model lm:{folder} --text {text} --length {254 if self.tiny else 32766} "
            f"--batch {batch} --slices {batch} --steps 12 --every.log 1 --eval-rows 2 "
            "--every.evaluate 100000 --every.checkpoint 100000"
        )
        done = self.machine.run(f"text-{kind}-{processes}", [*words, *more], processes=processes)
        found: dict[str, Any] = dict(
            tok_s=done.rates("tok"), losses=done.losses(), peak_gb=done.peak_gb
        )
        if alone := self.done.get(f"32k tokens, {kind}, 1 GPU"):
            pairs = zip(found["losses"], alone["losses"], strict=True)
            found["largest_gap"] = max(abs(a - b) for a, b in pairs)
        return found


def main() -> None:
    """Measure what is not measured yet, until the time is over."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("several.json"))
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", nargs="+", default=[""], help="rows that begin so")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--most", type=float, default=240, help="seconds of one run at most")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "several-gpus")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    end = time.monotonic() + args.seconds
    args.work.mkdir(parents=True, exist_ok=True)
    found = json.loads(args.out.read_text()) if args.out.is_file() else {}
    found["machine"] = machine_facts(args.device) | dict(gpus=args.gpus)
    parts = Parts(Machine(args.gpus, args.device, args.work), args.tiny)
    parts.done = found
    for name, measure in parts.rows():
        if name in found or not name.startswith(tuple(args.only)):
            continue
        if (left := end - time.monotonic()) < 20:
            print(f"{name}: not run, the time is over", flush=True)
            continue
        parts.machine = replace(parts.machine, limit=min(left, args.most))
        began = time.monotonic()
        try:
            found[name] = measure()
        except Exception as error:  # the other rows are still wanted
            print(f"{name}: failed: {type(error).__name__}: {error}", flush=True)
            found.setdefault("failed", {})[name] = f"{type(error).__name__}: {error}"[-2000:]
            report(args.out, found)
            continue
        found.get("failed", {}).pop(name, None)
        report(args.out, found)
        print(f"{name}: {str(found[name])[:200]} ({time.monotonic() - began:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
