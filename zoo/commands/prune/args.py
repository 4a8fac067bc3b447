"""`zoo prune`: what its command line says, read without torch."""

from dataclasses import replace
from pathlib import Path

from zoo.commands.parse import parse
from zoo.commands.prune.request import EXPERT_SCORES, FORMS, HELD, LAYER_SCORES, SCORES, Prune
from zoo.files import near

LM, VLM = "lm:", "vlm:"
BEFORE = (
    "--to", "--data", "--text", "--student", "--out", "--steps", "--resume", "--dry-run", "--score",
    "--samples", "--form", "--shapes", "--part",
)  # fmt: skip
"""Options of the cut, and those that it sets in its training."""


def main(argv: list[str]) -> None:
    """Cut a trained model along its named axes to a smaller one of the same class.

    zoo prune vit_small_patch16_224.augreg_in1k --to ffn=0.5,layers=0.75 --data PHOTOS --out small
    zoo prune llama_folder --to ffn=0.75,heads=0.5,stream=0.75 --data wiki.txt --out smaller
    zoo prune llama_folder --to params=0.5 --data wiki.txt --out half --distill 2000 --batch 64
    zoo prune vlm:runs/vqa --to flops=0.5 --data vqa --out half --distill 500
    zoo prune vit_small_patch16_224/random --shapes

    What comes out loads without zoo: timm.create_model("local-dir:small", pretrained=True), or
    from_pretrained of transformers. The cut proves itself: the child computes what its parent does
    with the cut units at zero.
    """
    argv, words = _split(argv)
    args = parse(Prune, argv, "prune", main.__doc__ or "")
    if args.model.startswith(VLM):
        folder = Path(args.model.removeprefix(VLM))
        if not folder.is_dir():
            raise ValueError(f"There is no folder {folder} with a model.{near(folder)}")
        args = replace(args, model=str(folder))
    args = replace(args, model=args.model.removeprefix(LM))
    if args.resume:
        from zoo.commands.prune.distill import resume_child

        resume_child(args.resume)
        return
    if args.distill < 0:
        raise ValueError(f"--distill is {args.distill}; give the number of steps.")
    if min(args.search.candidates, args.search.tokens, args.search.batch) < 1:
        raise ValueError("--search.candidates, --search.tokens and --search.batch are at least 1.")
    if args.search.steps < 0 or (args.search.steps and not args.distill):
        raise ValueError("--search.steps trains candidates as --distill STEPS says; give it too.")
    if not args.model:
        raise ValueError("Name a model: of timm or zoo, a folder, or a run.")
    for what, given, known in (
        ("score", args.score, SCORES),
        ("score of layers", args.layer_score, LAYER_SCORES),
        ("score of experts", args.expert_score, EXPERT_SCORES),
        ("form", args.form, FORMS),
    ):
        if given not in known:
            raise ValueError(f"There is no {what} {given!r}; there are {', '.join(known)}.")
    for name, least in (("samples", 2 * HELD), ("batch", 1), ("length", 2)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name} is {getattr(args, name)}; it is {least} or more.")
    if not args.shapes and not args.to:
        raise ValueError("Say what stays, for example --to ffn=0.75,layers=0.5; or --shapes.")
    if not args.shapes and not args.out and not args.dry_run:
        raise ValueError("Say where the smaller model goes, --out DIR; or --dry-run.")
    if args.out and args.out.exists() and not args.dry_run:
        raise ValueError(f"{args.out} is there already; choose another --out.")
    from zoo.commands.prune.run import print_shapes, prune_model

    if args.shapes:
        print_shapes(args.model)
    elif config := prune_model(args, words):
        from zoo.commands.prune.distill import distil_child

        distil_child(args.out, config)


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    """Split words: for the cut, with `--distill STEPS` the last, and for the training."""
    places = [i for i, word in enumerate(argv) if word.partition("=")[0] == "--distill"]
    if not places:
        return argv, []
    place = places[0] + ("=" not in argv[places[0]]) + 1
    for word in argv[place:]:
        if word.partition("=")[0] in BEFORE:
            raise ValueError(f"{word} stands before --distill; behind it, options of zoo distill.")
    return argv[:place], argv[place:]
