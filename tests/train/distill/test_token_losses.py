"""Losses over a vocabulary, against autograd through the whole logits."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.train.distill.token_losses import cross_entropy, kl

N, V, D, C = 13, 29, 7, 5


def sides(dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    shapes = ((N, D), (V, D), (N, C), (V, C))
    ours, head, theirs, their_head = (torch.randn(s, dtype=dtype) for s in shapes)
    counted = torch.arange(N) % 3 != 1
    return ours.requires_grad_(), head.requires_grad_(), theirs, their_head, counted


def divergence(kind: str, z: Tensor, t: Tensor) -> Tensor:
    """Return each row's divergence by torch's own `kl_div`."""

    def of(target: Tensor, guess: Tensor) -> Tensor:
        return F.kl_div(guess.log(), target.log(), reduction="none", log_target=True).sum(-1)

    p, q = z.softmax(-1), t.softmax(-1)
    if kind == "jsd":
        return (of(q, (p + q) / 2) + of(p, (p + q) / 2)) / 2
    return of(q, p) if kind == "forward" else of(p, q)


def gradients(value: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value, leaves, retain_graph=True)


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_a_divergence_and_its_gradients_are_those_of_autograd_through_all_logits(kind, tau):
    ours, head, theirs, their_head, counted = sides()
    each = divergence(kind, ours @ head.T / tau, theirs @ their_head.T / tau)
    whole = tau**2 * each[counted].sum() / 5
    for chunk in (1, 2, 100):
        value = kl(ours, head, theirs, their_head, counted, tau=tau, kind=kind, chunk=chunk) / 5
        torch.testing.assert_close(value, whole, atol=1e-13, rtol=1e-13)
        for mine, expected in zip(
            gradients(value, ours, head), gradients(whole, ours, head), strict=True
        ):
            torch.testing.assert_close(mine, expected, atol=1e-13, rtol=1e-12)


def test_a_student_that_is_its_teacher_has_no_loss_and_no_gradient():
    ours, head, _, _, counted = sides()
    for kind in ("forward", "reverse", "jsd"):
        value = kl(ours, head, ours.detach(), head.detach(), counted, kind=kind)
        for found in (value, *gradients(value, ours, head)):
            assert found.abs().max() < 1e-14


def test_the_cross_entropy_is_that_of_torch():
    ours, head, _, _, counted = sides()
    ids = torch.randint(V, (N,))
    whole = F.cross_entropy((ours @ head.T)[counted], ids[counted], reduction="sum")
    value = cross_entropy(ours, head, ids, counted, chunk=4)
    torch.testing.assert_close(value, whole)
    for mine, expected in zip(
        gradients(value, ours, head), gradients(whole, ours, head), strict=True
    ):
        torch.testing.assert_close(mine, expected)


def test_the_rest_in_one_bucket_bounds_the_divergence_from_below():
    ours, head, theirs, their_head, counted = sides()
    whole = kl(ours, head, theirs, their_head, counted, tau=2.0)
    found = [kl(ours, head, theirs, their_head, counted, tau=2.0, chunk=3, top_k=k)
             for k in (1, 4, 12, V)]  # fmt: skip
    assert all(value <= whole + 1e-12 for value in found)
    assert found == sorted(found) and found[0] < found[1]
    torch.testing.assert_close(found[-1], whole)
    more = kl(ours, head, theirs, their_head, counted, tau=2.0, top_k=9 * V)
    torch.testing.assert_close(more, whole)


@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_the_gradient_of_the_bucket_is_that_of_autograd(tau):
    ours, head, theirs, their_head, counted = sides()
    log_p, kept = (theirs @ their_head.T / tau).log_softmax(-1).topk(4)
    p, guessed = log_p.exp(), (ours @ head.T / tau).softmax(-1).gather(1, kept)
    rest, rest_s = 1 - p.sum(-1), 1 - guessed.sum(-1)
    each = (p * (log_p - guessed.log())).sum(-1) + rest * (rest / rest_s).log()
    value = kl(ours, head, theirs, their_head, counted, tau=tau, chunk=3, top_k=4)
    torch.testing.assert_close(value, tau**2 * each[counted].sum())
    for mine, expected in zip(
        gradients(value, ours, head),
        gradients(tau**2 * each[counted].sum(), ours, head),
        strict=True,
    ):
        torch.testing.assert_close(mine, expected)


def test_the_bucket_is_for_the_forward_divergence():
    ours, head, theirs, their_head, counted = sides()
    with pytest.raises(ValueError, match="top_k is 4, for the forward divergence; kind is jsd"):
        kl(ours, head, theirs, their_head, counted, kind="jsd", top_k=4)


def test_a_frozen_head_gets_no_gradient_and_hidden_states_in_bf16_keep_theirs():
    ours, head, theirs, their_head, counted = sides(torch.float32)
    exact = gradients(kl(ours, head, theirs, their_head, counted), ours)[0]
    short = ours.detach().bfloat16().requires_grad_()
    value = kl(short, head.detach(), theirs.bfloat16(), their_head, counted)
    assert value.dtype == torch.float32
    mine = gradients(value, short)[0]
    assert mine.dtype == torch.bfloat16
    assert F.cosine_similarity(mine.float().flatten(), exact.flatten(), dim=0) > 0.999


def test_a_second_backward_pass_is_refused_rather_than_scaled_twice():
    ours, head, theirs, their_head, counted = sides()
    value = kl(ours, head, theirs, their_head, counted)
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_two_vocabularies_are_refused_with_their_sizes():
    ours, head, theirs, their_head, counted = sides()
    with pytest.raises(ValueError, match="29 rows and the teacher's 28"):
        kl(ours, head, theirs, their_head[1:], counted)
    with pytest.raises(ValueError, match="tau is 0"):
        kl(ours, head, theirs, their_head, counted, tau=0)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_on_a_gpu_the_compiled_rows_agree_with_float64(kind):
    ours, head, theirs, their_head, counted = sides()
    exact = kl(ours, head, theirs, their_head, counted, kind=kind, tau=1.5)
    expected = gradients(exact, ours, head)
    short = [x.detach().cuda().bfloat16() for x in (ours, head, theirs, their_head)]
    mine, weight = short[0].requires_grad_(), short[1].float().requires_grad_()
    value = kl(mine, weight, *short[2:], counted.cuda(), kind=kind, tau=1.5, chunk=4)
    torch.testing.assert_close(value.cpu().double(), exact, rtol=2e-2, atol=0)
    for found, true in zip(gradients(value, mine, weight), expected, strict=True):
        assert (found.cpu().double() - true).norm() / true.norm() < 2e-2
