"""RADIO's published weights: their keys, what their arguments mean, and the way back."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from zoo.adaptors import Adaptor, head_of
from zoo.layers.patch_position import regridded_positions
from zoo.layers.spectral import baked
from zoo.weights import rename_keys

_VIT = r"^(?:radio_model\.)?(?:base_model\.|model\.)?(?:inner\.)?"
_TOP = r"^(?:radio_model\.)?_?"

RENAMES = (
    (_VIT + r"patch_generator\.embedder\.", r"patch_embed.proj."),
    (_VIT + r"patch_generator\.pos_embed$", r"pos_embed"),
    (_VIT + r"patch_generator\.cls_token\.token$", r"prefix_tokens"),
    (_VIT + r"blocks\.(\d+)\.(ls[12])\.grandma$", r"blocks.\1.\2.gamma"),
    (_VIT + r"blocks\.(\d+)\.mlp\.w12\.", r"blocks.\1.mlp.fc1."),
    (_VIT + r"blocks\.(\d+)\.mlp\.w3\.", r"blocks.\1.mlp.fc2."),
    (_VIT + r"blocks\.", r"blocks."),
    (_TOP + r"summary_idxs$", r"summary_idxs"),
    (_TOP + r"input_conditioner\.", r"input_conditioner."),
    (_TOP + r"feature_normalizer\.", r"feature_normalizer."),
    (
        _TOP + r"inter(?:mediate)?_feature_normalizer\.rotations?$",
        r"intermediate_normalizer.rotation",
    ),
    (_TOP + r"inter(?:mediate)?_feature_normalizer\.", r"intermediate_normalizer."),
    (r"^_heads\.([^.]+)\.", r"adaptors.\1.head_mlp."),
    (r"^_feature_projections\.([^.]+)\.", r"adaptors.\1.feat_mlp."),
    (r"^radio_model\.adaptors\.", r"adaptors."),
)
"""Theirs -> ours, in all four layouts: the wrapper's own, torch.hub's (`base_model.`, `_heads.`),
the hub's safetensors (`radio_model.`), and DINOv2's blocks (`inner.`, `w12`)."""

PUBLISHED = (
    (r"^patch_embed\.proj\.", r"model.patch_generator.embedder."),
    (r"^pos_embed$", r"model.patch_generator.pos_embed"),
    (r"^prefix_tokens$", r"model.patch_generator.cls_token.token"),
    (r"^blocks\.(\d+)\.(ls[12])\.gamma$", r"model.blocks.\1.\2.grandma"),
    (r"^blocks\.", r"model.blocks."),
    (r"^intermediate_normalizer\.", r"inter_feature_normalizer."),
)
"""Ours -> the wrapper's own."""

CONSTANT = r"^(summary_idxs$|input_conditioner\.)"
"""Keys of constants, which a file may lack or hold for other channels."""


def is_published(state: Mapping[str, Tensor]) -> bool:
    """Tell whether a state dict has the keys of a published file, in any of its layouts."""
    return any("patch_generator." in key for key in state)


def _ours(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the keys, and reshape the tensors to timm's shapes."""
    ours = rename_keys(state, RENAMES) if is_published(state) else dict(state)
    tokens = ours.pop("prefix_tokens", None)
    if tokens is not None:
        ours["cls_token"] = tokens[None, :1]
        if len(tokens) > 1:
            ours["reg_token"] = tokens[None, 1:]
    patches = ours.get("patch_embed.proj.weight")
    if patches is not None and patches.ndim == 2:
        ours["patch_embed.proj.weight"] = _as_kernel(patches)
    bias = ours.get("patch_embed.proj.bias")
    if bias is not None and not is_published(state) and not bias.any():
        del ours["patch_embed.proj.bias"]  # timm's own RADIO files carry zeros there
    return ours


def _as_kernel(weight: Tensor, in_chans: int = 3) -> Tensor:
    """Turn rows of flattened patches (channel, row, column) into a convolution's weight."""
    side = math.isqrt(weight.shape[1] // in_chans)
    return weight.view(len(weight), in_chans, side, side)


def translated(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Turn the weights of a file, published or ours, into a state dict of `model`.

    Spectral reparametrisation is baked in unless `model` has it; a grid of positions of another
    size is resampled; adaptors that `model` does not have are left out; constants that the file
    lacks are the model's own.
    """
    own = model.state_dict()
    ours = _ours(state)
    if not any(".parametrizations." in key for key in own):
        ours = baked(ours)
    if "pos_embed" in ours and "pos_embed" in own:
        ours["pos_embed"] = regridded_positions(ours["pos_embed"], own["pos_embed"].shape[1])
    parts = cast(dict[str, Adaptor], model.adaptors)
    ours = _heads_of(ours, {part.source or name: name for name, part in parts.items()})
    for key, value in own.items():
        if re.search(CONSTANT, key) and (key not in ours or _foreign(key, ours[key], value)):
            ours[key] = value
    return {k: v for k, v in ours.items() if k in own or not re.search(CONSTANT, k)}


def _foreign(key: str, theirs: Tensor, own: Tensor) -> bool:
    """Whether a constant is for other channels than the model's; summaries may be of any number."""
    return key != "summary_idxs" and theirs.shape != own.shape


def _heads_of(ours: dict[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Keep the heads of the adaptors in `names` (the file's -> the model's), and all other keys."""
    kept = {}
    for key, value in ours.items():
        top, _, rest = key.partition(".")
        theirs, _, leaf = rest.partition(".")
        if top != "adaptors":
            kept[key] = value
        elif theirs in names or theirs in names.values():
            kept[f"adaptors.{names.get(theirs, theirs)}.{leaf}"] = value
    return kept


def published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict of ours with the keys and shapes of RADIO's own wrapper."""
    theirs = dict(state)
    tokens = [theirs.pop(key)[0] for key in ("cls_token", "reg_token") if key in theirs]
    theirs["prefix_tokens"] = torch.cat(tokens)
    theirs["patch_embed.proj.weight"] = theirs["patch_embed.proj.weight"].flatten(1)
    return rename_keys(theirs, PUBLISHED)


def teacher_tokens(
    teachers: Sequence[Mapping[str, Any]], per_teacher: bool = True
) -> dict[str, int]:
    """Return the prefix token of each teacher: its `token_slot`, or its position in the list.

    Args:
        teachers: Dicts with a `name`; several with one name are one teacher.
        per_teacher: If false, all share the first token.
    """
    tokens: dict[str, int] = {}
    for teacher in teachers:
        slot = teacher.get("token_slot")
        tokens.setdefault(teacher["name"], len(tokens) if slot is None else slot)
    return tokens if per_teacher else dict.fromkeys(tokens, 0)


def prefix_layout(
    teachers: Sequence[Mapping[str, Any]],
    *,
    per_teacher: bool = True,
    register_multiple: int | None = None,
    num_registers: int = 0,
) -> dict[str, Any]:
    """Count the tokens before the patches; return the arguments of `Radio` for them.

    Args:
        teachers: As for `teacher_tokens`; each has a summary unless `use_summary` is false.
        register_multiple: Add registers up to a multiple of this. A count that is a multiple
            already gets `register_multiple` more, as in the published models.
        num_registers: Number of registers, without `register_multiple`.
    """
    tokens = teacher_tokens(teachers, per_teacher)
    count = max([1, *(token + 1 for token in tokens.values())])
    count = max(count, len(tokens)) if per_teacher else 1
    if register_multiple:
        num_registers = register_multiple - count % register_multiple
    used = [tokens[t["name"]] for t in teachers if t.get("use_summary", True)]
    return dict(reg_tokens=count - 1 + num_registers, summary_idxs=list(dict.fromkeys(used)))


def architecture(
    state: Mapping[str, Tensor],
    args: Mapping[str, Any],
    adaptors: Mapping[str, Any] | Sequence[str] | None = None,
) -> dict[str, Any]:
    """Read from a file what its release adds to the plain form of a size.

    Args:
        args: Arguments of the training run, if the file keeps them: they name the teachers.
        adaptors: Names of the teachers whose heads to load, or all sizes of the heads.

    Returns:
        Arguments of `Radio`; {} if the file is not of this family.
    """
    ours = _ours(state)
    patches, grid = ours.get("patch_embed.proj.weight"), ours.get("pos_embed")
    if patches is None or grid is None or "cls_token" not in ours:
        return {}
    registers = ours.get("reg_token")
    rotation = ours.get("intermediate_normalizer.rotation")
    found: dict[str, Any] = dict(
        reg_tokens=0 if registers is None else registers.shape[1],
        max_img_size=math.isqrt(grid.shape[1]) * patches.shape[-1],
        patch_bias="patch_embed.proj.bias" in ours,
        init_values=1e-5 if "blocks.0.ls1.gamma" in ours else None,
        feature_normalizer="feature_normalizer.tx" in ours,
    )
    if rotation is not None:
        found["intermediate_normalizer"] = "common" if rotation.ndim == 2 else "per_layer"
    found |= _mlp_ratio(baked({k: v for k, v in ours.items() if k.startswith("blocks.0.mlp.")}))
    teachers = args.get("teachers") or []
    per_teacher = bool(args.get("cls_token_per_teacher", True))
    if "summary_idxs" in ours:
        found["summary_idxs"] = ours["summary_idxs"].tolist()
    elif teachers:
        found["summary_idxs"] = prefix_layout(teachers, per_teacher=per_teacher)["summary_idxs"]
    if isinstance(adaptors, Mapping):
        found["adaptors"] = adaptors
    elif adaptors:
        tokens = teacher_tokens(teachers, per_teacher)
        found["adaptors"] = {name: _adaptor(name, ours, teachers, tokens) for name in adaptors}
    return found


def _mlp_ratio(mlp: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the ratio of a plain MLP; nothing for a gated one, whose first layer is doubled."""
    hidden, dim = mlp["blocks.0.mlp.fc1.weight"].shape
    if mlp["blocks.0.mlp.fc2.weight"].shape[1] != hidden:
        return {}
    ratio = hidden / dim
    return dict(mlp_ratio=ratio if int(dim * ratio) == hidden else (hidden + 0.5) / dim)


def _adaptor(
    name: str,
    ours: Mapping[str, Tensor],
    teachers: Sequence[Mapping[str, Any]],
    tokens: Mapping[str, int],
) -> dict[str, Any]:
    """Return the sizes of a teacher's heads; files name them by the teacher's name or number."""
    if name not in tokens:
        raise ValueError(
            f"The file names the teachers {list(tokens)}, not {name!r}. A file that names none "
            "needs the sizes of the heads: adaptors={name: dict(token=..., summary=..., ...)}."
        )
    mine = {str(i): teacher for i, teacher in enumerate(teachers) if teacher["name"] == name}
    sources = [s for s in (name, *mine) if any(k.startswith(f"adaptors.{s}.") for k in ours)]
    if not sources:
        raise ValueError(f"The file has no heads of the teacher {name!r}.")
    teacher = mine.get(sources[0]) or next(iter(mine.values()))
    upsample = teacher.get("fd_upsample_factor") or teacher.get("upsample_factor") or 1
    root = f"adaptors.{sources[0]}."
    head, feat = (
        {k.removeprefix(root + part): v for k, v in ours.items() if k.startswith(root + part)}
        for part in ("head_mlp.", "feat_mlp.")
    )
    return dict(
        token=tokens[name],
        source=sources[0],
        summary=head_of(head),
        feature=head_of(feat, upsample),
    )
