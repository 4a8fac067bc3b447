"""A Llava whose images and tokens are spread over gloo processes."""

import random
from itertools import product
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
    """Beside the best of all ways to share few images out: Graham's bound (1969)."""
    draw = random.Random(0)
    few = [[draw.randint(1, 9) for _ in range(draw.randint(1, 6))] for _ in range(30)]
    for costs in [*few, [1] * 6 + [6]]:
        for ranks in (1, 2, 3):
            shares = share_out(costs, ranks)
            assert sorted(i for share in shares for i in share) == list(range(len(costs)))
            assert all(share == sorted(share) for share in shares)
            best = min(
                max(sum(c for c, at in zip(costs, places, strict=True) if at == r) for r in places)
                for places in product(range(ranks), repeat=len(costs))
            )
            worst = max(sum(costs[i] for i in share) for share in shares)
            assert worst <= (4 / 3 - 1 / (3 * ranks)) * best + 1e-9
    assert share_out([], 3) == [[], [], []]
    assert sorted(len(share) for share in share_out([64] * 10, 4)) == [2, 2, 3, 3]
