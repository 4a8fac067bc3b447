"""Mamba-2's recurrence in chunks of matrix products."""

import pytest
import torch

from zoo.layers.ssd import ssd


@pytest.mark.parametrize(("length", "dtype"), [(48, torch.float64), (7, torch.float64)])
def test_the_chunks_are_the_recurrence_with_its_gradients(length, dtype):
    draws = torch.Generator().manual_seed(0)
    x, dt, b, c = (
        torch.randn(2, length, *size, generator=draws, dtype=dtype)
        for size in ((6, 3), (6,), (2, 5), (2, 5))
    )
    dt, a = dt.exp(), -torch.rand(6, generator=draws, dtype=dtype)
    inputs = [t.requires_grad_() for t in (x, dt, a, b, c)]
    found = ssd(*inputs, chunk=16).out
    state, wanted = torch.zeros(2, 6, 5, 3, dtype=dtype), []
    for t in range(length):
        here = (part[:, t].repeat_interleave(3, 1) for part in (b, c))  # of three heads each
        b_t, c_t = here
        state = state * (dt[:, t] * a).exp()[..., None, None]
        state = state + b_t[..., None] * (dt[:, t, :, None] * x[:, t])[..., None, :]
        wanted.append((c_t[..., None] * state).sum(-2))
    wanted = torch.stack(wanted, 1)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    weights = torch.randn(wanted.shape, generator=draws, dtype=dtype)
    ours, theirs = (torch.autograd.grad((y * weights).sum(), inputs) for y in (found, wanted))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
