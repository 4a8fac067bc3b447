"""Heads that turn a backbone's tokens into a teacher's features."""

import pytest
import torch

from zoo.adaptors import Adaptor, Head, head_of, upsampled

KINDS = [
    dict(hidden=12, out_dim=5, kind="v1"),
    dict(hidden=12, out_dim=5, num_inner=2, kind="v1"),
    dict(hidden=12, out_dim=5),
    dict(hidden=12, out_dim=5, num_inner=2, pre_norm=True),
    dict(hidden=12, out_dim=5, num_inner=1, kind="attn"),
]


@pytest.mark.parametrize("sizes", KINDS)
def test_a_head_gives_the_promised_width_and_all_of_it_learns(sizes):
    head = Head(**sizes).build(16)
    head(torch.randn(2, 6, 16)).square().sum().backward()
    assert head(torch.randn(2, 6, 16)).shape == (2, 6, 5)
    # the bias of keys shifts all logits of a query alike, so its gradient is zero, not missing
    assert all(p.grad is not None for p in head.parameters())


@pytest.mark.parametrize("sizes", KINDS)
def test_the_sizes_of_a_head_are_read_from_its_weights(sizes):
    assert Head(**head_of(Head(**sizes).build(16).state_dict())) == Head(**sizes)


def test_the_upsampling_that_shapes_do_not_show_is_taken_from_the_caller():
    sizes = dict(hidden=8, out_dim=3, upsample=2)
    weights = Head(**sizes).build(16).state_dict()
    assert Head(**head_of(weights, upsample=2)) == Head(**sizes)
    assert head_of(weights)["out_dim"] == 12


def test_a_head_without_weights_is_none_and_a_strange_one_is_refused():
    assert head_of({}) is None
    with pytest.raises(ValueError, match="no known head: w"):
        head_of({"w": torch.ones(1)})


def test_a_residual_block_that_gives_zero_is_no_block():
    torch.manual_seed(3)
    deep = Head(hidden=12, out_dim=5, num_inner=1).build(16)
    plain = Head(hidden=12, out_dim=5).build(16)
    plain.load_state_dict({k: v for k, v in deep.state_dict().items() if "blocks" not in k})
    torch.nn.init.zeros_(deep.blocks[0][2].weight)
    torch.nn.init.zeros_(deep.blocks[0][2].bias)
    x = torch.randn(2, 3, 16)
    torch.testing.assert_close(deep(x), plain(x))


def test_upsampling_spreads_the_channels_of_a_token_over_its_block():
    # one token a cell of a 2x3 grid, channels (row, column, channel) of a 2x2 block
    rows, cols, factor = 2, 3, 2
    fine = torch.arange(4.0 * 6 * 2).view(1, 4, 6, 2)
    coarse = fine.view(1, rows, factor, cols, factor, 2).transpose(2, 3).reshape(1, 6, 8)
    assert torch.equal(upsampled(coarse, rows, cols, factor), fine.view(1, 24, 2))
    assert upsampled(coarse, rows, cols, 1) is coarse


def test_the_summary_head_sees_only_the_teachers_own_token():
    adaptor = Adaptor(16, token=2, summary=dict(hidden=8, out_dim=3))
    prefix, patches = torch.randn(2, 4, 16), torch.randn(2, 6, 16)
    summary, features = adaptor(prefix, patches, 2, 3)
    others = prefix.clone()
    others[:, [0, 1, 3]] = 0
    torch.testing.assert_close(adaptor(others, 0 * patches, 2, 3)[0], summary)
    assert features is None


def test_a_teacher_without_a_summary_has_none():
    adaptor = Adaptor(16, token=0, feature=dict(hidden=8, out_dim=3, upsample=2))
    summary, features = adaptor(torch.randn(2, 4, 16), torch.randn(2, 6, 16), 2, 3)
    assert summary is None
    assert features.shape == (2, 24, 3)


def test_wrong_heads_are_refused():
    with pytest.raises(ValueError, match="kind 'v3'; there are v1, v2, attn"):
        Head(hidden=8, out_dim=3, kind="v3")
    with pytest.raises(ValueError, match=r"24 do not split\. Take a head of kind v2"):
        Head(hidden=8, out_dim=3, kind="attn").build(24)
    with pytest.raises(ValueError, match="A summary is one token"):
        Adaptor(16, token=0, summary=dict(hidden=8, out_dim=3, upsample=2))
