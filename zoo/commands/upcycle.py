"""`zoo upcycle`: a dense language model to a mixture of experts, or back; written and proven."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from zoo.commands.distill.plan import size_text
from zoo.commands.prune.write import copy_tokenizer
from zoo.commands.upcycle_request import Upcycle
from zoo.files import folder_written_whole
from zoo.language.bars import bars_for_large
from zoo.language.open import open_language_model, own_tokenizer
from zoo.language.tokenizers import BYTES
from zoo.language.upcycle import (
    State,
    dense_config,
    dense_state,
    mixture_config,
    mixture_state,
    scale_is_exact,
    upcycling_of,
)

TOLERANCE = 1e-4
"""Relative difference of logits, in float32, above which an exact upcycling is refused."""
ROUNDED = 0.02
"""The same where a scale that is no power of two was rounded to half precision."""


def to_mixture(args: Upcycle) -> None:
    """Upcycle a dense model, print what became of it, and write it.

    Raises:
        ValueError: the model cannot be upcycled so, or what was written computes something else.
    """
    dense = opened(args)
    how = args.how
    config = mixture_config(dense.config, how)
    print_models(dense, config, active=how.top_k / how.num_experts)
    if args.dry_run or args.out is None:
        return
    exact = how.router == "topk-softmax" and how.scale == "down"
    half = dense.dtype in (torch.float16, torch.bfloat16)
    rounded = half and not scale_is_exact(dense.config.model_type, how)

    def check(error: float) -> None:
        limit = ROUNDED if rounded else TOLERANCE
        if exact and not error < limit:
            raise ValueError(
                f"The mixture's logits differ from the dense model's by {error:.1e}, more than "
                f"{limit:g}: nothing was written. This is an error of zoo upcycle."
            )
        print(f"proof  logits on random tokens differ by {error:.1e} from the dense model's")

    state = mixture_state(dense.state_dict(), dense.config, how, args.seed)
    write(args, dense, config, state, check)


def to_dense(args: Upcycle) -> None:
    """Write the dense model inside a mixture.

    Raises:
        ValueError: the model was not made by `zoo upcycle`.
    """
    mixture = opened(args)
    kind, how = upcycling_of(mixture.config)
    config = dense_config(mixture.config)
    print_models(mixture, config, active=1.0)
    if args.dry_run or args.out is None:
        return

    def check(error: float) -> None:
        bits = "to the bit" if scale_is_exact(kind, how) else "to rounding"
        print(f"proof  logits on random tokens differ by {error:.1e} from the mixture's")
        print(f"       a mixture that was not trained gives its dense model {bits}")

    state = dense_state(mixture.state_dict(), mixture.config, args.copy)
    write(args, mixture, config, state, check)


def opened(args: Upcycle) -> Any:
    """Open the model in its own precision; without its weights for a plan."""
    return open_language_model(args.model, device="meta" if args.dry_run else "cpu", dtype=None)


def built(config: Any) -> Any:
    """Build a causal language model without weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def print_models(source: Any, config: Any, *, active: float) -> None:
    """Print what is made of what: classes, parameters, bytes.

    Args:
        active: Share of the experts that a token meets.
    """
    target = built(config)
    experts = sum(p.numel() for n, p in target.named_parameters() if ".experts." in n)
    for model, packed in ((source, 0), (target, experts)):
        total = sum(p.numel() for p in model.parameters())
        met = f", {(total - packed * (1 - active)) / 1e6:,.2f} M of them for a token" * bool(packed)
        size = size_text(total * source.dtype.itemsize)
        print(f"{type(model).__name__}: {total / 1e6:,.2f} M parameters{met}; {size}")


def write(
    args: Upcycle, source: Any, config: Any, state: State, check: Callable[[float], None]
) -> None:
    """Write a model, read it again, and give it its name when it stands the check.

    Args:
        check: Takes the relative difference of its logits from the source's, and raises if it is
            too large.
    """
    from transformers import AutoModelForCausalLM

    assert args.out is not None
    with folder_written_whole(args.out) as making:
        model = built(config)
        model.load_state_dict(state, strict=True, assign=True)
        model.tie_weights()
        model.generation_config = source.generation_config
        with bars_for_large(model):
            model.save_pretrained(making)
        copy_tokenizer(tokenizer_folder(args.model), making)
        del model, state
        with bars_for_large(making):
            again = AutoModelForCausalLM.from_pretrained(making, dtype=torch.float32).eval()
        check(difference(source.float(), again))
    print(f"model  {args.out}")


def tokenizer_folder(name: str) -> Path | None:
    """Return the folder whose tokenizer goes along, if there is one."""
    found = own_tokenizer(name)
    return None if found == BYTES else Path(found)


@torch.no_grad()
def difference(ours: Any, theirs: Any) -> float:
    """Return the largest difference of two models' logits over the largest logit."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(ours.config.vocab_size, (2, 32), generator=generator)
    mine, other = (m(input_ids=ids, use_cache=False).logits.double() for m in (ours, theirs))
    return ((mine - other).abs().max() / mine.abs().max()).item()
