"""`zoo prune`: what its command line says, read without torch."""

from zoo.commands.parse import parse
from zoo.commands.prune_request import EXPERT_SCORES, FORMS, SCORES, Prune


def main(argv: list[str]) -> None:
    """Cut a trained model along its named axes to a smaller one of the same class.

    zoo prune vit_small_patch16_224.augreg_in1k --to ffn=0.5,layers=0.75 --data PHOTOS --out small
    zoo prune llama_folder --to ffn=0.75,heads=0.5,stream=0.75 --data wiki.txt --out smaller
    zoo prune vit_small_patch16_224/random --shapes

    What comes out loads without zoo: timm.create_model("local-dir:small", pretrained=True), or
    from_pretrained of transformers. The cut proves itself: the child computes what its parent does
    with the cut units at zero.
    """
    args = parse(Prune, argv, "prune", main.__doc__ or "")
    for what, given, known in (
        ("score", args.score, SCORES),
        ("score of experts", args.expert_score, EXPERT_SCORES),
        ("form", args.form, FORMS),
    ):
        if given not in known:
            raise ValueError(f"There is no {what} {given!r}; there are {', '.join(known)}.")
    if not args.shapes and not args.to:
        raise ValueError("Say what stays, for example --to ffn=0.75,layers=0.5; or --shapes.")
    if not args.shapes and not args.out and not args.dry_run:
        raise ValueError("Say where the smaller model goes, --out DIR; or --dry-run.")
    if args.out and args.out.exists() and not args.dry_run:
        raise ValueError(f"{args.out} is there already; choose another --out.")
    from zoo.commands.prune import print_shapes, prune_model

    if args.shapes:
        print_shapes(args.model)
    else:
        prune_model(args)
