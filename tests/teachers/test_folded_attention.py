"""SAM's attention without its bias written out."""

import copy

import pytest
import timm
import torch

from zoo.teachers.folded_attention import FoldedAttention, fold_relative_positions


@pytest.fixture(scope="module")
def sam():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = timm.create_model(
            "samvit_base_patch16",
            img_size=128,
            depth=3,
            embed_dim=48,
            num_heads=4,
            global_attn_indexes=(1,),
            window_size=5,
            num_classes=0,
        )
        for name, weight in network.named_parameters():
            if "rel_pos" in name:
                torch.nn.init.normal_(weight, std=0.5)  # fresh ones are zero
    return network.eval().requires_grad_(False)


def test_folded_attention_is_the_same_function(sam):
    folded = copy.deepcopy(sam)
    assert fold_relative_positions(folded) == 3
    x = torch.randn(2, 3, 128, 128)
    # float32, sums in another order; features are of size 1
    torch.testing.assert_close(
        folded.forward_features(x), sam.forward_features(x), rtol=0, atol=2e-5
    )
    without = copy.deepcopy(sam)
    for name, weight in without.named_parameters():
        if "rel_pos" in name:
            weight.zero_()
    assert (without.forward_features(x) - sam.forward_features(x)).abs().max() > 0.1


def test_folding_again_changes_nothing(sam):
    folded = copy.deepcopy(sam)
    fold_relative_positions(folded)
    assert fold_relative_positions(folded) == 0


def test_a_map_of_another_size_is_left_to_the_plain_attention(sam):
    plain = sam.blocks[1].attn
    x = torch.randn(1, 4, 6, 48)
    torch.testing.assert_close(FoldedAttention(plain)(x), plain(x), rtol=0, atol=0)
