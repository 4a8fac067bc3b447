"""Images of several sizes in one batch of a vision transformer, each attending to itself alone.

Resizing or padding to one shape changes an image or wastes tokens. Here the tokens of all images
stand in one row (NaViT, 2307.06304, section 2.1), so norms and linear layers see one long batch,
and attention keeps the images apart by the forms of `zoo.kernels.packed_attention`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn

from zoo.kernels.packed_attention import Form, Pieces, fast_forms, packed_attention


def packed_features(
    model: VisionTransformer, images: Sequence[Float[Tensor, "3 _ _"]], *, form: Form | None = None
) -> list[Float[Tensor, "_ C"]]:
    """Return what `forward_features` returns for each image alone: prefix and patch tokens.

    Args:
        model: A ViT of timm that takes any size (`dynamic_img_size=True`), or a RADIO.
        images: Each of a size that the model takes.
        form: Of attention; by default the fastest that is there for the model's precision.

    Raises:
        ValueError: the model has other blocks than timm's plain one, works in windows, takes one
            size only, or trains with random depth, which drops whole rows.
    """
    check_model(model)
    tokens = [_embedded(model, image[None])[0] for image in images]
    lengths = tuple(len(x) for x in tokens)
    row = torch.cat(tokens)[None]
    dtype = row.dtype
    if torch.is_autocast_enabled(row.device.type):
        dtype = torch.get_autocast_dtype(row.device.type)
    chosen: Form = form or (*fast_forms(row.device, dtype), "split")[0]
    pieces = Pieces(lengths, row.device)
    for block in model.blocks:
        row = _block(block, row, pieces, chosen)
    finish = getattr(model, "_finished", None)  # of a RADIO: its normaliser too, image by image
    if finish is None:
        return list(model.norm(row)[0].split(lengths))
    return [finish(x[None], len(model.blocks) - 1)[0] for x in row[0].split(lengths)]


def check_model(model: Any) -> None:
    """Refuse a model whose tokens cannot stand in one row.

    Raises:
        ValueError: the reason, as `packed_features` names them.
    """
    what = type(model).__name__
    if not isinstance(model, VisionTransformer):
        raise ValueError(
            f"Images of several sizes need a ViT of timm or a RADIO; this is of the class {what}."
        )
    kinds = {type(b).__name__ for b in model.blocks if type(b) is not Block}
    kinds |= {type(b.attn).__name__ for b in model.blocks if type(b) is Block and _differs(b.attn)}
    if kinds:
        raise ValueError(f"The blocks of this {what} are not timm's plain ones: {sorted(kinds)}.")
    if getattr(model, "vitdet", None):
        raise ValueError("This RADIO attends in windows; build it without vitdet.")
    if not (model.dynamic_img_size or hasattr(model, "_finished")):
        raise ValueError(f"This {what} takes one size; build it with dynamic_img_size=True.")
    if any(getattr(module, "drop_prob", 0) and module.training for module in model.modules()):
        raise ValueError("Random depth drops whole rows; give drop_path_rate=0, or model.eval().")


def _differs(attention: nn.Module) -> bool:
    return type(attention) is not Attention or bool(attention.attn_drop.p and attention.training)


def _embedded(model: VisionTransformer, x: Float[Tensor, "1 3 _ _"]) -> Float[Tensor, "1 T C"]:
    condition = getattr(model, "input_conditioner", None)
    x = model.patch_embed(x if condition is None else condition(x))
    return model.norm_pre(model.patch_drop(model._pos_embed(x)))


def _block(
    block: Any, x: Float[Tensor, "1 T C"], pieces: Pieces, form: Form
) -> Float[Tensor, "1 T C"]:
    """Run timm's block; its attention is the only part that mixes tokens."""
    x = x + block.ls1(_attend(block.attn, block.norm1(x), pieces, form))
    return x + block.ls2(block.mlp(block.norm2(x)))


def _attend(
    layer: Attention, x: Float[Tensor, "1 T C"], pieces: Pieces, form: Form
) -> Float[Tensor, "1 T C"]:
    q, k, v = layer.qkv(x)[0].unflatten(-1, (3, layer.num_heads, -1)).unbind(1)
    q, k = layer.q_norm(q), layer.k_norm(k)
    out = packed_attention(q, k, v, pieces, scale=layer.scale, form=form).flatten(1)[None]
    out = layer.norm(out)
    if (gate := getattr(layer, "gate", None)) is not None:
        out = out * gate(x).sigmoid()
    return layer.proj_drop(layer.proj(out))
