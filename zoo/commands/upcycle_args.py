"""`zoo upcycle`: what its command line says, read without torch."""

from zoo.commands.parse import parse
from zoo.commands.upcycle_request import Upcycle
from zoo.files import try_writing


def main(argv: list[str]) -> None:
    """Make a mixture of experts of a dense language model, which computes the same at first.

    Examples:
    zoo upcycle lm:llama --experts 8 --groups 1 --top-k 2 --out mixture
    zoo upcycle lm:llama --experts 8 --groups 4 --top-k 8 --dry-run
    zoo upcycle lm:mixture --dense --out llama-again

    Each MLP is cut into --groups shards and each shard copied --experts times; a new router gives
    every token --top-k of them. Llama and Mistral become Mixtral, Qwen3 becomes Qwen3-MoE, and
    each MLP layer of Nemotron-H a layer of experts. What is written is an ordinary folder of
    transformers, read again and held against the dense model before it gets its name; training it
    on is what makes experts differ:

    zoo distill --text wiki.txt --student lm:mixture --losses.kl 0 --losses.ce 1
    """
    args = parse(Upcycle, argv, "upcycle", main.__doc__ or "")
    if args.out is None and not args.dry_run:
        raise ValueError("Say where the model goes, --out DIR; or --dry-run.")
    if args.out and args.out.exists():
        raise ValueError(f"{args.out} is there already; choose another --out.")
    if args.copy and not args.dense:
        raise ValueError("--copy chooses what --dense keeps; give it too, or leave --copy out.")
    if args.out:
        try_writing(args.out)
    from zoo.commands.upcycle import to_dense, to_mixture

    (to_dense if args.dense else to_mixture)(args)
