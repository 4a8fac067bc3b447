"""Attention inside pieces of a row, in each of its forms, against attention under a mask."""

import pytest
import torch
import torch.nn.functional as F

from zoo.kernels.packed_attention import (
    FORMS,
    Pieces,
    fast_forms,
    packed_attention,
    xformers_mask,
)

LENGTHS = (5, 1, 9, 2)
CASES = pytest.mark.parametrize(
    ("causal", "window"), [(False, None), (True, None), (True, 3), (True, 1)]
)


def allowed(causal: bool, window: int | None, lengths=LENGTHS) -> torch.Tensor:
    """Write the mask down as its definition: [total total], true where a token sees another."""
    piece = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    at = torch.arange(sum(lengths))
    seen = piece[:, None] == piece
    if causal:
        seen = seen & (at[:, None] >= at)
    return seen & (at[:, None] - at < window) if window else seen


def masked(q, k, v, mask, scale):
    """Attend as the textbook does, heads one after another."""
    group = q.shape[1] // k.shape[1]
    heads = []
    for head in range(q.shape[1]):
        logits = (q[:, head] @ k[:, head // group].T * scale).masked_fill(~mask, -torch.inf)
        heads.append(logits.softmax(-1) @ v[:, head // group])
    return torch.stack(heads, 1)


def tensors(dtype, device="cpu", lengths=LENGTHS, dim=8):
    torch.manual_seed(0)
    sizes = ((sum(lengths), heads, dim) for heads in (4, 2, 2))
    return [torch.randn(s, dtype=dtype, device=device).requires_grad_() for s in sizes]


@CASES
@pytest.mark.parametrize("form", FORMS)  # in 64 bits each, since the fused ones know 16 alone
def test_a_form_equals_attention_under_a_mask_and_so_do_its_gradients(form, causal, window):
    q, k, v = tensors(torch.float64)
    pieces = Pieces(LENGTHS, q.device, causal, window)
    out = packed_attention(q, k, v, pieces, scale=0.4, form=form)
    expected = masked(q, k, v, allowed(causal, window), 0.4)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    direction = torch.randn_like(out)
    ours = torch.autograd.grad(out, (q, k, v), direction)
    theirs = torch.autograd.grad(expected, (q, k, v), direction)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@CASES
@pytest.mark.filterwarnings("ignore")  # it says that its kernels do not load here
def test_the_mask_that_xformers_is_given_is_the_definition(causal, window):
    pytest.importorskip("xformers")
    mask = xformers_mask(Pieces(LENGTHS, torch.device("cpu"), causal, window))
    total = sum(LENGTHS)
    assert torch.equal(mask.materialize((total, total)) == 0, allowed(causal, window))


def test_no_fused_form_is_offered_where_it_cannot_run():
    assert not fast_forms(torch.device("cpu"), torch.bfloat16)
    assert not fast_forms(torch.device("cuda"), torch.float32)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of xformers' kernels as they load
@pytest.mark.gpu
@CASES
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_each_form_equals_the_mask_on_a_gpu(form, causal, window):
    lengths = (300, 17, 1, 250)
    q, k, v = tensors(torch.bfloat16, "cuda", lengths, dim=64)
    if form != "split" and form not in fast_forms(q.device, q.dtype):
        pytest.skip(f"{form} is not installed")
    pieces = Pieces(lengths, q.device, causal, window)
    try:
        out = packed_attention(q, k, v, pieces, form=form)
    except (NotImplementedError, RuntimeError, ValueError) as reason:
        if form == "xformers" or "knows no windows" in str(reason):
            pytest.skip(f"{form} does not run here: {str(reason)[:200]}")
        raise
    wide = [x.detach().double().cpu().requires_grad_() for x in (q, k, v)]
    expected = masked(*wide, allowed(causal, window, lengths), q.shape[-1] ** -0.5)
    direction = torch.randn_like(out)
    ours = (out, *torch.autograd.grad(out, (q, k, v), direction))
    theirs = (expected, *torch.autograd.grad(expected, wide, direction.double().cpu()))
    for mine, target in zip(ours, theirs, strict=True):  # 16 bits: 3 decimal digits
        scale = target.square().mean().sqrt()
        if not target.any():  # of queries and keys, where a token sees itself alone
            scale = torch.ones_like(scale)
        assert F.mse_loss(mine.double().cpu(), target).sqrt() < 1e-2 * scale
