"""Attention over texts whose length changes from call to call, as in generation."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch.backends.cuda import cudnn_sdp_enabled, enable_cudnn_sdp


@contextmanager
def any_length() -> Iterator[None]:
    """Within this context `scaled_dot_product_attention` leaves cuDNN's kernels out.

    torch takes them first on Hopper and Blackwell, and cuDNN makes a plan for each length that it
    has not met yet. In generation that is every step: on an H200 one of a small tower with
    attention took 48 to 81 ms, however short its text, and one without 11 to 18 (torch 2.11), for
    which these plans are the likely cause. The other kernels need none. The choice is the
    process's: what other threads run changes with it.
    """
    before = cudnn_sdp_enabled()
    enable_cudnn_sdp(False)
    try:
        yield
    finally:
        enable_cudnn_sdp(before)
