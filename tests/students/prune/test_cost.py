"""What a model costs at other sizes, beside built children, published figures and real caches."""

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from zoo.axes import named_shapes
from zoo.students.prune.cost import BYTES, CostModel, count_flops
from zoo.students.prune.library import NotExpressible, Parent
from zoo.students.prune.outline import outline, sample_of
from zoo.students.prune.plan import Plan
from zoo.students.prune.prune import choose_layers


def on_meta(name: str, **arguments: Any) -> tuple[CostModel, Any]:
    with torch.device("meta"):
        model: Any = timm.create_model(name, **arguments)
    side = model.pretrained_cfg["input_size"]
    return CostModel(
        model, named_shapes(model), inputs={"x": torch.empty(1, *side, device="meta")}
    ), model


@pytest.mark.parametrize(
    ("name", "params", "multiply_adds"),
    [
        ("vit_small_patch16_224", 22.05e6, 4.6e9),  # DeiT (2012.12877), table 1
        ("resnet50", 25.56e6, 4.09e9),  # timm's table; torchvision's says the same
        ("swin_tiny_patch4_window7_224", 28.29e6, 4.5e9),  # Swin (2103.14030), table 1
    ],
)
def test_parameters_and_multiply_adds_are_the_published_ones(name, params, multiply_adds):
    cost = on_meta(name)[0].cost()
    assert cost.params == pytest.approx(params, rel=1e-3)
    assert cost.flops == pytest.approx(2 * multiply_adds, rel=5e-3)


@pytest.mark.parametrize(
    ("config", "params", "active"),
    [
        ("MixtralConfig", 46.7e9, 12.9e9),  # Mixtral of Experts (2401.04088), section 2
        ("LlamaConfig", 6.74e9, 6.74e9),  # Llama 2 (2307.09288): 7B
    ],
)
def test_parameters_that_a_token_meets_are_the_published_ones(config, params, active):
    transformers = pytest.importorskip("transformers")
    fields = dict(vocab_size=32000) if config == "MixtralConfig" else {}
    with torch.device("meta"):
        kind = getattr(transformers, config.replace("Config", "ForCausalLM"))
        model = kind(getattr(transformers, config)(**fields))
    cost = CostModel(model, named_shapes(model), tokens=4096).cost()
    assert cost.params == pytest.approx(params, rel=2e-3)
    assert cost.active == pytest.approx(active, rel=3e-3)
    if config == "LlamaConfig":  # 2 L T H d numbers of 2 bytes: 2 GiB at 4,096 tokens
        assert cost.cache == 2 * 2**30
        assert cost.memory == 2 * cost.params + cost.cache
        products = 2 * 4096 * (cost.params - 32000 * 4096 - 65 * 4096)  # all but embedding, norms
        assert cost.flops == products + 32 * 4 * 4096**2 * 4096


@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral", "qwen3", "nemotron"])
def test_flops_of_a_language_model_are_what_torch_counts(name, build):
    tiny = build(name)
    cost = CostModel(tiny.model, tiny.shapes, tokens=7).cost()
    with FlopCounterMode(display=False) as counter:
        tiny.model(**tiny.inputs)
    rotary = 28  # once a call, 4 angles of 7 places: transformers 5.17 makes a product of it
    assert 0 <= counter.get_total_flops() - 2 * cost.flops <= 2 * rotary  # of two texts


@pytest.mark.parametrize("name", ["llama", "mixtral", "gemma3", "mamba2", "nemotron_h", "hyena"])
def test_caches_and_states_are_what_a_model_holds_after_seven_tokens(name, build):
    tiny = build(name)
    cost = CostModel(tiny.model, tiny.shapes, tokens=7, batch=2).cost()
    out = tiny.model(**tiny.inputs, use_cache=True)
    cache = out.get("past_key_values")
    cache = out.get("cache_params") if cache is None else cache
    seen: dict[int, torch.Tensor] = {}

    def walk(value: Any) -> None:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            seen[value.data_ptr()] = value
        elif isinstance(value, Mapping):
            [walk(inner) for inner in value.values()]
        elif isinstance(value, list | tuple):
            [walk(inner) for inner in value]
        elif "cache" in type(value).__module__:
            walk(vars(value))

    walk(cache)
    assert cost.cache + cost.state == BYTES * sum(tensor.numel() for tensor in seen.values())


def test_a_window_of_attention_holds_no_more_tokens_than_it_sees():
    transformers = pytest.importorskip("transformers")
    config = transformers.Gemma3TextConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, vocab_size=40, sliding_window=4, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.Gemma3ForCausalLM(config)
    cost = CostModel(model, named_shapes(model), tokens=100).cost()
    assert cost.cache == 2 * BYTES * 2 * 8 * (4 + 100)


PLANS = ("stream=0.5,ffn=0.5", "heads=0.5,experts=0.5", "stream=0.5", "ffn=0.5", "layers=0.5")


def test_every_architecture_costs_what_its_built_child_has(each, timm_names):
    """In the zoo form, where all of these can be built: parameters, and FLOPs of vision models."""
    parent = Parent(each.model, *timm_names.get(each.name, ()))
    sample = sample_of(parent)
    whole = copy.deepcopy(each.model).to("meta")
    costs = CostModel(whole, each.shapes, inputs=sample, tokens=7)
    assert costs.cost().params == sum(p.numel() for p in each.model.parameters())
    built = 0
    for words in PLANS:
        try:
            plan = Plan.parse(words)
            child = outline(parent, each.shapes, plan, form="zoo")
            flops = sum(count_flops(child, sample).values()) if sample else 0
        except (ValueError, RuntimeError):  # it has no such axis, or keeps tables of its old width
            continue
        built += 1
        layers = choose_layers(each.shapes, plan, None)
        cost = costs.cost(plan.sizes(each.shapes), layers)
        assert cost.params == sum(p.numel() for p in child.parameters())
        if sample:
            assert cost.flops == pytest.approx(flops, rel=0.15)
        if built == 2:  # enough
            break
    assert built


def test_flops_follow_the_widths_of_products_exactly():
    costs, model = on_meta("resnet50")
    shapes = named_shapes(model)
    plan = Plan.parse("ffn=0.5,layers@3=4")
    parent = Parent(model, "resnet50")
    child = outline(parent, shapes, plan, form="zoo")
    layers = choose_layers(shapes, plan, None)
    cost = costs.cost(plan.sizes(shapes), layers)
    assert cost.flops == sum(count_flops(child, sample_of(parent) or {}).values())


def test_an_outline_of_what_a_library_cannot_build_is_refused(build, timm_names):
    tiny = build("vit")
    parent = Parent(tiny.model, *timm_names["vit"])
    with pytest.raises(NotExpressible, match="Cut them together"):
        outline(parent, tiny.shapes, Plan.parse("heads=0.5"))
