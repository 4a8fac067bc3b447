"""Teachers of tokens that are cut over ranks: which can be, and what each block holds."""

import pytest
import torch

from zoo.train.distill.elastic_config import Elastic
from zoo.train.distill.token_config import DistillText
from zoo.train.distill.token_placement import block_bytes, check_tower


def llama(vocab_size: int):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=vocab_size, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2,
    )  # fmt: skip
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(config)


def test_the_blocks_of_a_llama_are_cut_unless_they_are_the_smaller_part():
    model = llama(40)
    check_tower("lm:x", model)
    layers = model.model.layers
    assert block_bytes(model) == [sum(p.nbytes for p in layer.parameters()) for layer in layers]
    with pytest.raises(ValueError, match=r"lm:x has repeated blocks that hold \d+% of its weights"):
        check_tower("lm:x", llama(4000))


def test_blocks_that_share_weights_or_hold_whole_numbers_are_refused():
    model = llama(40)
    model.model.layers[1].mlp = model.model.layers[0].mlp
    with pytest.raises(ValueError, match="share weights"):
        check_tower("lm:x", model)
    model = llama(40)
    whole = torch.empty(4, dtype=torch.int8, device="meta")
    for layer in model.model.layers:
        layer.codes = torch.nn.Parameter(whole.clone(), requires_grad=False)
    with pytest.raises(ValueError, match="hold quantised weights"):
        check_tower("lm:x", model)


def test_what_spreads_or_trains_otherwise_refuses_a_cut_teacher():
    cut = dict(teachers=("lm:x,place=shard",))
    with pytest.raises(ValueError, match="--sequence 2 spreads teachers too, and lm:x"):
        DistillText(**cut, sequence=2)
    with pytest.raises(ValueError, match="place=shard, which is for zoo distill"):
        Elastic(**cut)
