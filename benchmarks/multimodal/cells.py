"""The cells of one seed: each trains or measures one thing, and says what it found."""

import argparse
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import zoo
from zoo.commands.distill.image_text import distill_image_text
from zoo.multimodal.open import adaptor_tower, mixture_tower, open_tower, save_backbone
from zoo.train.config import Augment, Every, Optim
from zoo.train.distill.image_text_config import DistillImageText
from zoo.train.run import Run

Found = dict[str, Any]
ENCODERS = dict(
    resnet=("resnet18@64", ("output_stride=8",), 1),
    vit=("vit_tiny_patch16_224@64", ("patch_size=8", "depth=6"), 2),
    eradio=("eradio_xxxtiny@128", (), 1),
)
"""Three encoders of different kinds, and how many times `--align` each needs to begin to look: in
400 steps a ViT got 6 points above the blind control, in 800 more than 25. All see 8 x 8 cells."""
STUDENT = ("resnet26@64", ("output_stride=8",))
PUBLISHED = (
    ("vit_large_patch14_clip_336@448", 448),
    ("convnext_xxlarge@448", 448),
    ("eva02_large_patch14_448@448", 448),
)
"""Shapes of Eagle's encoders (2408.15998), each at 448 px."""
PUBLISHED_STUDENT, WIDTHS = "radio_vit_large_patch16", dict(clip=1024, convnext=3072, eva=1024)


class Cells:
    """One seed's runs, in one folder."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.work = args, args.out / "work" / f"{args.show}-{args.seed}"
        self.work.mkdir(parents=True, exist_ok=True)

    def language(self) -> str:
        """Return the language model of all runs: a small LLaMA of bytes, with random weights."""
        folder = self.work / "language"
        if not (folder / "config.json").is_file():
            width, layers = (32, 1) if self.args.tiny else (256, 4)
            model: Any = zoo.create_model("llama", d_model=width, num_hidden_layers=layers)
            model.save_pretrained(folder)
        return f"lm:{folder}/random"

    def config(self, name: str, **fields: Any) -> DistillImageText:
        """Return the settings of a run."""
        args = self.args
        shared: dict[str, Any] = dict(
            out=self.work / name, seed=args.seed, batch=args.batch, workers=args.workers,
            every=Every(log=50, evaluate=args.evaluate, checkpoint=args.evaluate),
            eval_samples=args.most,
            optim=Optim(lr=1e-3, weight_decay=0.05, ema="auto"),
        )  # fmt: skip
        if "start" not in fields:
            shared |= dict(language=self.language())
        return DistillImageText(**(shared | fields))

    def train(self, name: str, **fields: Any) -> Found:
        """Train, or read what an earlier call has left, and return its numbers."""
        config = self.config(name, **fields)
        run = Run(config.out)
        if not run.read_json("about.json"):
            begun = (config.out / "config.json").is_file()
            if begun:
                config = replace(config, slices=run.config(DistillImageText).slices)
            run = distill_image_text(config, resume=begun)
        about = run.read_json("about.json")
        keys = (
            "after",
            "shuffled",
            "blind",
            "question_alone",
            "questions",
            "parameters",
            "seconds",
        )
        curve = [r for r in read_rows(config.out / "metrics.jsonl") if r.get("kind") == "eval"]
        short = [dict(step=row["step"], exact=row["exact"]) for row in curve]
        return {key: about[key] for key in keys} | dict(steps=config.steps, curve=short)

    # ------------------------------------------------------------ easy-VQA

    def easy(self) -> Iterator[tuple[str, Callable[[], Found]]]:
        """Yield one run on easy-VQA: a tower from scratch, and all parts learn."""
        yield "vlm", lambda: self.easy_vqa("vlm", self.args.steps)

    def easy_vqa(self, name: str, steps: int) -> Found:
        """Train a VLM of a ResNet on easy-VQA from scratch."""
        tower, options, _ = ENCODERS["resnet"]
        return self.train(
            name, data=str(self.args.data / "easy_vqa"), tower=(tower,), tower_options=options,
            steps=steps, augment=Augment(scale=(0.8, 1.0), flip=0.5),
        )  # fmt: skip

    # ------------------------------------------------------------ the collapse

    def collapse(self) -> Iterator[tuple[str, Callable[[], Found]]]:
        """Yield encoders, their mixture, the student that stands in for them, and the controls."""
        data, half = str(self.args.data / "drawn"), self.args.second
        frozen: dict[str, Any] = dict(data=data, steps=half, learn=("projector", "language"))
        every: dict[str, Any] = dict(data=data, steps=half, tower_lr=0.3)
        aligned = tuple(f"vlm:{self.work / f'alone_{name}'}" for name in ENCODERS)
        for name, (tower, options, times) in ENCODERS.items():
            fields: dict[str, Any] = dict(
                data=data, tower=(tower,), tower_options=options, steps=times * self.args.align
            )
            yield f"alone_{name}", lambda n=name, f=fields: self.train(f"alone_{n}", **f)
        mixture = dict(tower=aligned, size=64, stride=8)
        yield "mixture", lambda: self.train("mixture", **mixture, **frozen)
        yield "distil", self.distil
        adaptors = dict(tower=(f"adaptors:{self.work / 'student'}@64",))
        yield "adaptors", lambda: self.train("adaptors", **adaptors, **frozen)
        tower, options = STUDENT
        scratch = dict(tower=(tower,), tower_options=options, data=data)
        steps = self.args.align + half
        yield "without_teachers", lambda: self.train("without_teachers", **scratch, steps=steps)
        yield "mixture_tuned", lambda: self.train("mixture_tuned", **mixture, **every)
        yield "adaptors_tuned", lambda: self.train("adaptors_tuned", **adaptors, **every)

    def distil(self) -> Found:
        """Distil the encoders into one student by `zoo.distill`."""
        out, began = self.work / "student", time.perf_counter()
        teachers = []
        for name, (tower, *_) in ENCODERS.items():
            folder = self.work / "teachers" / name
            if not folder.is_dir():
                save_backbone(open_tower(f"vlm:{self.work / f'alone_{name}'}"), folder)
            teachers.append(f"timm:local-dir:{folder}@{tower.partition('@')[2]},summary=0")
        if not Run(out).read_json("about.json"):
            name, options = STUDENT
            fields: dict[str, Any] = dict(
                data=str(self.args.data / "pictures.npz"), teachers=teachers, out=out,
                student=name.partition("@")[0], student_options=list(options), size=64,
                batch=self.args.batch, steps=self.args.distil, workers=self.args.workers,
                seed=self.args.seed, calibration=2 if self.args.tiny else 16, eval_images=256,
                probe_images=256, augment=dict(scale=[1.0, 1.0], ratio=[1.0, 1.0], flip=0.0),
                every=dict(log=50, evaluate=10**6, checkpoint=self.args.evaluate),
                heads=dict(hidden=512),
            )  # fmt: skip
            zoo.distill(resume=out) if (out / "config.json").is_file() else zoo.distill(**fields)
        rows = [r for r in read_rows(out / "metrics.jsonl") if r.get("kind") == "eval"]
        last = next((r for r in reversed(rows) if r.get("arm", "student") == "student"), {})
        kept = {k: v for k, v in last.items() if "fidelity" in k}
        return dict(fidelity=kept, seconds=time.perf_counter() - began, steps=self.args.distil)

    # ------------------------------------------------------------ the cut

    def cut(self) -> Iterator[tuple[str, Callable[[], Found]]]:
        """Yield the VLM of `easy`, and its cuts to half its cost: joint, and of one part alone."""
        steps = self.args.parent_steps
        yield "parent", lambda: self.easy_vqa("parent", steps) | self.cost("parent")
        for part in ("all", "vision", "language"):
            yield f"cut_{part}", lambda part=part: self.pruned(part)

    def pruned(self, part: str) -> Found:
        """Cut by `zoo prune`, and let the child learn from its parent for equally many steps."""
        from zoo.commands.prune.args import main

        args, out = self.args, self.work / f"cut_{part}"
        if not (out / "prune.json").is_file():
            if (out / "run" / "config.json").is_file():
                main(["--resume", str(out)])
            else:
                shutil.rmtree(out, ignore_errors=True)  # it was killed while it was written
                what, share = "flops", args.share
                if args.budget == "latency":
                    what, share = "latency_ms", args.share * self.parent_latency()
                few = "--search.candidates 2 --samples 16" if args.tiny else "--samples 512"
                words = (
                    f"vlm:{self.work / 'parent'} --part {part} --out {out} --seed {args.seed} "
                    f"--to {what}={share} --data {args.data / 'easy_vqa'} --batch 64 {few} "
                    f"--search.batch {args.cut_batch} --distill {args.recover} "
                    f"--batch {args.batch} --workers {args.workers} --eval-samples {args.most} "
                    f"--every.log 50 --every.evaluate {args.evaluate} "
                    f"--every.checkpoint {args.evaluate} "
                    "--augment.scale 0.8 1.0 --augment.flip 0.5"
                )
                try:
                    main(words.split())
                except ValueError as error:  # one part may be too small a share of the cost
                    return dict(refused=str(error))
        about, cut = Run(out / "run").read_json("about.json"), Run(out).read_json("prune.json")
        first = next(r for r in read_rows(out / "run" / "metrics.jsonl") if r.get("kind") == "eval")
        chosen = next(c for c in cut["search"]["candidates"] if c["chosen"])
        kept = ("after", "shuffled", "blind", "question_alone", "questions", "parameters")
        found: Found = {key: about[key] for key in (*kept, "seconds")} | dict(steps=args.recover)
        found |= dict(keeps=chosen["to"], flops=chosen["cost"]["flops"])
        return found | dict(before_training=first["exact"]) | self.cost(f"cut_{part}")

    def parent_latency(self) -> float:
        """Return the parent's milliseconds, which all cuts of a seed are held against."""
        file = self.work.parent.parent / f"cut-{self.args.seed}.json"
        return json.loads(file.read_text())["parent"]["latency_ms"]

    def cost(self, name: str) -> Found:
        """Time a model from an image and its question to the logits, as `zoo prune` does."""
        from zoo.axes import named_shapes
        from zoo.commands.prune.image_text import one_sample, read_image_text
        from zoo.commands.prune.request import Prune, SearchOptions
        from zoo.commands.prune.search import Stopwatch
        from zoo.students.prune.parent import open_parent

        data, number = self.args.data / "easy_vqa", 16 if self.args.tiny else 512
        parent = open_parent(str(self.work / name))
        samples = read_image_text(parent, data, number=number, length=512, seed=self.args.seed)
        parent = replace(parent, sample=one_sample(parent, samples))
        parent.model.to("cuda" if torch.cuda.is_available() else "cpu")
        asked = Prune(search=SearchOptions(batch=self.args.cut_batch))
        watch = Stopwatch(asked, parent, named_shapes(parent.model), None)
        return dict(latency_ms=watch.time(parent.model))

    # ------------------------------------------------------------ latency

    def latency(self) -> Iterator[tuple[str, Callable[[], Found]]]:
        """Yield time and memory of towers of published shapes at 448 px, with random weights."""
        yield "mixture", lambda: self.timed(self._published_mixture)
        yield "adaptors", lambda: self.timed(self._published_adaptors)

    def _published_mixture(self, device: torch.device) -> Any:
        names = (
            ("resnet18@64", "vit_tiny_patch16_224@64")
            if self.args.tiny
            else [n for n, _ in PUBLISHED]
        )
        each = [open_tower(n, max_tokens=2**20, balanced=True, device=device) for n in names]
        size, stride = (64, 16) if self.args.tiny else (448, 14)
        return mixture_tower(each, size=size, stride=stride)

    def _published_adaptors(self, device: torch.device) -> Any:
        from zoo.students.build import build_student

        size, stride = (64, 16) if self.args.tiny else (448, 14)
        name = "vit_tiny_patch16_224" if self.args.tiny else PUBLISHED_STUDENT
        widths = {label: (None, width) for label, width in WIDTHS.items()}
        student = build_student(name, widths, size=size, device=device)
        return adaptor_tower(student, stride=stride)

    @torch.no_grad()
    def timed(self, build: Callable[[torch.device], Any]) -> Found:
        """Measure a tower in bfloat16: milliseconds of batches of 1 and 8, parameters, memory."""
        from zoo.eval.speed.models import timed

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(0)
        tower = build(device).to(torch.bfloat16).eval()
        found: Found = dict(parameters=sum(p.numel() for p in tower.parameters()))
        for batch in (1, 8):
            sides = (tower.config.size, tower.config.size)
            pixels = torch.rand(batch, 3, *sides, device=device, dtype=torch.bfloat16)

            def step(pixels: torch.Tensor = pixels) -> None:
                tower(pixels)

            for _ in range(3):
                step()
            if device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            times = sorted(timed(step, device.type, 2 if self.args.tiny else 20))
            found[f"ms_{batch}"] = 1e3 * times[len(times) // 2]
            if device.type == "cuda":
                found[f"peak_gib_{batch}"] = torch.cuda.max_memory_allocated() / 2**30
        found["tokens"] = (tower.config.size // tower.config.patch_size) ** 2
        return found


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a run's metrics."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
