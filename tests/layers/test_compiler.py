"""What the compiler is kept from, and that compiled gradients are the eager ones."""

import os
import subprocess
import sys

import pytest
import timm
import torch

NAME = "TORCHINDUCTOR_COMPREHENSIVE_PADDING"


@pytest.mark.parametrize("first", ["zoo", "torch._inductor.config"])
@pytest.mark.parametrize("value", [None, pytest.param("1", marks=pytest.mark.long)])
def test_rows_are_padded_only_where_that_is_safe_or_wished(first, value):
    code = (
        f"import {first}, zoo.mambavision, torch._inductor.config as c; "
        "print(c.comprehensive_padding)"
    )
    environment = {k: v for k, v in os.environ.items() if k != NAME}
    environment |= {} if value is None else {NAME: value}
    run = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment
    )
    padded = value == "1" or torch.__version__ >= "2.15"
    assert run.stdout.split() == [str(padded)]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["mambavision_t", "fastervit_4"])
def test_compiled_gradients_are_the_eager_ones_in_one_process(name):
    torch.manual_seed(0)
    model = timm.create_model(name, depths=(1, 1, 2, 2)).cuda().eval()
    x = torch.randn(2, 3, 224, 224, device="cuda")
    found = []
    for run in (model, torch.compile(model, fullgraph=True)):
        with torch.autocast("cuda", torch.bfloat16):
            y = run(x)
        parts = torch.autograd.grad(y.float().square().sum(), model.parameters())
        found.append(torch.cat([part.double().flatten() for part in parts]))
    assert (found[1] - found[0]).norm() < 2e-2 * found[0].norm()
