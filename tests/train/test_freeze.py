"""Parts that stay as they are while the rest learns."""

import copy

import pytest
import timm
import torch
from torch import nn

from zoo.train.config import Optim
from zoo.train.freeze import freeze
from zoo.train.state import TrainState


class Trained(nn.Module):
    """A trunk with a head; its batch norms and stochastic depth would move in training mode."""

    def __init__(self, name: str):
        super().__init__()
        self.backbone = timm.create_model(name, num_classes=0, drop_path_rate=0.2)
        self.head = nn.Linear(self.backbone.num_features, 3)

    def forward(self, x):
        return self.head(self.backbone(x))


@pytest.mark.parametrize(
    ("name", "what", "still", "moving"),
    [
        ("resnet10t", "trunk", "layer4.0.bn2", None),
        ("resnet10t", "2", "layer2.0.bn1", "layer3.0.conv1"),
        ("resnet10t", "conv1,layer3", "layer3.0.bn2", "layer2.0.conv1"),
        ("test_vit", "3", "blocks.2.attn.qkv", "blocks.3.attn.qkv"),
    ],
)
def test_what_is_frozen_stays_to_the_byte_and_the_rest_learns(name, what, still, moving):
    model = Trained(name)
    state = TrainState.of(model, Optim(freeze=what, lr=0.1, ema=0.5))
    before = copy.deepcopy(model.backbone.state_dict())
    for _ in range(2):
        model.train()
        model(torch.randn(4, 3, 160, 160)).square().sum().backward()
        state.optimizer.step()
        state.ema.update(model, 1)
    for trunk in (model.backbone, state.ema.module.backbone):
        after = trunk.state_dict()
        changed = {key for key, value in after.items() if not torch.equal(value, before[key])}
        assert not [key for key in changed if key.startswith(still)]
        assert moving is None or [key for key in changed if key.startswith(moving)]
        assert changed if moving else not changed
    assert not model.backbone.get_submodule(still).training
    learning = {id(p) for group in state.optimizer.param_groups for p in group["params"]}
    assert learning == {id(p) for p in model.parameters() if p.requires_grad}
    twin = copy.deepcopy(model).train()  # holds its own parts still, not those of the original
    assert not twin.backbone.get_submodule(still).training


@pytest.mark.parametrize(
    ("what", "match"),
    [
        ("7", r"is 7, and the trunk has 6 blocks behind its stem; give 1 to 6, or trunk"),
        ("0", "is 0"),
        ("block", r"names 'block', and the trunk has no such part; there are .*patch_embed"),
    ],
)
def test_freezing_more_than_there_is_says_what_there_is(what, match):
    with pytest.raises(ValueError, match=match):
        freeze(Trained("test_vit"), what)


def test_a_model_without_heads_beside_its_trunk_cannot_freeze_all_of_it():
    with pytest.raises(ValueError, match="has none beside its trunk"):
        freeze(timm.create_model("test_vit"), "trunk")
