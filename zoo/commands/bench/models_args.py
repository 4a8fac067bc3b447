"""`zoo bench models`: what its command line says, read without torch."""

import itertools
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from zoo.commands.parse import parse, resolve_device
from zoo.train.ranges import BATCH, COUNT, PIXELS, between, check_ranges

PEERS = ("swin_tiny_patch4_window7_224", "convnext_tiny", "vit_small_patch16_224")
"""timm's models with about as many multiply-adds as our smallest."""
DEFAULT = ("mambavision_t", "fastervit_0", *PEERS)


@dataclass(frozen=True, kw_only=True)
class ModelArgs:
    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """Registered models, zoo's or timm's, with options if need be (eradio_l,window_size=8), or
    patterns of zoo's own ("eradio*"); mambavision_t, fastervit_0 and three of timm's if none."""
    device: str = "auto"
    """cpu or cuda; cuda where there is one."""
    size: Annotated[tuple[int, ...], PIXELS] = (224,)
    batch: Annotated[tuple[int, ...], BATCH] = (8,)
    modes: str = "eager"
    """Separated by commas: eager, deploy, train, each with +compiled, +autotuned or +graphs, and
    these with +blocks, which compiles block by block."""
    precision: str = "auto"
    """float32, amp (autocast to bfloat16) or bf16 (weights too); amp on cuda, else float32."""
    channels_last: bool = False
    peer: str = "swin_tiny_patch4_window7_224"
    """The model that the others' ratios are to; it is measured too."""
    rounds: Annotated[int, COUNT] = 20
    threads: Annotated[int | None, between(1, 4096)] = None
    """Of the CPU, for all models; torch's own choice if not given."""
    out: Path | None = None
    """Write this JSON file, a Markdown table and the Pareto plot beside it."""
    compare: Path | None = None
    """Show ratios with this earlier run, a JSON file that --out wrote."""
    profile: bool = False
    """Name each case's five most expensive kernels; on a GPU with their distance from the floor."""

    def __post_init__(self) -> None:
        check_ranges(self)


def main(argv: list[str]) -> None:
    """Measure images a second, memory and multiply-adds of models beside timm's.

    Example: zoo bench models mambavision_t --device cpu --threads 1 --modes eager,deploy
    --out benchmarks/results/cpu.json
    """
    args = parse(ModelArgs, argv, "bench models", main.__doc__ or "")
    import torch

    from zoo.commands.bench.models import expand_names, measure_models
    from zoo.eval.speed.models import Case

    device = resolve_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    names = expand_names([*(args.names or DEFAULT), args.peer])
    precision = args.precision
    if precision == "auto":
        precision = "amp" if device == "cuda" else "float32"
    cases = [
        Case(
            model=name,
            size=size,
            batch=batch,
            mode=mode,
            precision=precision,
            channels_last=args.channels_last,
            device=device,
        )
        for size, batch, mode, name in itertools.product(
            args.size, args.batch, args.modes.split(","), names
        )
    ]
    measure_models(
        cases,
        rounds=args.rounds,
        peer=args.peer,
        out=args.out,
        compare=args.compare,
        kernels=5 * args.profile,
        command=shlex.join(["zoo", "bench", "models", *argv]),
    )
