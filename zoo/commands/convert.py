"""`zoo convert`: an official checkpoint as safetensors with a configuration."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from zoo.commands.parse import parse


@dataclass(frozen=True, kw_only=True)
class ConvertArgs:
    source: tyro.conf.Positional[Path]
    """A file of weights in any layout that the family reads."""
    name: tyro.conf.Positional[str]
    """The model that it is for, with the tag that it is, e.g. mambavision_t.in1k."""
    out: tyro.conf.Positional[Path]
    """The folder to write."""


def main(argv: list[str]) -> None:
    """Read an official checkpoint and write a folder for timm, or for transformers (Hyena).

    Example: zoo convert mambavision_tiny_1k.pth.tar mambavision_t.in1k models/mambavision_t
    """
    args = parse(ConvertArgs, argv, "convert", main.__doc__ or "")
    from zoo.language.hyena_sizes import SIZES

    if args.name in SIZES:
        from zoo.language.hyena import HyenaConfig
        from zoo.language.hyena_weights import convert_published

        out = convert_published(args.source, HyenaConfig(**SIZES[args.name]), args.out)
        print(f"{out}  (zoo.create_model('{args.name}', pretrained='{out}'))")
        return
    from zoo.convert import convert

    out = convert(args.source, args.name, args.out)
    print(f"{out}  (timm.create_model('local-dir:{out}', pretrained=True))")
