import pytest
import torch
from torch import Tensor

from zoo.features import Batch, Features
from zoo.train.distill.config import Distill, SummaryLoss, TeacherSpec
from zoo.train.distill.fold import with_probabilities
from zoo.train.distill.losses import (
    bce,
    constant_guess,
    cross_entropy,
    refuse_no_probabilities,
    summary_distance,
)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def test_bce_and_cross_entropy_are_what_their_formulas_say():
    x, y = drawn(5, 7), drawn(5, 7, seed=1).sigmoid()
    p = 1 / (1 + torch.exp(-x))
    by_hand = -(y * p.log() + (1 - y) * (1 - p).log()).sum() / 35
    torch.testing.assert_close(bce(x, y), by_hand, rtol=1e-12, atol=0)
    soft = y / y.sum(-1, keepdim=True)
    q = x.exp() / x.exp().sum(-1, keepdim=True)
    torch.testing.assert_close(
        cross_entropy(x, soft), -(soft * q.log()).sum() / 5, rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("kind", ["bce", "cross_entropy", "cosine"])
def test_no_constant_answer_loses_less_than_the_baseline(kind: SummaryLoss):
    y = drawn(64, 6, seed=2).sigmoid()
    y = y / y.sum(-1, keepdim=True) if kind == "cross_entropy" else y
    baseline = constant_guess(kind, y)
    distance = summary_distance(kind)
    for seed in range(20):
        guess = drawn(6, seed=seed).expand_as(y)
        assert distance(guess, y) >= baseline - 1e-12
    learned = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([learned], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = distance((learned + 0.1).expand_as(y), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(closure().detach(), baseline, rtol=1e-6, atol=1e-9)


def test_summaries_that_are_no_probabilities_are_refused():
    refuse_no_probabilities("cosine", drawn(4, 3), "a")
    with pytest.raises(ValueError, match="a has loss=bce, which is for probabilities"):
        refuse_no_probabilities("bce", drawn(4, 3), "a")
    with pytest.raises(ValueError, match="add up to 1, and its add up to"):
        refuse_no_probabilities("cross_entropy", drawn(4, 3).sigmoid(), "a")


def test_a_teachers_loss_is_read_written_and_checked():
    text = "rule:plan-ttc@64,summary=2,spatial=0,loss=bce"
    spec = TeacherSpec.parse(text)
    assert spec.loss == "bce" and TeacherSpec.parse(spec.describe()) == spec
    config = Distill(teachers=(spec, TeacherSpec(name="rule:colour")))
    assert config.summary_losses == {"plan-ttc": "bce", "colour": "cosine"}
    with pytest.raises(ValueError, match="loss=bcee; the losses of a summary are run, cosine"):
        TeacherSpec.parse("rule:colour,loss=bcee")
    with pytest.raises(ValueError, match="summary=0 leaves that out"):
        TeacherSpec.parse("rule:colour,summary=0,loss=bce")


def test_logits_are_compared_as_probabilities():
    logits = drawn(2, 3)

    def student(batch: Batch) -> dict[str, Features]:
        return {name: Features(logits, None) for name in "abc"}

    losses: dict[str, SummaryLoss] = dict(a="bce", b="cross_entropy", c="cosine")
    shown = with_probabilities(student, losses)
    found = {name: f.summary for name, f in shown(Batch(torch.zeros(2, 3, 8, 8))).items()}
    torch.testing.assert_close(found["a"], logits.sigmoid())
    torch.testing.assert_close(found["b"], logits.softmax(-1))
    assert found["c"] is logits
