"""cuDNN's attention as an operator: where it runs, and against plain torch in float64."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from zoo.kernels import cudnn_attention
from zoo.layers.attention import Attention


def random_qkv(batch, tokens, heads, dim, dtype=torch.bfloat16, device="cuda"):
    return torch.randn(batch, tokens, 3, heads, dim, device=device).to(dtype).requires_grad_()


def test_the_operator_promises_the_shapes_and_dtypes_of_its_results():
    qkv = random_qkv(3, 5, 2, 8, device="meta")
    y = cudnn_attention.cudnn_attention(qkv, 0.5)
    assert (y.shape, y.dtype) == ((3, 5, 16), torch.bfloat16)
    (grad,) = torch.autograd.grad(y.sum(), qkv)
    assert (grad.shape, grad.dtype) == (qkv.shape, qkv.dtype)


@pytest.mark.parametrize(
    ("major", "sizes", "deterministic", "runs"),
    [
        (9, (2, 196, 8, 40), False, True),
        (10, (2, 196, 8, 40), False, True),
        (8, (2, 196, 8, 40), False, False),  # torch takes another kernel there
        (12, (2, 196, 8, 40), False, False),
        (9, (2, 196, 8, 40), True, False),
        (9, (2, 1, 8, 40), False, False),
        (9, (2, 196, 8, 49), False, False),
        (9, (2, 196, 8, 136), False, False),
    ],
)
def test_it_runs_where_torch_would_take_cudnn(monkeypatch, major, sizes, deterministic, runs):
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=major)
    )
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    assert cudnn_attention.runs_here(random_qkv(*sizes, device="meta")) is runs


def needs_hopper():
    if torch.cuda.get_device_properties(0).major not in (9, 10):
        pytest.skip("torch takes cuDNN's attention on Hopper and Blackwell alone")


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(2, 65, 2, 8), (3, 196, 8, 40), (2, 300, 3, 56)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_output_and_gradients_are_those_of_float64(sizes, dtype):
    needs_hopper()
    torch.manual_seed(0)
    qkv = random_qkv(*sizes, dtype)
    exact = qkv.detach().double().requires_grad_()
    scale = sizes[-1] ** -0.5
    wanted = F.scaled_dot_product_attention(*exact.permute(2, 0, 3, 1, 4), scale=scale)
    wanted = wanted.transpose(1, 2).flatten(2)
    y = cudnn_attention.cudnn_attention(qkv, scale)
    dy = torch.randn_like(y)
    found = [y, *torch.autograd.grad(y, qkv, dy)]
    wanted = [wanted, *torch.autograd.grad(wanted, exact, dy.double())]
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours.double() - theirs).norm() <= 1e-2 * theirs.norm()


@pytest.mark.gpu
def test_the_operator_keeps_what_torch_asks_of_operators():
    needs_hopper()
    torch.library.opcheck(torch.ops.zoo.cudnn_attention.default, (random_qkv(3, 80, 2, 16), 0.25))


@pytest.mark.gpu
def test_compiled_after_eager_it_gives_the_gradients_of_float32():
    needs_hopper()
    torch.manual_seed(0)
    attention, x = Attention(320, 8).cuda(), torch.randn(4, 196, 320, device="cuda")
    exact = torch.autograd.grad(attention(x).square().sum(), attention.parameters())
    for run in (attention, torch.compile(attention, fullgraph=True)):
        with torch.autocast("cuda", torch.bfloat16):
            y = run(x)
        found = torch.autograd.grad(y.float().square().sum(), attention.parameters())
        for ours, theirs in zip(found, exact, strict=True):
            assert (ours - theirs).norm() < 2e-2 * theirs.norm()
