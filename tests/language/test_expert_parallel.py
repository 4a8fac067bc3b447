"""Experts over gloo processes are experts on one, gradients too."""

from pathlib import Path

import pytest

CASES = Path(__file__).parent / "expert_cases.py"
WHAT = [
    "dropless", "a_rank_whose_experts_get_no_token", "a_rank_without_tokens",
    "dropping_counts_what_it_drops", "room_enough_drops_nothing", "folded_meshes", "refusals",
]  # fmt: skip


@pytest.fixture(scope="module")
def two(on_ranks):
    return on_ranks(CASES, 2)


@pytest.mark.parametrize("what", WHAT)
def test_on_two_ranks_as_on_one(two, what):
    assert two[what] < 1e-12


@pytest.mark.long
def test_on_four_ranks_one_of_which_receives_nothing_as_on_one(on_ranks):
    found = on_ranks(CASES, 4)
    assert sorted(found) == sorted(WHAT)
    assert max(found.values()) < 1e-12, found


@pytest.mark.gpu
def test_on_one_rank_of_nccl_as_without_a_group(on_ranks):
    """What one GPU can tell of NCCL: the exchanges run, forward and back, in float64."""
    found = on_ranks(CASES, 1, "cuda")
    assert max(found.values()) < 1e-12, found
