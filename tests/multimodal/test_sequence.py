"""A Llava whose images and tokens are spread over gloo processes."""

import random
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from zoo.multimodal.sequence import share_out

CASES = Path(__file__).parent / "parallel_cases.py"


@pytest.mark.long
@pytest.mark.parametrize("world", [2, 4])
def test_images_and_tokens_over_ranks_are_one_process(on_ranks, world):
    found = on_ranks(CASES, world)
    assert len(found) == 2
    assert max(found.values()) < 1e-10, found


def test_every_image_goes_to_one_rank_and_the_loads_are_even():
    draw = random.Random(0)
    for _ in range(200):
        costs = [draw.randint(1, 100) for _ in range(draw.randint(0, 40))]
        ranks = draw.randint(1, 8)
        shares = share_out(costs, ranks)
        assert sorted(i for share in shares for i in share) == list(range(len(costs)))
        loads = [sum(costs[i] for i in share) for share in shares]
        # Graham's bound, against a lower bound of the best
        best = max([sum(costs) / ranks, *costs]) if costs else 0
        assert max(loads) <= best * (4 / 3) + max(costs, default=0) * (ranks > 1)
    assert [len(share) for share in share_out([64] * 10, 4)] in ([3, 3, 2, 2],)
