import sys
from copy import deepcopy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim.adam import adam

from zoo.students.build import build_student
from zoo.train.config import Optim, Training
from zoo.train.loop import update
from zoo.train.optim import build_optimizer, learning_rate
from zoo.train.shard import is_cut, whole
from zoo.train.state import TrainState


def test_the_rate_rises_then_falls_along_half_a_cosine():
    config = Optim(lr=1.0, min_lr=0.0, warmup=0.1)
    rates = [learning_rate(step, 100, config) for step in range(100)]
    assert rates[:10] == sorted(rates[:10]) and rates[0] == pytest.approx(1 / 11)
    assert rates[10] == 1.0 and rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[55] == pytest.approx(0.5)


def test_a_linear_schedule_falls_in_a_line_that_the_warm_up_multiplies():
    config = Optim(lr=2.0, min_lr=0.0, warmup=0.1, schedule="linear")
    rates = [learning_rate(step, 100, config) for step in (0, 9, 50, 99)]
    assert rates == pytest.approx([0.2, 1.82, 1.0, 0.02])


def test_norms_biases_and_what_the_model_exempts_are_not_decayed():
    model = nn.Module()
    model.backbone = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    model.backbone.special = nn.Parameter(torch.ones(2, 2))
    model.no_weight_decay = lambda: {"backbone.special"}
    decayed = {
        id(p): group["weight_decay"]
        for group in build_optimizer(model, Optim(weight_decay=0.3)).param_groups
        for p in group["params"]
    }
    linear, norm = model.backbone
    assert decayed[id(linear.weight)] == 0.3
    for other in (linear.bias, norm.weight, norm.bias, model.backbone.special):
        assert decayed[id(other)] == 0.0


def test_layer_decay_divides_the_rate_from_block_to_block_and_spares_the_heads():
    student = build_student("test_vit", {"a": (8, 8)}, size=160)
    state = TrainState.of(student, Optim(layer_decay=0.5))
    names = {id(p): name for name, p in student.named_parameters()}
    scales = {
        names[id(p)]: group["scale"]
        for group in state.optimizer.param_groups
        for p in group["params"]
    }
    assert scales.keys() == set(names.values())
    for name, scale in scales.items():
        block = name.split(".")[2] if name.startswith("backbone.blocks.") else None
        if block is not None:
            assert scale == 0.5 ** (5 - int(block)), name
        elif name.startswith(("heads.", "backbone.norm.")):
            assert scale == 1, name
        else:
            assert scale == 0.5**6, name  # the stem
    # the loop multiplies its rate by it
    for p in student.parameters():
        p.grad = torch.ones_like(p)
    update(state, dict(loss=torch.ones(())), Training(optim=Optim(layer_decay=0.5, lr=1e-2)))
    rates = sorted({group["lr"] for group in state.optimizer.param_groups})
    assert rates[0] == pytest.approx(rates[-1] * 0.5**6) and len(rates) == 7


def test_layer_decay_needs_a_backbone_that_names_its_layers():
    with pytest.raises(ValueError, match="does not name its layers"):
        build_optimizer(nn.Linear(2, 2), Optim(layer_decay=0.5))


@pytest.fixture
def alone():
    """A mesh of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_the_optimizer_computes_on_what_a_rank_holds_of_parameters_that_are_cut(alone, monkeypatch):
    """Else torch 2.11 keeps a plan for each parameter and each learning rate that it ever met."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(5, 3), nn.LayerNorm(3))
    cut, seen = deepcopy(plain), list[torch.Tensor]()
    fully_shard(cut, mesh=alone)
    config = Optim(lr=0.1, weight_decay=0.1)
    both = [build_optimizer(model, config) for model in (plain, cut)]

    def watched(params, grads, *rest, **options):
        seen.extend([*params, *grads, *(x for each in rest for x in each)])
        return adam(params, grads, *rest, **options)

    monkeypatch.setattr(sys.modules[adam.__module__], "adam", watched)
    for step in range(3):
        for model, optimizer in zip((plain, cut), both, strict=True):
            optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
            model(torch.arange(10.0).view(2, 5)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert len(seen) == 2 * 3 * 4 * 5 and not any(map(is_cut, seen))
    for mine, theirs in zip(cut.parameters(), plain.parameters(), strict=True):
        assert is_cut(mine) and torch.equal(whole(mine), theirs)
        assert is_cut(both[1].state[mine]["exp_avg"])
