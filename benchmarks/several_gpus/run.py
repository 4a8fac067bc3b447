"""What several GPUs of one host do: equality, speed, memory, checkpoints, long texts, links.

    python -m benchmarks.several_gpus.run --out several.json --seconds 560      # 2 GPUs
    python -m benchmarks.several_gpus.run --device cpu --tiny                   # a rehearsal
    python -m benchmarks.several_gpus.run --gpus 1                              # world size 1

Every run is the product's own command in processes of its own. What is known is written to --out
after each; what is there is not measured again.
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.distill_speed import ROWS, TINY, Row, photos
from benchmarks.several_gpus.launch import ROOT, Machine, distance, machine_facts, report

SPEEDS = ("trio", "mamba", "fastervit", "eradio")
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
        for part in (self.links, self.equality, self.speed, self.memory, self.stalls, self.texts):
            yield from part()

    def links(self) -> Part:
        yield "links", self._links

    def _links(self) -> dict[str, Any]:
        out = self.machine.work / "links.json"
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        words += [f"--nproc-per-node={self.machine.gpus}", "-m", "zoo", "bench", "links"]
        words += ["--device", self.machine.device, "--out", str(out)]
        words += ["--most", "4", "--rounds", "2"] if self.tiny else []
        subprocess.run(words, cwd=ROOT, check=True, timeout=self.machine.limit)
        return json.loads(out.read_text())

    def equality(self) -> Part:
        """The same slices on one process, again on one, and cut and shared in each way."""
        gpus = self.machine.gpus
        words = self.equal()
        groups = ["1"] * max(gpus, 2)
        parted = [*words, "--sizes", "64", "96", "--partition", *groups[:2]]
        forms = {
            "again": (words, 1, 1), "ddp": ([*words, "--ranks", "ddp"], gpus, 1),
            "fsdp": ([*words, "--ranks", "fsdp"], gpus, 1),
            "hsdp, two agents": ([*words, "--ranks", "hsdp"], gpus, 2),
            "partition": (parted, gpus, 1),
        }  # fmt: skip
        one: dict[bool, Any] = {}

        def gap(form: str) -> float:
            ours, processes, nodes = forms[form]
            own = form == "partition"
            if own not in one:
                name = f"equal-one{'-partition' * own}"
                one[own] = self.machine.run(name, parted if own else words, processes=1)
            done = self.machine.run(
                f"equal-{form.partition(',')[0]}", ours, processes=processes, nodes=nodes
            )
            return distance(done, one[own])

        for form, (_, processes, nodes) in forms.items():
            if nodes <= processes:
                yield f"equality, {form}", lambda form=form: gap(form)

    def equal(self, *more: str) -> list[str]:
        """Return the command whose runs are compared: as many slices as processes."""
        steps = ("--steps", "4" if self.tiny else "20")
        return [*shlex.split(EQUAL), *steps, "--slices", str(max(self.machine.gpus, 2)), *more]

    def speed(self) -> Part:
        """`zoo distill` as it is, on one GPU and on all, with as many images for each."""
        for name in SPEEDS[:1] if self.tiny else SPEEDS:
            row = replace(TINY, steps=8) if self.tiny else replace(ROWS[name], steps=150)
            for processes in dict.fromkeys((1, self.machine.gpus)):
                yield (
                    f"img/s, {name}, {processes} GPU",
                    lambda name=name, row=row, n=processes: self.machine.run(
                        f"speed-{name}-{n}", self.words(row, n), processes=n
                    ).rates(),
                )
        if "links" in self.done:
            yield "img/s, trio, planned", self._planned

    def words(self, row: Row, processes: int, *more: str) -> list[str]:
        """Return the command of a row, with as many images for each process."""
        data = photos(64 if self.tiny else 6144)
        words = ["distill", "custom", "--data", str(data), "--teachers", *row.teachers, "--student"]
        words += [row.student, "--size", str(row.size), "--batch", str(row.batch * processes)]
        words += ["--steps", str(row.steps), "--calibration", str(row.calibration), "--every.log"]
        words += ["5", "--eval-images", "64", "--every.evaluate", "100000"]
        return [*words, "--every.checkpoint", "100000", *more]

    def _planned(self) -> float:
        links = self.machine.work / "links.json"
        row, n = (TINY if self.tiny else ROWS["trio"]), self.machine.gpus
        words = [sys.executable, "-m", "zoo", "plan", *self.words(row, n)[1:], "--gpus", str(n)]
        words += ["--compile-teachers", "--links", str(links)]
        out = subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        line = next(line for line in out.splitlines() if "img/s" in line and "modelled" in line)
        return float(line.split("│")[-2].replace(",", ""))

    def memory(self) -> Part:
        """A large student in each way, and a teacher of 7 B parameters whole and cut."""
        n, student = self.machine.gpus, "vit_huge_patch14_224"
        seven = "timm:vit_7b_patch16_dinov3/random@224"
        large = Row(("timm:vit_base_patch16_224/random@224",), student, 224, 16, 12, 1)
        taught = Row((seven,), "vit_base_patch16_224", 224, 16, 12, 1)
        if self.tiny:
            large, taught = (replace(TINY, steps=4, calibration=1) for _ in range(2))
        cut = replace(taught, teachers=tuple(f"{t},place=shard" for t in taught.teachers[-1:]))
        forms = {
            "student, ddp": (large, "--ranks", "ddp", n, 1),
            "student, fsdp": (large, "--ranks", "fsdp", n, 1),
            "student, hsdp, two agents": (large, "--ranks", "hsdp", n, 2),
            "teacher, whole": (taught, "--ranks", "ddp", n, 1),
            "teacher, cut": (cut, "--ranks", "ddp", n, 1),
        }

        def measure(form: str) -> dict[str, Any]:
            row, *method, processes, nodes = forms[form]
            words = self.words(row, processes, *method, "--speed", "plain")
            name = "memory-" + form.replace(", ", "-").replace(" ", "-")
            done = self.machine.run(name, words, processes=processes, nodes=nodes)
            return dict(peak_gb=done.peak_gb, img_s=done.rates())

        for form, (*_, processes, nodes) in forms.items():
            if nodes <= processes:
                yield f"memory, {form}", lambda form=form: measure(form)

    def stalls(self) -> Part:
        yield "checkpoint stall", self._stall
        yield "resume of all GPUs' checkpoint on one", self._resume

    def _stall(self) -> dict[str, Any]:
        out = self.machine.work / "stall.json"
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        words += [f"--nproc-per-node={self.machine.gpus}", "benchmarks/checkpoint_stall.py"]
        words += ["--device", self.machine.device, "--json", str(out), "--steps", "220"]
        if self.tiny:
            words += ["--model", "test_vit", "--size", "160", "--batch", "2", "--every", "4"]
            words += ["--steps", "12"]
        subprocess.run(words, cwd=ROOT, check=True, timeout=self.machine.limit)
        return json.loads(out.read_text())

    def _resume(self) -> float:
        """Cut the last half of a cut run off, and let one process go on."""
        words = self.equal("--ranks", "fsdp")
        whole = self.machine.run("resume-whole", words, processes=self.machine.gpus)
        half = self.machine.run("resume-half", words, processes=self.machine.gpus)
        saved = sorted((half.out / "checkpoints").glob("step_*"))
        for path in saved[len(saved) // 2 :]:
            subprocess.run(["rm", "-rf", str(path)], check=True)
        again = self.machine.run(
            "resume-half", ["distill", "--resume", str(half.out), "--ranks", "ddp"], processes=1
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
        except (RuntimeError, subprocess.SubprocessError) as error:
            print(f"{name}: failed: {error}", flush=True)
            continue
        report(args.out, found)
        print(f"{name}: {str(found[name])[:200]} ({time.monotonic() - began:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
