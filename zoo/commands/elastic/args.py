"""`zoo elastic`: what its command line says, read without torch."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from zoo.commands.again import started_again
from zoo.commands.distill.text_args import resumed
from zoo.commands.parse import named_as_field, parse, refuse_other_folder
from zoo.train.distill.elastic_config import Elastic


@dataclass(frozen=True, kw_only=True)
class ElasticArgs:
    model: tyro.conf.Positional[str] = ""
    """lm:FOLDER of transformers' files; or a vision model of timm or zoo, which is only sorted."""
    run: Annotated[Elastic, tyro.conf.arg(name="")]
    resume: Path | None = None
    """Continue the run in this folder; its own settings are the defaults."""
    dry_run: bool = False
    """Print the sizes and their parameters, and stop."""


def main(argv: list[str]) -> None:
    """Train one model whose first units are smaller models, several sizes at once.

    Example:
    zoo elastic lm:llama --sizes "small:ffn=0.5,stream=0.5;medium:ffn=0.75" --text wiki.txt \\
        --steps 2000 --out runs/elastic
    zoo export runs/elastic --size small --out llama-small

    Units are sorted by their scores, so that a size is the first ones of every axis. Each slice of
    a batch trains one size, the whole model among them; all learn the next tokens of the whole
    model as it was (--teachers for another one). OUT/export is an ordinary folder of transformers
    with the whole model.

    A vision model is sorted and written, and zoo distill trains its sizes:
    zoo elastic vit_small_patch16_224.augreg_in1k --sizes "small:ffn=0.5" --data PHOTOS --out sorted
    zoo distill --student local-dir:sorted --teachers timm:vit_small_patch16_224 --data PHOTOS
    """
    config, args = read_args(argv)
    from zoo.commands.elastic.run import elastic, print_sizes

    if args.dry_run:
        print_sizes(config)
        return
    if not config.student.startswith("lm:"):
        from zoo.commands.elastic.images import sort_model

        print(f"sorted   {sort_model(config)}  (zoo distill --student local-dir:{config.out})")
        return
    if started_again(args.resume, config.out):
        config, args = read_args(["--resume", str(config.out)])
    run = elastic(config, resume=args.resume is not None)
    about = run.read_json("about.json")
    print(f"model    {run.path / 'export'}  (zoo export {run.path} --size NAME --out DIR)")
    for name, values in about["after"].items():
        before = about["before"].get(name)  # what a router chose, it had not chosen before
        began = f"{before['perplexity']:.4g} -> " if before else ""
        print(
            f"{name:8} {about['numbers'][name]:,} numbers  perplexity {began}"
            f"{values['perplexity']:.4g}  bpb {values['bpb']:.4f}"
        )
    if config.router != "none":
        print(f"chosen   {run.read_json('export/elastic.json')['sizes']}")


def read_args(argv: list[str]) -> tuple[Elastic, ElasticArgs]:
    """Read the changes to the defaults, or to a run that is resumed: its config, and the rest."""
    argv = named_as_field(argv, "--text", "--data")
    default = ElasticArgs(run=Elastic())
    if folder := resumed(argv):
        from zoo.train.run import Run

        stored = Run(folder).config(Elastic)
        default = ElasticArgs(run=replace(stored, out=folder), model=stored.student)
    args = parse(ElasticArgs, argv, "elastic", main.__doc__ or "", default=default)
    refuse_other_folder(args.run.out, args.resume)
    config = replace(args.run, student=args.model)
    if args.model and config.losses.kl and not config.teachers:
        config = replace(config, teachers=(args.model,))
    return config, args
