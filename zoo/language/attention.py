"""How attention keeps the documents of a row apart: one choice of several kernels.

transformers makes a mask for each forward pass and hands it to a function that attends; both are
looked up by the name of an implementation. `sdpa` and `flex` are its own. The others are registered
there under a name of ours: their mask is no table of [T T] but where documents begin.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from zoo.kernels.packed_attention import FORMS, FUSED, Form, Pieces, fast_forms, packed_attention
from zoo.language.tokens import Tokens, read_tokens

Choice = Literal["own", "auto", "sdpa", "split", "flex", "varlen", "xformers"]
NONE = "none"
"""What a model has whose layers do not attend, or by functions of their own."""
MASKED = "sdpa"
FLEX = "flex_attention"
WITHOUT = ("softcap", "s_aux", "position_bias")
"""Options of transformers' attention functions that the packed forms do not know."""


def set_attention(
    model: Any,
    choice: Choice,
    name: str,
    *,
    context: Callable[[], AbstractContextManager] = nullcontext,
) -> str:
    """Let a model attend in the form that is chosen, and hold its answers against its own.

    Args:
        choice: `own` leaves the model as it is. `auto` takes the first form that runs here and
            answers alike; on a CPU the model's own. The others are for every device on which they
            run.
        context: In which the model will run: autocast.

    Returns:
        The form: one of `Choice`, or `none`, or the name of the model's own implementation.

    Raises:
        ValueError: the form that was asked for does not run here, or answers otherwise.
    """
    if not attends(model):
        if choice not in ("own", "auto", MASKED):
            raise ValueError(
                f"--attention {choice} does not run with {name} here: it has no attention that "
                "transformers looks up by a name. auto leaves it as it is."
            )
        return NONE
    own = str(model.config._attn_implementation or "eager")
    if choice == "own":
        return own
    if choice == "auto":
        for form in candidates(model, context):
            if not _why_not(model, form, own, context):
                return form
        return own
    if choice != own and (reason := _why_not(model, choice, own, context)):
        raise ValueError(
            f"--attention {choice} does not run with {name} here: {reason} auto takes what does."
        )
    return choice


def attends(model: Any) -> bool:
    """Tell whether a model has attention that transformers looks up by a name."""
    if not any("Attention" in type(module).__name__ for module in model.modules()):
        return False
    can_set = getattr(model, "_can_set_attn_implementation", None)  # StripedHyena 2 has its own
    return can_set() if can_set else True


def candidates(
    model: Any, context: Callable[[], AbstractContextManager] = nullcontext
) -> Sequence[Choice]:
    """Return the forms that `auto` tries, the fastest first."""
    weight = next(model.parameters())
    device, dtype = weight.device, weight.dtype
    with context():
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
    fast = fast_forms(device, dtype)
    return (*fast, "flex", "sdpa") if fast else ()


def _why_not(
    model: Any, choice: Choice, own: str, context: Callable[[], AbstractContextManager]
) -> str:
    """Set the form, or say in a sentence why the model cannot have it and leave it as it was."""
    tokens, dropout = _two_rows(model), getattr(model.config, "attention_dropout", 0.0)
    table = model.get_input_embeddings().weight
    if dropout and choice != MASKED:
        return f"it drops {dropout:g} of its attention, which only sdpa does."
    if choice in FUSED and table.device.type != "cuda":
        return f"it is for CUDA in 16 bits, and the model is on {table.device.type}."
    try:
        with torch.set_grad_enabled(table.requires_grad), context():
            wanted = read_tokens(model, tokens).last.float().detach()
            _implement(model, choice)
            found = read_tokens(model, tokens).last.float()
            if table.requires_grad:  # it will learn: FlexAttention cannot on a CPU
                torch.autograd.grad(found.sum(), table)
        error = ((found - wanted).norm() / wanted.norm()).item()
    except (RuntimeError, ImportError, ValueError, NotImplementedError) as reason:
        model.set_attn_implementation(own)
        return next(iter(str(reason).strip().splitlines()), type(reason).__name__)[:300]
    # two kernels in 16 bits differ by 1e-3 to 1e-2, one that sees another document by 1e-1 and more
    if error < 0.03:
        return ""
    model.set_attn_implementation(own)
    return f"its features differ by {error:.1%} of their size."


def _implement(model: Any, choice: Choice) -> None:
    if choice in FORMS:
        register()
    names = dict[str, str](sdpa=MASKED, flex=FLEX)
    model.set_attn_implementation(names.get(choice) or ours(choice))


def _two_rows(model: Any) -> Tokens:
    """Return rows of three documents, of one and padding, long enough for short windows."""
    device = next(model.parameters()).device
    rows = model.get_input_embeddings().weight.shape[0]
    positions = getattr(model.config, "max_position_embeddings", None) or 160
    length = min(160, positions)
    ids = torch.arange(2 * length, device=device).view(2, -1) * 7 % rows
    at = torch.arange(length, device=device)
    first = (at >= length // 5).long() + (at >= length // 3)
    second = torch.where(at < length * 2 // 3, 0, -1)
    return Tokens(ids, torch.stack([first, second]))


# ---------------------------------------------------------------- what transformers looks up


def ours(form: str) -> str:
    """Return the name of a form among transformers' implementations."""
    return f"zoo_{form}"


def register() -> None:
    """Tell transformers of the packed forms."""
    from transformers import AttentionInterface, AttentionMaskInterface

    for form in FORMS:
        AttentionInterface.register(ours(form), partial(attend, form))
        AttentionMaskInterface.register(ours(form), documents)


def documents(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    mask_function: Callable[..., Tensor] | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    device: torch.device | str = "cpu",
    **options: Any,
) -> Pieces | Tensor | None:
    """Stand in for a mask function of transformers: return where the documents of rows begin.

    They begin where a token does not see the one before it. Decoding and padded prompts
    (`generate`) get the mask of sdpa, which `attend` hands on.

    Raises:
        ValueError: a token sees the one after it.
    """
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    sees: Callable[..., Any] = mask_function or causal_mask_function
    whole = attention_mask is None and q_length == kv_length > 1
    if not whole or any(type(x) is not int or x for x in (q_offset, kv_offset)):
        return sdpa_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, sees, attention_mask, local_size,
            device=device, **options,
        )  # fmt: skip
    rows = torch.arange(batch_size, device=device)[:, None]
    head, later = torch.zeros_like(rows), torch.arange(1, q_length, device=device)[None]
    shape = (batch_size, q_length - 1)
    joined = sees(rows, head, later, later - 1).expand(shape)
    begins = nn.functional.pad(~joined, (1, 0), value=True).flatten()
    ahead = sees(rows, head, later - 1, later).expand(shape).any()
    starts = torch.cat([ahead[None].long(), begins.nonzero()[:, 0]]).tolist()  # one wait for both
    if starts.pop(0):
        raise ValueError("its tokens see later ones, and packed forms are causal.")
    ends = (*starts[1:], batch_size * q_length)
    lengths = tuple(end - start for start, end in zip(starts, ends, strict=True))
    return Pieces(lengths, torch.device(device), causal=True, window=local_size)


def attend(
    form: Form,
    module: nn.Module,
    query: Float[Tensor, "B H T D"],
    key: Float[Tensor, "B K T D"],
    value: Float[Tensor, "B K T D"],
    attention_mask: Pieces | Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Float[Tensor, "B T H D"], None]:
    """Stand in for an attention function of transformers."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if not isinstance(attention_mask, Pieces):
        both = dict(dropout=dropout, scaling=scaling)
        out, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, **both, **options
        )
        return out, None
    if unknown := [name for name in WITHOUT if options.get(name) is not None]:
        raise ValueError(f"its attention has {', '.join(unknown)}, which packed forms do not know.")
    rows = query.shape[0]
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    out = packed_attention(q, k, v, attention_mask, scale=scaling, form=form)
    return out.unflatten(0, (rows, -1)), None
