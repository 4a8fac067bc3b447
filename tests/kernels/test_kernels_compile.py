"""Triton's kernels, compiled for a GPU's instruction set: no GPU is needed for that.

Its interpreter takes programs that its compiler refuses, so running them on a CPU is not enough.
"""

import subprocess
import sys

import pytest
import torch


def test_every_kernel_compiles_for_a_gpu():
    pytest.importorskip("triton", reason="Triton is not there")
    subprocess.run([sys.executable, __file__], check=True)


def compile_all() -> set[tuple[str, str]]:
    """Call what launches the kernels, with compilation in the place of the launch.

    Returns:
        The module and the name of each kernel that was compiled.
    """
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Hopper:
        """What Triton needs to know of a GPU before it compiles."""

        get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 0)

    driver.set_active(Hopper())
    run, compiled = JITFunction.run, set()

    def only_compile(self, *args, **settings):
        run(self, *args, **{**settings, "warmup": True})
        compiled.add((self.__module__, self.__name__))

    JITFunction.run = only_compile
    for kernels in (scans, norms, attentions, short_conv, int8_products):
        kernels()
    return compiled


def scans() -> None:
    from zoo.kernels.scan_triton import ScanPlan, backward, forward

    for dtype, length, plan in (
        (torch.bfloat16, 32, ScanPlan(2, 2, 16)),
        (torch.float16, 32, ScanPlan(4, 2, 16)),
        (torch.float32, 4, ScanPlan(4, 1, 8)),
    ):
        x, delta = torch.randn(2, 1, length, 24, dtype=dtype)
        A, B, C = torch.randn(24, 8), *torch.randn(2, 1, length, 8, dtype=dtype)
        inputs = (x, delta, A, B, C, A[:, 0], None)
        y, saved_states = forward(*inputs, delta_softplus=True, save=True, plan=plan)
        backward(y, *inputs, saved_states, delta_softplus=True, plan=plan)


def norms() -> None:
    from zoo.kernels.batch_norm_triton import backward, forward

    last = dict(memory_format=torch.channels_last)
    for act, side, scale in (
        ("gelu", 16, torch.ones(2)),
        ("gelu_tanh", 3, torch.ones(2)),
        ("relu", 3, None),
        ("silu", 16, None),
    ):
        x = torch.randn(2, 208, side, side).bfloat16().to(**last)
        plus, weight = x[:, :196].contiguous(**last), torch.ones(196)
        y, mean, var = forward(x, weight, weight, plus, scale, act, 1e-5, 196)
        backward(y, x, mean, var, weight, weight, scale, act, 1e-5)


def attentions() -> None:
    from zoo.kernels import attention_tiles_triton as tiles
    from zoo.kernels import attention_triton as small

    qkv, bias = torch.randn(2, 49, 3, 4, 40).bfloat16(), torch.randn(4, 49, 49)
    small.backward(small.forward(qkv, bias, 0.1), qkv, bias, 0.1)
    for tokens, dim, room in ((100, 40, 0), (256, 96, 0), (256, 96, tiles.HOPPER_MEMORY)):
        tiles.shared_memory = lambda _, room=room: room
        qkv = torch.randn(2, tokens, 3, 4, dim).bfloat16()
        bias = torch.randn(4, tokens, tokens)
        out, logsumexp = tiles.forward(qkv, bias, 0.1)
        tiles.backward(out, qkv, bias, out, logsumexp, 0.1)


def short_conv() -> None:
    from zoo.kernels.short_conv_triton import backward, forward

    x, taps = torch.randn(5, 49, 784).bfloat16(), torch.randn(784, 3).bfloat16()
    first, _ = forward(x, taps)
    backward(first, x[..., 392:], x, taps)


def int8_products() -> None:
    from zoo.kernels.int8_triton import launch, product

    rows, weight = torch.ones(64, 64, dtype=torch.int8), torch.ones(128, 64, dtype=torch.int8)
    left, right = torch.ones(2, 64), torch.ones(2, 128)
    launch(rows, *left, weight, *right, None, kernel=product, BM=64, BN=64, BK=64, GROUP=8)


if __name__ == "__main__":
    every = compile_all()
    assert len({module for module, _ in every}) == 6, every
    assert len(every) == 21, every  # a new kernel needs a call above
