"""2:4 weights in the form that a GPU multiplies."""

import copy
import logging
from typing import Any

import pytest
import torch
from torch import nn

from zoo.students.prune.nm import Pattern, load_weights, prune_nm
from zoo.students.prune.sparse import compress, kinds, two_of_four


def thinned(dim: int = 64, hidden: int = 256) -> Any:
    """Two blocks, of which the layers `0` are 2:4, and a dense head."""
    torch.manual_seed(0)
    blocks: Any = [
        nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim)) for _ in range(2)
    ]
    model = nn.Sequential(*blocks, nn.Linear(dim, 32))
    first = {f"{i}.0": block[0] for i, block in enumerate(blocks)}
    load_weights(first, prune_nm(first, Pattern(2, 4), "magnitude"))
    return model


def test_2_4_layers_are_found_by_their_zeros():
    model = thinned()
    assert list(two_of_four(model)) == ["0.0", "1.0"]
    with torch.no_grad():
        model[0][0].weight[0, :3] = 1  # three of four
        model[1][0].weight.zero_()
    assert not two_of_four(model)


def test_on_a_cpu_a_model_stays_dense_and_a_log_line_says_so(caplog):
    model = thinned()
    before = copy.deepcopy(model.state_dict())
    with caplog.at_level(logging.WARNING):
        assert compress(model) == []
    assert "2 layers stay dense with zeros: 2:4 is multiplied on CUDA alone" in caplog.text
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor")
@pytest.mark.parametrize("tokens", [1, 7, 64, 1000])
@pytest.mark.parametrize("kind", list(kinds()))
def test_each_form_multiplies_as_the_dense_weight_with_zeros(kind, tokens):
    layer = thinned(512, 2048)[0][0].cuda().bfloat16()
    x = torch.randn(2, tokens, 512, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        expected = layer(x).float()
        try:
            sparse = kinds()[kind](layer.weight.detach())
            layer.weight = nn.Parameter(sparse, requires_grad=False)
            found = layer(x).float()
        except RuntimeError as error:
            pytest.skip(f"{kind} is not there: {str(error).splitlines()[0]}")
    assert (found - expected).norm() < 0.01 * expected.norm()  # bfloat16 rounds to 2^-8


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor")
def test_a_compressed_model_equals_the_dense_one_with_zeros():
    model = thinned(4096, 8192).cuda().bfloat16().eval()
    x = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        expected = model(x).float()
        before = torch.cuda.memory_allocated()
        names = compress(model, form="cusparselt")
        found = model(x).float()
    assert set(names) == {"0.0", "1.0"}
    assert torch.cuda.memory_allocated() < before
    assert (found - expected).norm() < 0.01 * expected.norm()
