"""Attention over texts of any length: cuDNN makes a plan for each, so it is left out there."""

import pytest
import torch
import torch.nn.functional as F
from torch.backends.cuda import cudnn_sdp_enabled, enable_cudnn_sdp
from torch.profiler import ProfilerActivity, profile

from zoo.eval.language.subject import TextSubject
from zoo.language.any_length import any_length
from zoo.language.tokenizers import ByteTokenizer


@pytest.mark.parametrize("chosen", [True, False])
def test_it_puts_back_what_was_chosen(chosen):
    before = cudnn_sdp_enabled()
    enable_cudnn_sdp(chosen)
    try:
        with pytest.raises(KeyError), any_length():
            assert not cudnn_sdp_enabled()
            raise KeyError
        assert cudnn_sdp_enabled() is chosen
    finally:
        enable_cudnn_sdp(before)


@pytest.mark.parametrize("precision", ["float32", "amp"])
def test_evaluation_of_text_runs_in_it(precision):
    subject = TextSubject(name="x", model=None, tokenizer=ByteTokenizer(), precision=precision)
    with subject.autocast():
        assert not cudnn_sdp_enabled()
        assert torch.is_autocast_enabled("cpu") is (precision == "amp")
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.gpu
def test_no_kernel_of_cudnn_runs_in_it():
    """And outside it does, so the test would see one."""
    if torch.cuda.get_device_capability()[0] not in (9, 10):
        pytest.skip("torch takes cuDNN first on Hopper and Blackwell alone")
    q, k, v = (torch.randn(2, 4, n, 64, device="cuda", dtype=torch.bfloat16) for n in (1, 77, 77))

    def operators() -> str:
        with profile(activities=[ProfilerActivity.CPU], acc_events=True) as found:
            F.scaled_dot_product_attention(q, k, v)
        return " ".join(event.name for event in found.events() or ())

    assert "cudnn_attention" in operators()
    with any_length():
        assert "cudnn_attention" not in operators()
        inside = F.scaled_dot_product_attention(q, k, v)
    whole = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert (inside - whole).abs().max() < 1e-2
