"""Tiny models of transformers over ranks, tokens and experts at once, beside one process.

transformers computes norms and scans in float32 whatever the weights are; here in float64.
"""

import copy

import torch
import torch.distributed as dist
import transformers

from zoo.language.expert_parallel import Drops, expert_parameters, parallel_experts
from zoo.language.hyena import HyenaConfig, HyenaForCausalLM
from zoo.language.moe import moe_layers
from zoo.language.token_parallel import TokenParallel, add_over_ranks
from zoo.language.tokens import Tokens
from zoo.layers.sequence import split_tokens

torch.float32 = torch.float = torch.float64
torch.Tensor.float = torch.Tensor.double
SIZES = dict(
    vocab_size=32, hidden_size=16, num_attention_heads=4, num_key_value_heads=2, head_dim=4,
    num_experts_per_tok=2, experts_implementation="eager",
)  # fmt: skip


def mixtral(**more):
    config = transformers.MixtralConfig(
        **SIZES | more, intermediate_size=8, num_hidden_layers=2, num_local_experts=8
    )
    return transformers.MixtralForCausalLM(config)


def nemotron_h(**more):
    config = transformers.NemotronHConfig(
        **SIZES | more, layers_block_type=["linear_attention", "moe", "full_attention", "moe"],
        intermediate_size=8, moe_intermediate_size=8, moe_shared_expert_intermediate_size=8,
        n_routed_experts=8, mamba_num_heads=4, mamba_head_dim=4, ssm_state_size=4, n_groups=2,
        chunk_size=4,
    )  # fmt: skip
    model = transformers.NemotronHForCausalLM(config)
    for layer in moe_layers(model).values():  # of four ranks the last one receives no token
        layer.router.e_score_correction_bias[-2:] = -10
    return model


def difference(model, group, documents):
    """Compare losses and gradients of all weights, those of experts where they are."""
    model = model.double().eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.3)
        if "log_poles" in name:
            parameter.data = -parameter.abs()
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    ids = torch.randint(32, (2, 13))
    segments = (torch.arange(13) >= 6).long().expand(2, -1) * documents
    tokens = Tokens(ids, segments)
    look = torch.randn(2, 13, 32).double()
    whole = copy.deepcopy(model)
    options = dict(position_ids=tokens.places, use_cache=False)
    last = whole.base_model(input_ids=ids, **options).last_hidden_state
    (last @ whole.lm_head.weight.T * look).sum().backward()

    drops = parallel_experts(model, group) if moe_layers(model) else Drops()
    spread = TokenParallel(model, group)
    lengths = [5, 8] if world == 2 else [6, 3, 1, 3]
    ours, head, _ = spread.read(tokens, lengths)
    (ours @ head.T * split_tokens(look, lengths, group)).sum().backward()
    own = dict(expert_parameters(model))
    shared = [p for name, p in model.named_parameters() if name not in own]
    add_over_ranks(shared, group)
    add_over_ranks(list(own.values()), None)
    gaps = [(ours - split_tokens(last, lengths, group)).flatten()]
    wanted = dict(whole.named_parameters())
    for name, parameter in model.named_parameters():
        right = wanted[name].grad
        right = torch.zeros_like(wanted[name]) if right is None else right
        if name in own:
            right = right.chunk(world)[rank]
        gaps.append((parameter.grad - right).flatten() / max(1, right.abs().max().item()))
    assert drops.dropped == 0 and drops.pairs == len(moe_layers(model)) * 2 * 2 * lengths[rank]
    return torch.cat(gaps).abs().max().item()


def hyena():
    config = HyenaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=8, pattern="smlas", num_attention_heads=4,
        se_groups=4, mr_groups=4, se_length=5, mr_length=9, li_order=3,
    )  # fmt: skip
    return HyenaForCausalLM(config)


def case_striped_hyena(group):
    return difference(hyena(), group, documents=0)


def case_mixtral(group):
    return difference(mixtral(), group, documents=0)


def case_mixtral_with_two_documents_a_row(group):
    return difference(mixtral(), group, documents=1)


def case_nemotron_h_with_experts(group):
    return difference(nemotron_h(), group, documents=0)
