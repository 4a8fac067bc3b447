"""Window attention's kernels against plain torch in float64, and how heads are padded."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from zoo.deploy import deploy
from zoo.kernels.attention import biased_attention, window_attention
from zoo.layers.attention import Attention


def plain(qkv, bias, scale):
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    bias = None if bias is None else bias[None]
    x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    return x.transpose(1, 2).flatten(2)


def random_inputs(windows, tokens, heads, dim, dtype=torch.bfloat16, device="cuda", bias=True):
    qkv = torch.randn(windows, tokens, 3, heads, dim, device=device).to(dtype).requires_grad_()
    if not bias:
        return qkv, None
    return qkv, torch.randn(heads, tokens, tokens, device=device).requires_grad_()


def assert_exact(qkv, bias, tolerance, attend=window_attention):
    """Output and gradients are those of float64, but for rounding what the products multiply."""
    scale = qkv.shape[-1] ** -0.5
    ours = [qkv] if bias is None else [qkv, bias]
    theirs = [t.detach().double().requires_grad_() for t in ours]
    y, exact = attend(qkv, bias, scale), plain(theirs[0], (*theirs, None)[1], scale)
    dy = torch.randn_like(y)
    found = [y, *torch.autograd.grad(y, ours, dy)]
    wanted = [exact, *torch.autograd.grad(exact, theirs, dy.double())]
    for a, b in zip(found, wanted, strict=True):
        assert (a.double() - b).norm() <= tolerance * b.norm()


@pytest.mark.parametrize("attend", [window_attention, biased_attention])
def test_the_operator_promises_the_shapes_and_dtypes_of_its_results(attend):
    qkv, bias = random_inputs(3, 5, 2, 8, device="meta")
    y = attend(qkv, bias, 0.5)
    assert (y.shape, y.dtype) == ((3, 5, 16), torch.bfloat16)
    grads = torch.autograd.grad(y.sum(), (qkv, bias))
    assert [(g.shape, g.dtype) for g in grads] == [(t.shape, t.dtype) for t in (qkv, bias)]


@pytest.mark.slow
def test_the_kernels_are_exact_in_tritons_interpreter(interpret):
    interpret(__file__)


def run_interpreted():
    """Run the kernels on the CPU: windows of one tile, and of several that are not full.

    Heads are one power of two wide, or two; GPUs have little shared memory, or a Hopper's.
    """
    from zoo.kernels import attention_tiles_triton as tiles
    from zoo.kernels import attention_triton as small

    torch.manual_seed(0)
    for kernels, sizes, room in (
        (small, (2, 9, 2, 12), 0),
        (tiles, (2, 70, 2, 24), 0),
        (tiles, (1, 130, 1, 8), 0),
        (tiles, (2, 70, 2, 96), tiles.HOPPER_MEMORY),
        (tiles, (2, 130, 1, 40), tiles.HOPPER_MEMORY),
    ):
        tiles.shared_memory = lambda _, room=room: room
        qkv, bias = random_inputs(*sizes, dtype=torch.float32, device="cpu")
        exact = [t.detach().double().requires_grad_() for t in (qkv, bias)]
        dy = torch.randn(sizes[0], sizes[1], sizes[2] * sizes[3])
        wanted = plain(*exact, 0.3)
        wanted = [wanted, *torch.autograd.grad(wanted, exact, dy.double())]
        qkv, bias = qkv.detach(), bias.detach()
        if kernels is small:
            found = [small.forward(qkv, bias, 0.3), *small.backward(dy, qkv, bias, 0.3)]
        else:
            y, logsumexp = tiles.forward(qkv, bias, 0.3)
            found = [y, *tiles.backward(dy, qkv, bias, y, logsumexp, 0.3)]
        for ours, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)


def test_heads_that_are_padded_with_zeros_attend_alike():
    torch.manual_seed(0)
    attention, x, bias = Attention(15, 3), torch.randn(2, 7, 15), torch.randn(3, 7, 7)
    (weight, qkv_bias), proj = attention._padded_weights(3)
    qkv = F.linear(x, weight, qkv_bias).view(2, 7, 3, 3, 8)
    assert not qkv[..., 5:].any()
    padded = F.linear(plain(qkv, bias, 5**-0.5), proj, attention.proj.bias)
    torch.testing.assert_close(padded, attention(x, bias), rtol=1e-5, atol=1e-6)


def test_heads_padded_for_good_attend_alike():
    torch.manual_seed(0)
    attention, x = Attention(15, 3), torch.randn(2, 7, 15)
    wanted = attention(x)
    attention.fuse()
    assert attention.proj.in_features == 15  # on a CPU padding gains nothing
    attention.pad_heads()
    assert attention.proj.in_features == 24
    torch.testing.assert_close(attention(x), wanted, rtol=1e-5, atol=1e-6)
    attention.pad_heads()
    assert attention.proj.in_features == 24


def test_a_layer_that_somebody_put_in_is_called():
    torch.manual_seed(0)
    attention, x = Attention(12, 3), torch.randn(2, 5, 12)
    plain = attention(x)
    attention.proj = nn.Sequential(attention.proj, nn.ReLU())
    attention.qkv = nn.Sequential(attention.qkv)
    attention.fuse()
    torch.testing.assert_close(attention(x), plain.relu())


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(1, 1, 1, 8), (5, 16, 3, 32), (7, 53, 4, 56), (300, 64, 2, 96)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_output_and_gradients_are_those_of_float64(sizes, dtype, bias):
    torch.manual_seed(0)
    assert_exact(*random_inputs(*sizes, dtype, bias=bias), tolerance=4e-3)


@pytest.mark.gpu
def test_the_deploy_form_pads_heads_once():
    attention = Attention(98, 2).cuda().bfloat16()
    x = torch.randn(3, 49, 98, device="cuda").bfloat16()
    padded = deploy(nn.Sequential(attention))
    assert padded[0].proj.in_features == 112 and attention.proj.in_features == 98
    with torch.no_grad():
        torch.testing.assert_close(padded(x), attention(x), rtol=2e-2, atol=2e-3)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "sizes",
    [
        (3, 70, 2, 24),
        (2, 169, 4, 96),
        (5, 256, 8, 16),
        (150, 100, 3, 32),
        (1, 200, 2, 40),
        (150, 256, 2, 96),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_larger_windows_too(sizes, dtype):
    torch.manual_seed(0)
    assert_exact(*random_inputs(*sizes, dtype), tolerance=6e-3, attend=biased_attention)


@pytest.mark.gpu
@pytest.mark.parametrize(("attend", "tokens"), [(window_attention, 49), (biased_attention, 169)])
def test_the_gradients_are_the_same_bits_each_time(attend, tokens):
    qkv, bias = random_inputs(200, tokens, 4, 32)
    dy = torch.randn(200, tokens, 128, device="cuda").bfloat16()
    first, second = (torch.autograd.grad(attend(qkv, bias, 0.2), (qkv, bias), dy) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
def test_the_operator_keeps_what_torch_asks_of_operators():
    torch.library.opcheck(
        torch.ops.zoo.window_attention.default, (*random_inputs(3, 20, 2, 16), 0.25)
    )
    torch.library.opcheck(
        torch.ops.zoo.biased_attention.default, (*random_inputs(3, 80, 2, 16), 0.25)
    )


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [49, 100, 169])
@pytest.mark.parametrize("compiled", [False, True])
def test_attention_under_autocast_is_that_of_float32(tokens, compiled):
    torch.manual_seed(0)
    attention = Attention(98, 2).cuda()  # heads of 49, as in the large models
    x, table = torch.randn(5, tokens, 98).cuda(), torch.randn(2, tokens, tokens).cuda()
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        bias = table.clone().requires_grad_()
        attend = lambda x, bias: attention(x, 2 * bias.sigmoid())  # noqa: E731 -- as models make it
        attend = torch.compile(attend, fullgraph=True) if compiled else attend
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            y = attend(x, bias)
        results.append((y, *torch.autograd.grad(y.float().square().sum(), bias)))
    for ours, exact in zip(*results[::-1], strict=True):
        assert (ours - exact).norm() < 2e-2 * exact.norm()


if __name__ == "__main__":
    run_interpreted()
