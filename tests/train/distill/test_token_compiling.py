"""Compiled layers of language models: what is refused, and that they are left as they were."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import nn

from zoo.compiled_blocks import as_written
from zoo.language.tokens import Tokens
from zoo.train.distill.token_compiling import Trial, _why_none
from zoo.train.distill.token_config import DistillText

transformers = pytest.importorskip("transformers")
ROWS = Tokens(torch.arange(24).reshape(2, 12), torch.zeros(2, 12, dtype=torch.long))
SIZES = dict(
    vocab_size=64, hidden_size=16, intermediate_size=24, num_attention_heads=2,
    num_key_value_heads=1, head_dim=8, max_position_embeddings=64,
)  # fmt: skip


def trial(layers: int = 3, **fields) -> Trial:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, num_hidden_layers=layers, **fields)
    return Trial(transformers.LlamaForCausalLM(config), ROWS, nullcontext)


def pretend(wrong: float):
    """Stand in for a compiler whose code is off by a factor."""

    def compiled(layer: nn.Module, **options):
        def code(*args, **words):
            found = layer._call_impl(*args, **words)
            return found * wrong if isinstance(found, torch.Tensor) else (found[0] * wrong,)

        layer._compiled_call_impl = code

    return compiled


@pytest.mark.parametrize(("wrong", "refused"), [(1.0, False), (1.001, False), (1.1, True)])
def test_code_that_answers_otherwise_is_not_taken(monkeypatch, wrong, refused):
    monkeypatch.setattr(nn.Module, "compile", pretend(wrong))
    one = trial()
    plain = one.answer()
    assert ("differ by" in one.why_not()) is refused
    assert [bool(layer._compiled_call_impl) for layer in one.layers] == 3 * [not refused]
    same = [torch.equal(a, b) for a, b in zip(one.answer(), plain, strict=True)]
    assert all(same) is (refused or wrong == 1)  # what is refused is as it was


def test_the_gradient_counts_too(monkeypatch):
    """Features may be right where what is learnt from them is not."""

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return 1.2 * grad

    def compiled(layer: nn.Module, **options):
        layer._compiled_call_impl = lambda *args, **words: Doubled.apply(
            layer._call_impl(*args, **words)
        )

    monkeypatch.setattr(nn.Module, "compile", compiled)
    assert "differ by" in trial().why_not()
    frozen = trial()
    frozen.model.requires_grad_(False)
    assert not frozen.why_not()  # a teacher has none


def test_what_no_compiler_is_asked_for(monkeypatch):
    def never(layer: nn.Module, **options):
        raise AssertionError

    monkeypatch.setattr(nn.Module, "compile", never)
    single = trial(layers=1)
    assert "no layers that are alike" in single.why_not() and single.seconds() > 0
    assert "dropout" in trial(attention_dropout=0.1).why_not()
    config = transformers.MixtralConfig(
        **(SIZES | dict(num_hidden_layers=2, num_local_experts=2, num_experts_per_tok=1))
    )
    experts = replace(single, model=transformers.MixtralForCausalLM(config))
    assert "experts" in experts.why_not()


@pytest.mark.parametrize("speed", ["auto", "compiled"])
def test_what_is_spread_over_processes_stays_as_it_is(speed):
    """Ranks that compile apart could part ways in the middle of a collective."""
    teacher = dict(teachers=("lm:parent,place=shard",))
    for fields in (teacher, dict(ranks="fsdp"), dict(experts=2)):
        config = DistillText(speed=speed, **fields)
        assert _why_none(config, {}, steps=10**9)


def test_an_error_of_the_compiler_is_the_reason(monkeypatch):
    def broken(layer: nn.Module, **options):
        raise RuntimeError("no compiler here\nand more")

    monkeypatch.setattr(nn.Module, "compile", broken)
    assert trial().why_not() == "RuntimeError: no compiler here"


def test_within_as_written_no_code_is_called_and_behind_it_again(monkeypatch):
    monkeypatch.setattr(nn.Module, "compile", pretend(1.001))
    one = trial()
    plain = one.answer()[0]
    assert not one.why_not()
    fast = one.answer()[0]
    with as_written(one.model):
        assert torch.equal(one.answer()[0], plain)
    assert torch.equal(one.answer()[0], fast) and not torch.equal(fast, plain)
