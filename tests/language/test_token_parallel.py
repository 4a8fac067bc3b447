"""Models of transformers whose tokens and experts are spread over gloo processes."""

from pathlib import Path

import pytest

transformers = pytest.importorskip("transformers")

from zoo.language.token_parallel import TokenParallel  # noqa: E402

CASES = Path(__file__).parent / "token_cases.py"


@pytest.mark.long
@pytest.mark.parametrize("world", [2, 4])
def test_tokens_and_experts_over_ranks_are_one_process(on_ranks, world):
    found = on_ranks(CASES, world)
    assert len(found) == 4
    assert max(found.values()) < 1e-12, found


@pytest.mark.parametrize(
    ("kind", "more", "words"),
    [("GPT2", {}, "Rows of a gpt2"), ("Mixtral", dict(sliding_window=4), "a window of 4")],
)
def test_models_that_would_miss_tokens_are_refused(kind, more, words):
    sizes = dict(vocab_size=8, hidden_size=8, num_attention_heads=2, num_hidden_layers=1)
    config = getattr(transformers, f"{kind}Config")(**sizes, **more)
    with pytest.raises(ValueError, match=words):
        TokenParallel(getattr(transformers, f"{kind}Model")(config), None)
