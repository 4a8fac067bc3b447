"""The hybrid: transformers' Nemotron-H over bytes."""

from typing import Any

from torch import nn

from zoo.experiments.compression.config import HybridShape

KINDS = {"M": "mamba", "*": "attention", "-": "mlp"}


def build_hybrid(shape: HybridShape) -> Any:
    """Build a `NemotronHForCausalLM` over the 256 bytes, with random weights."""
    from transformers import NemotronHConfig, NemotronHForCausalLM

    queries, keys, head_dim = shape.attention
    config = NemotronHConfig(
        vocab_size=256,
        hidden_size=shape.dim,
        layers_block_type=[KINDS[letter] for letter in shape.pattern],
        mamba_num_heads=shape.heads,
        mamba_head_dim=shape.channels,
        n_groups=shape.groups,
        ssm_state_size=shape.state,
        intermediate_size=shape.ffn,
        num_attention_heads=queries,
        num_key_value_heads=keys,
        head_dim=head_dim,
        use_cache=False,
    )
    return NemotronHForCausalLM(config)


def mamba_mixers(model: nn.Module) -> dict[str, Any]:
    """Return the Mamba-2 mixers of a model by name."""
    return {
        name: m for name, m in model.named_modules() if type(m).__name__.endswith("Mamba2Mixer")
    }
