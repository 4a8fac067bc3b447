"""`zoo bench distill`: what its command line says, read without torch."""

import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from zoo.commands.parse import parse, resolve_device
from zoo.train.ranges import BATCH, COUNT, NOT_NEGATIVE, PIXELS, check_ranges


@dataclass(frozen=True, kw_only=True)
class StepArgs:
    teachers: tuple[str, ...] = ()
    """As `zoo distill` takes them; CLIP ViT-H/14@378 and DINOv2 ViT-g/14@224 with random weights
    on a GPU, two tiny ViTs elsewhere."""
    student: str | None = None
    size: Annotated[int | None, PIXELS] = None
    batch: Annotated[int | None, BATCH] = None
    precision: Literal["bf16", "int8", "fp8"] = "bf16"
    """Of the teachers' products."""
    gate: Annotated[float, NOT_NEGATIVE] = 1000.0
    """Least fidelity of teachers in 8 bits; 0 puts all layers into 8 bits."""
    compile: bool | None = None
    """Teachers' blocks and student; by default on a GPU alone."""
    overlap: bool = False
    """Run the teachers one batch ahead, on a stream of their own."""
    device: str = "auto"
    rounds: Annotated[int, COUNT] = 10
    out: Path | None = None
    """Write this JSON file."""
    profile: bool = False
    """Name the step's ten most expensive kernels."""

    def __post_init__(self) -> None:
        check_ranges(self)


def main(argv: list[str]) -> None:
    """Measure a distillation step and each of its parts alone, beside the cost model.

    Example: zoo bench distill --teachers timm:vit_small_patch14_dinov2/random@224
    --student eradio_xxxtiny --size 224 --batch 32
    """
    args = parse(StepArgs, argv, "bench distill", main.__doc__ or "")
    from zoo.commands.bench.distill import TINY, TRIO, measure_steps

    device = resolve_device(args.device)
    on_gpu = device == "cuda"
    given = {name: getattr(args, name) for name in ("teachers", "student", "size", "batch")}
    step = replace(
        TRIO if on_gpu else TINY,
        **{name: value for name, value in given.items() if value},
        precision=args.precision,
        gate=args.gate,
        overlap=args.overlap,
        compiled=on_gpu if args.compile is None else args.compile,
    )
    measure_steps(
        [step],
        device=device,
        rounds=args.rounds,
        out=args.out,
        kernels=10 * args.profile,
        command=shlex.join(["zoo", "bench", "distill", *argv]),
    )
