"""Losses of a mixture's routers, as `zoo distill --text` adds them."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from zoo.language.tokens import Tokens
from zoo.train.distill.token_config import TokenLosses
from zoo.train.distill.token_task import TokenTask

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def mixture():
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config).eval()


def losses(model, tokens: Tokens, **weights: float):
    task = TokenTask(TokenLosses(kl=0, ce=1, **weights), {})
    state = cast(Any, SimpleNamespace(model=model))
    return task, task.losses(state, tokens, {}, 0)


def test_the_balance_of_a_mixture_is_that_of_transformers(mixture):
    ids = torch.randint(32, (2, 9))
    _, found = losses(mixture, Tokens(ids, torch.zeros_like(ids)), balance=0.1)
    theirs = mixture(ids, output_router_logits=True).aux_loss
    torch.testing.assert_close(found["balance"].total / found["balance"].count, theirs)


def test_padding_counts_in_no_loss_of_a_router(mixture):
    ids = torch.randint(32, (1, 9))
    padded = torch.cat([ids, ids], dim=1)
    segments = torch.cat([torch.zeros_like(ids), -torch.ones_like(ids)], dim=1)
    _, alone = losses(mixture, Tokens(ids, torch.zeros_like(ids)), balance=0.1, router_z=1)
    _, found = losses(mixture, Tokens(padded, segments), balance=0.1, router_z=1)
    for name in ("balance", "router_z"):
        ours, theirs = (x[name].total / x[name].count for x in (found, alone))
        torch.testing.assert_close(ours, theirs)


def test_each_loss_has_its_weight_and_reaches_the_router(mixture):
    ids = torch.randint(32, (2, 9))
    task, found = losses(mixture, Tokens(ids, torch.zeros_like(ids)), balance=0.5, router_z=0.25)
    means = {name: loss.total / loss.count for name, loss in found.items()}
    wanted = means["ce"] + 0.5 * means["balance"] + 0.25 * means["router_z"]
    torch.testing.assert_close(task.weigh(means, 0), wanted)
    (means["balance"] + means["router_z"]).backward()
    assert mixture.model.layers[0].mlp.gate.weight.grad.abs().sum() > 0


def test_without_their_weights_routers_are_not_watched(mixture):
    ids = torch.randint(32, (2, 9))
    assert set(losses(mixture, Tokens(ids, torch.zeros_like(ids)))[1]) == {"ce"}
