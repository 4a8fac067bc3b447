"""Read published weights of StripedHyena 2: other names, attention's rows in another order."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.language.bars import bars_for_large
from zoo.language.hyena import HyenaForCausalLM
from zoo.language.hyena_config import HyenaConfig
from zoo.weights import Renames, check_keys, read_state, rename_keys

RENAMES: Renames = (
    (r"^embedding_layer\.", "model.embed_tokens."),
    (r"^norm\.scale$", "model.norm.weight"),
    (r"^blocks\.(\d+)\.pre_norm\.scale$", r"model.layers.\1.operator_norm.weight"),
    (r"^blocks\.(\d+)\.post_norm\.scale$", r"model.layers.\1.mlp_norm.weight"),
    (r"^blocks\.(\d+)\.projections\.", r"model.layers.\1.operator.in_proj."),
    (r"^blocks\.(\d+)\.filter\.short_filter_weight$", r"model.layers.\1.operator.feature_filter"),
    (r"^blocks\.(\d+)\.filter\.h$", r"model.layers.\1.operator.filter"),
    (r"^blocks\.(\d+)\.filter\.D$", r"model.layers.\1.operator.skip"),
    (r"^blocks\.(\d+)\.filter\.", r"model.layers.\1.operator."),
    (r"^blocks\.(\d+)\.out_filter_dense\.", r"model.layers.\1.operator.out_proj."),
    (r"^blocks\.(\d+)\.inner_mha_cls\.Wqkv\.", r"model.layers.\1.operator.qkv."),
    (r"^blocks\.(\d+)\.inner_mha_cls\.", r"model.layers.\1.operator."),
    (r"^blocks\.(\d+)\.mlp\.l1\.", r"model.layers.\1.mlp.gate."),
    (r"^blocks\.(\d+)\.mlp\.l2\.", r"model.layers.\1.mlp.up."),
    (r"^blocks\.(\d+)\.mlp\.l3\.", r"model.layers.\1.mlp.down."),
)
"""Published keys -> ours, first match wins."""
EXTRA = r"(\._extra_state|\.rotary_emb\.inv_freq|^unembed\.weight)$"
"""Records of eight-bit runs, angles that follow from the base, and a copy of the embedding."""


def from_published(state: Mapping[str, Tensor], config: HyenaConfig) -> dict[str, Tensor]:
    """Translate a published state dict into that of `HyenaForCausalLM`.

    Published rows of Wqkv are ordered by head, then by query, key and value; ours the other way
    round. All else is renamed. (MR's filter has its decay in it already.)
    """
    dim: Any = config.head_dim
    out = rename_keys(state, RENAMES, drop=EXTRA)
    for key, value in out.items():
        if key.endswith(".qkv.weight"):
            rows = value.view(-1, 3, dim, value.shape[1])
            out[key] = rows.transpose(0, 1).reshape(value.shape)
    if config.tie_word_embeddings and "model.embed_tokens.weight" in out:
        out["lm_head.weight"] = out["model.embed_tokens.weight"]
    return out


def config_from_published(fields: Mapping[str, Any]) -> HyenaConfig:
    """Translate a published configuration, the dictionary in its YAML file.

    Raises:
        ValueError: a field is missing, or a layer has no operator or several.
    """
    letters = dict(s="hcs", m="hcm", l="hcl", a="attn")
    try:
        found = [
            "".join(key for key, kind in letters.items() if i in fields[f"{kind}_layer_idxs"])
            for i in range(fields["num_layers"])
        ]
        if wrong := [i for i, letter in enumerate(found) if len(letter) != 1]:
            raise ValueError(
                f"Layer {wrong[0]} stands in {len(found[wrong[0]])} of the lists of operators; "
                "each must stand in one."
            )
        stretched = fields.get("use_interpolated_rotary_pos_emb", False)
        return HyenaConfig(
            vocab_size=fields["vocab_size"],
            hidden_size=fields["hidden_size"],
            intermediate_size=fields["inner_mlp_size"],
            pattern="".join(found),
            num_attention_heads=fields["num_attention_heads"],
            se_groups=fields["hcs_filter_groups"],
            mr_groups=fields["hcm_filter_groups"],
            se_length=fields["hcs_filter_length"],
            mr_length=fields["hcm_filter_length"],
            li_order=fields["state_size"],
            feature_length=fields["short_filter_length"],
            norm_eps=fields["eps"],
            rotary_base=float(fields["rotary_emb_base"]),
            rotary_divisor=float(fields["rotary_emb_scaling_factor"]) if stretched else 1.0,
            max_position_embeddings=fields["max_seqlen"],
            tie_word_embeddings=fields.get("tie_embeddings", True),
        )
    except KeyError as error:
        raise ValueError(f"The published configuration has no field {error}.") from None


def convert_published(source: str | Path, config: HyenaConfig, folder: str | Path) -> Path:
    """Read a published file of weights strictly, and write a folder for `from_pretrained`.

    Args:
        config: `config_from_published`, or `HyenaConfig(**SIZES["hyena_7b"])`.

    Returns:
        `folder`.

    Raises:
        ValueError: there is no such file, it is damaged or could run code, or does not fit.
    """
    state = from_published(read_state(source), config)
    with torch.device("meta"):
        model = HyenaForCausalLM(config)
    hint = f"Take the configuration that belongs to {source}."
    check_keys(state, model.state_dict(), hint=hint)
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    with bars_for_large(model):
        model.save_pretrained(folder)
    return Path(folder)
