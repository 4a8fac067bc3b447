import pytest
import torch
from torch import nn

from zoo.students.build import build_student
from zoo.train.config import Optim, Training
from zoo.train.loop import update
from zoo.train.optim import build_optimizer, learning_rate
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
