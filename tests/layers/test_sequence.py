"""Tokens over gloo processes are tokens on one, gradients too."""

from pathlib import Path

import pytest
import torch

from zoo.layers import sequence
from zoo.layers.ssd import ssd, ssd_over_ranks

CASES = Path(__file__).parent / "sequence_cases.py"
WHAT = [
    "gathered_tokens_are_the_whole", "attention", "causal_attention_with_grouped_queries",
    "one_head_of_keys_for_all_ranks", "an_operator_of_channels", "a_short_causal_convolution",
    "a_linear_recurrence", "refusals",
]  # fmt: skip


@pytest.fixture(scope="module")
def two(on_ranks):
    return on_ranks(CASES, 2)


@pytest.mark.parametrize("what", WHAT)
def test_on_two_ranks_as_on_one(two, what):
    assert two[what] < 1e-12


@pytest.mark.long
def test_on_four_ranks_one_without_a_token_as_on_one(on_ranks):
    found = on_ranks(CASES, 4)
    assert sorted(found) == sorted(WHAT)
    assert max(found.values()) < 1e-12, found


def test_without_a_group_every_function_is_what_it_is_on_one_process():
    x = torch.randn(2, 5, 3)
    assert sequence.even_lengths(5, None) == (5,)
    assert torch.equal(sequence.split_tokens(x, [5], None), x)
    assert torch.equal(sequence.gather_tokens(x, [5], None), x)
    assert not sequence.tokens_before(x, 2, [5], None).any()
    assert not sequence.states_before(x, x, None).any()
    q = torch.randn(2, 4, 5, 3)
    wanted = torch.nn.functional.scaled_dot_product_attention(q, q, q)
    assert torch.equal(sequence.ulysses_attention(q, q, q, [5], None), wanted)


@pytest.mark.parametrize(("heads", "keys", "ranks", "copies"), [(8, 8, 4, 1), (8, 2, 4, 2)])
def test_keys_are_copied_to_the_ranks_whose_queries_share_them(heads, keys, ranks, copies):
    assert sequence.key_copies(heads, keys, ranks) == copies


@pytest.mark.parametrize(
    ("heads", "keys", "ranks", "near"), [(12, 12, 8, 6), (12, 4, 5, 4), (40, 8, 5, 4)]
)
def test_heads_that_do_not_split_are_refused_with_the_nearest_number(heads, keys, ranks, near):
    with pytest.raises(ValueError, match=f"nearest number of ranks that they do over is {near}"):
        sequence.key_copies(heads, keys, ranks)


@pytest.mark.parametrize("length", [0, 1, 7, 8, 13])
def test_the_scan_in_chunks_is_the_recurrence(length):
    x, delta = torch.randn(2, length, 4, 3).double(), torch.rand(2, length, 4).double()
    A, (B, C) = -torch.rand(4).double(), torch.randn(2, 2, length, 2, 5).double()
    state, outputs, rest = torch.zeros(2, 4, 3, 5).double(), [], torch.ones(2, 4).double()
    heads = [0, 0, 1, 1]  # neighbours share a group
    for t in range(length):
        a = (delta[:, t] * A).exp()
        rest = rest * a
        entry = torch.einsum("bh,bhd,bhs->bhds", delta[:, t], x[:, t], B[:, t, heads])
        state = a[..., None, None] * state + entry
        outputs.append(torch.einsum("bhds,bhs->bhd", state, C[:, t, heads]))
    found = ssd(x, delta, A, B, C, chunk=4)
    torch.testing.assert_close(found.state, state, rtol=0, atol=1e-12)
    torch.testing.assert_close(ssd_over_ranks(x, delta, A, B, C, None), found.out)
    if length:
        torch.testing.assert_close(found.out, torch.stack(outputs, 1), rtol=0, atol=1e-12)
        torch.testing.assert_close(found.decay[:, -1], rest, rtol=0, atol=1e-12)


def test_the_scan_is_that_of_transformers():
    nemotron = pytest.importorskip("transformers.models.nemotron_h.modeling_nemotron_h")
    if not hasattr(nemotron, "mamba2_chunk_scan"):
        pytest.skip("this transformers has its scan inside the mixer")
    x, delta = torch.randn(2, 13, 4, 3), torch.randn(2, 13, 4)
    A, (B, C) = -torch.rand(4), torch.randn(2, 2, 13, 2, 5)
    bias = torch.randn(4)
    theirs = nemotron.mamba2_chunk_scan(
        x, delta, A, B, C, chunk_size=4, D=None, z=None, dt_bias=bias, dt_softplus=True,
        initial_states=None, return_final_states=False, dt_limit=(0.0, float("inf")),
    )  # fmt: skip
    ours = ssd(x, torch.nn.functional.softplus(delta + bias), A, B, C, chunk=4).out
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
