"""StripedHyena 2: equal to the reference's numbers, in three forms, and a model of transformers."""

import importlib.util
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

transformers = pytest.importorskip("transformers")

from zoo.axes import named_shapes  # noqa: E402
from zoo.commands.convert import main as convert_command  # noqa: E402
from zoo.language import hyena_filters as filters  # noqa: E402
from zoo.language.hyena import (  # noqa: E402
    HyenaConfig,
    HyenaForCausalLM,
    LongHyena,
    MediumHyena,
    ShortHyena,
)
from zoo.language.hyena_cache import LayerState  # noqa: E402
from zoo.language.hyena_sizes import SIZES  # noqa: E402
from zoo.language.hyena_weights import (  # noqa: E402
    RENAMES,
    config_from_published,
    convert_published,
    from_published,
)
from zoo.weights import rename_key  # noqa: E402

GOLDEN = Path(__file__).parent.parent / "golden"
MODELS = [path.stem for path in sorted(GOLDEN.glob("hyena_*.json")) if "_op_" not in path.stem]
OPERATORS = [path.stem for path in sorted(GOLDEN.glob("hyena_op_*.json"))]
PUBLISHED = (GOLDEN / "README_hyena.md").read_text()


@pytest.fixture(scope="module")
def cards():
    """The module that fills models by the golden rule and compares them with the cards."""
    sys.path.insert(0, str(GOLDEN))
    spec = importlib.util.spec_from_file_location("hyena_fill", GOLDEN / "hyena_fill.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(GOLDEN))


def tiny(**changes):
    """A tiny model in float64 whose parts all matter."""
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=61, hidden_size=16, intermediate_size=24, pattern="smla", se_groups=4,
        mr_groups=2, num_attention_heads=2, li_order=4, mr_length=32, initializer_range=0.2,
    )  # fmt: skip
    model = HyenaForCausalLM(HyenaConfig(**(sizes | changes))).double().eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim == 1:
                value.add_(0.3 * torch.randn_like(value))
            elif name.endswith("residues"):
                value.mul_(5)
    return model


def tokens(*shape):
    return torch.randint(61, shape, generator=torch.Generator().manual_seed(1))


def from_card(cards, name, *, published=False):
    """The model of a card with the weights that its rule makes."""
    card = cards.load_card(name)
    model = HyenaForCausalLM(config_from_published(card["reference_config"])).double().eval()
    assert sum(p.numel() for p in model.parameters()) == card["num_parameters"]
    reference = cards.make_state_dict(name)
    state = from_published(reference, model.config)
    if not published:  # the rule's rows of Wqkv are in our order already
        state |= {rename_key(k, RENAMES): v for k, v in reference.items() if "Wqkv" in k}
    model.load_state_dict(state, strict=True)
    return model


def taps(model, ids):
    """Run `model` and keep what each of its parts gives, under the names of the cards."""
    tower, kept, hooks = model.model, {}, []

    def keep(part, name, what=lambda inputs, output: output):
        hook = lambda _, inputs, output: kept.update({name: what(inputs, output)})  # noqa: E731
        hooks.append(part.register_forward_hook(hook))

    keep(tower.embed_tokens, "embedding")
    keep(tower.norm, "final_norm")
    for i, layer in enumerate(tower.layers):
        at = f"layers.{i}."
        for name in ("operator_norm", "operator", "mlp_norm", "mlp"):
            keep(getattr(layer, name), at + name)
        keep(layer, at + "block")
        keep(layer.operator.out_proj, at + "inner", lambda inputs, _: inputs[0])
        if hasattr(layer.operator, "in_proj"):
            keep(layer.operator.in_proj, at + "projections")
    kept["logits"] = model(ids).logits
    kept["logits_last"] = kept["logits"][:, -1]
    for hook in hooks:
        hook.remove()
    return kept


def check(rows, gold):
    assert rows.keys() == gold.keys()
    assert all(row["ok"] for row in rows.values()), {k: r for k, r in rows.items() if not r["ok"]}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_models_equal_the_golden_cards_at_every_tap(cards, name, dtype):
    for case, info in cards.load_card(name)["cases"].items():
        if info["kind"] == "gradient":
            continue
        model = from_card(cards, name, published=info["kind"] == "published_layout").to(dtype)
        gold, extra = cards.load_case(name, case)
        ids = cards.case_input(cards.load_card(name), case)
        with torch.no_grad():
            found = taps(model, ids)
            check(cards.compare_taps({k: found[k] for k in gold}, name, case), gold)
            if "loss" in extra and ids.shape[1] > 1:
                loss = model(ids, labels=ids).loss.item()
                assert loss == pytest.approx(float(extra["loss"]), rel=1e-6)  # computed in float32


@pytest.mark.parametrize("name", MODELS)
def test_gradients_equal_the_golden_cards(cards, name):
    for case, info in cards.load_card(name)["cases"].items():
        if info["kind"] != "gradient":
            continue
        model = from_card(cards, name)
        ids = cards.case_input(cards.load_card(name), case)
        logits = model(ids).logits[:, :-1]
        F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        theirs = {rename_key(k, RENAMES): k for k in cards.load_card(name)["state_dict"]}
        grads = {theirs[k]: p.grad for k, p in model.named_parameters()}
        rows = cards.compare_gradients(grads, name, case)
        check(rows, grads)


def operator_from_card(cards, name):
    card = cards.load_card(name)["constructor"]
    kind = dict(SE=ShortHyena, MR=MediumHyena, LI=LongHyena)[card["operator"]]
    width = card["width"]
    sizes = dict(se_groups=1, mr_groups=1, li_order=card["order"] or 1)
    if kind is not LongHyena:
        part = card["operator"].lower()
        sizes |= {f"{part}_groups": card["groups"], f"{part}_length": card["filter_length"]}
    letter = card["operator"][0].lower()
    heads = dict(num_attention_heads=1, feature_length=card["feature_filter_length"])
    operator = kind(HyenaConfig(hidden_size=width, pattern=letter, **heads, **sizes)).double()
    own = {rename_key(f"blocks.0.filter.{k.rpartition('.')[2]}", RENAMES): v
           for k, v in cards.make_state_dict(name).items()}  # fmt: skip
    own = {k.rpartition(".")[2]: v for k, v in own.items()}
    found = operator.load_state_dict(own, strict=False)
    assert not found.unexpected_keys
    assert {k.partition(".")[0] for k in found.missing_keys} == {"in_proj", "out_proj"}
    return operator


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_equal_the_golden_cards_in_one_pass_and_token_by_token(cards, name):
    operator = operator_from_card(cards, name)
    for case in cards.load_card(name)["cases"]:
        gold, _ = cards.load_case(name, case)
        p = cards.case_input(cards.load_card(name), case)
        with torch.no_grad():
            x2, x1, v = operator.features(p)
            kept = dict(x2=x2, x1=x1, v=v, filter_output=operator.convolve(x1 * v))
            kept["output"] = operator.mix(p)
            state = LayerState()
            steps = [operator.mix(p[:, t : t + 1], state) for t in range(p.shape[1])]
            kept["decode_output"] = torch.cat(steps, dim=1)
        kept["output_last8"] = kept["output"][:, -8:]
        kept["state.features"] = state.tensors["features"].transpose(1, 2)
        last = state.tensors.get("modes")
        kept["state.filter"] = state.tensors["filter"].transpose(1, 2) if last is None else last
        check(cards.compare_taps({k: kept[k] for k in gold}, name, case), gold)


def closest(one, other, bound):
    torch.testing.assert_close(one, other, rtol=0, atol=bound * other.abs().max().item())


@pytest.mark.parametrize("length", [1, 2, 5, 64, 201])
@pytest.mark.parametrize("taps", [1, 3, 7, 33, 128])
def test_explicit_filters_are_the_same_in_all_forms(taps, length):
    u, g = torch.randn(2, length, 12).double(), torch.randn(4, taps).double()
    before = torch.randn(2, taps - 1, 12).double()
    weights = g.repeat_interleave(3, 0).flip(1)[:, None]

    def reference(front):
        x = torch.cat([front, u], dim=1).transpose(1, 2)
        return F.conv1d(x, weights, groups=12).transpose(1, 2)

    alone, behind = reference(torch.zeros_like(before)), reference(before)
    closest(filters.fft(u, g), alone, 1e-13)
    for form in (filters.direct, filters.blocked, filters.convolve):
        closest(form(u, g), alone, 1e-13)
        closest(form(u, g, before), behind, 1e-13)
    closest(filters.blocked(u, g, before, block=taps + 4), behind, 1e-13)
    window = torch.cat([before, u], dim=1)
    steps = [
        filters.recurrent(u[:, t : t + 1], g, window[:, t : t + taps - 1]) for t in range(length)
    ]
    closest(torch.cat(steps, dim=1), behind, 1e-13)


@pytest.mark.parametrize("length", [1, 2, 5, 64, 201])
def test_sums_of_exponentials_are_the_same_in_all_forms(length):
    poles = -(0.01 + 0.3 * torch.randn(6, 4).double().abs())
    residues, before = torch.randn(6, 4).double(), torch.randn(2, 6, 4).double()
    u = torch.randn(2, length, 6).double()
    steps = torch.arange(length).double()
    g = torch.einsum("cn,cnt->ct", residues, torch.exp(poles[..., None] * steps))
    closest(filters.modal_filter(poles, residues, length), g, 1e-13)
    state, outputs = before, []
    for t in range(length):
        y, state = filters.modal_step(u[:, t : t + 1], poles, residues, state)
        outputs.append(y)
    left = filters.modal_filter(poles, residues * before * poles.exp(), length).transpose(1, 2)
    closest(torch.cat(outputs, dim=1), filters.fft(u, g) + left, 1e-13)
    closest(filters.modal_state(u, poles, before), state, 1e-13)


def test_a_block_shorter_than_the_filter_is_refused():
    with pytest.raises(ValueError, match="block of 4 tokens is shorter than the 6"):
        filters.blocked(torch.zeros(1, 8, 2), torch.zeros(1, 7), block=4)


@pytest.mark.parametrize("odd", [1, 2, 3, 5, 127, 1000, 65_537])
def test_transforms_have_a_length_of_small_factors_no_shorter_than_asked(odd):
    found = filters.fast_length(odd)
    assert odd <= found < 1.34 * odd + 1
    for factor in (2, 3, 5, 7):
        while found % factor == 0:
            found //= factor
    assert found == 1


def test_the_transform_in_pieces_is_the_transform(monkeypatch):
    u, g = torch.randn(2, 50, 12).double(), torch.randn(12, 50).double()
    whole = filters.fft(u, g)
    monkeypatch.setattr(filters, "CHUNK", 1000)
    closest(filters.fft(u, g), whole, 1e-14)


# Cached decoding


@pytest.mark.parametrize("cuts", [[1] * 40, [17] + [1] * 23, [3, 20, 1, 16], [40]])
def test_a_cache_continues_exactly_by_any_number_of_tokens(cuts):
    model, ids = tiny(), tokens(2, 40)
    with torch.no_grad():
        full = model(ids).logits
        cache, parts = None, []
        for part in ids.split(cuts, dim=1):
            out = model(part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
    closest(torch.cat(parts, dim=1), full, 1e-12)


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("pattern", ["smlasmla", "l", "s", "m"])
def test_cached_generation_equals_uncached(dtype, bound, pattern):
    model = tiny(pattern=pattern).to(dtype)
    how = dict(max_new_tokens=12, do_sample=False, output_scores=True, return_dict_in_generate=True)
    for prompt in (1, 4, 33):
        ids = tokens(2, prompt)
        cached = model.generate(ids, use_cache=True, **how)
        uncached = model.generate(ids, use_cache=False, **how)
        assert torch.equal(cached.sequences, uncached.sequences)
        assert cached.past_key_values.get_seq_length() == prompt + 11
        closest(torch.stack(cached.scores), torch.stack(uncached.scores), bound)


def test_beams_follow_their_states():
    model, ids = tiny(), tokens(2, 9)
    how = dict(max_new_tokens=8, num_beams=3, do_sample=False)
    assert torch.equal(
        model.generate(ids, use_cache=True, **how), model.generate(ids, use_cache=False, **how)
    )


def test_padding_on_the_left_changes_nothing():
    model, ids = tiny(), tokens(1, 9)
    padded = torch.cat([tokens(1, 4), ids], dim=1)
    both = torch.cat([padded, tokens(1, 13)])
    mask = torch.ones_like(both)
    mask[0, :4] = 0
    with torch.no_grad():
        alone = model(ids).logits
        closest(model(both, attention_mask=mask).logits[:1, 4:], alone, 1e-12)
    how = dict(max_new_tokens=6, do_sample=False)
    together = model.generate(both, attention_mask=mask, **how)
    assert torch.equal(together[0, 13:], model.generate(ids, **how)[0, 9:])


def test_a_token_does_not_see_the_future():
    model, ids = tiny(), tokens(1, 50)
    other = ids.clone()
    other[:, 30:] = (other[:, 30:] + 1) % 61
    with torch.no_grad():
        one, two = model(ids).logits, model(other).logits
    closest(one[:, :30], two[:, :30], 1e-12)
    assert (one[:, 30:] - two[:, 30:]).abs().amax(-1).min() > 1e-3


def test_gradients_are_those_of_checkpointed_layers():
    model, ids = tiny(), tokens(2, 20)
    grads = []
    for again in (False, True):
        if again:
            new = getattr(model, "activation_checkpointing_enable", None)  # its name from 5.2x on
            (new or model.gradient_checkpointing_enable)()
        model.train().zero_grad()
        model(ids, labels=ids).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two)
        assert one.abs().max() > 0


def test_training_in_half_precision_is_near_that_in_float32():
    model, ids = tiny().float().train(), tokens(2, 70)
    losses, grads = [], []
    for halved in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=halved):
            losses.append(model(ids, labels=ids).loss)
        losses[-1].backward()
        grads.append(model.model.layers[2].operator.residues.grad.clone())
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=2e-2)
    assert F.cosine_similarity(*(g.flatten() for g in grads), dim=0) > 0.95


# A model of transformers


def test_what_is_saved_is_what_is_opened(tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    import zoo.language  # noqa: F401

    model = tiny().float()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is HyenaForCausalLM
    assert AutoConfig.from_pretrained(tmp_path).pattern == "smla"
    for name, value in again.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    ids = tokens(2, 20)
    with torch.no_grad():
        assert torch.equal(again.eval()(ids).logits, model(ids).logits)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    operator = half.model.layers[2].operator
    assert operator.residues.dtype == operator.log_poles.dtype == torch.float32
    assert operator.in_proj.weight.dtype == torch.bfloat16
    with torch.no_grad():
        far = (half(ids).logits.float() - model(ids).logits).abs().max()
    assert far < 0.1 * model(ids).logits.abs().max()


@pytest.mark.long
@pytest.mark.parametrize(
    "first, then",
    [("zoo.language", "transformers"), ("transformers.models.auto", "zoo.language")],
)
def test_transformers_knows_the_class_in_either_order_of_imports(first, then):
    code = (
        f"import sys, importlib; importlib.import_module({first!r})\n"
        f"assert {then!r} not in sys.modules; importlib.import_module({then!r})\n"
        "from transformers import AutoConfig, AutoModelForCausalLM\n"
        "config = AutoConfig.for_model('zoo_hyena', hidden_size=32, pattern='s', se_groups=4)\n"
        "model = AutoModelForCausalLM.from_config(config)\n"
        "assert type(model).__name__ == 'HyenaForCausalLM'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_features_are_read_as_of_any_language_model(tmp_path):
    from zoo.language.open import open_language_model
    from zoo.language.tokens import Tokens, read_tokens, separates_documents

    tiny().float().save_pretrained(tmp_path)
    model = open_language_model(f"lm:{tmp_path}")
    ids = tokens(2, 7)
    last, head, hidden = read_tokens(model, Tokens(ids, torch.zeros_like(ids)), at=(0, 0.5, 1))
    torch.testing.assert_close(last @ head.T, model(ids).logits)
    assert torch.equal(hidden[0], model.model.embed_tokens(ids))
    assert torch.equal(hidden[2], last)
    assert not separates_documents(model)


@cache
def on_meta(name):
    with torch.device("meta"):
        return HyenaForCausalLM(HyenaConfig(**SIZES[name]))


PUBLISHED_AS = {
    "hyena_1b": "1B (8k)", "hyena_7b": "7B (8k; 262k)", "hyena_7b_262k": "7B (8k; 262k)",
    "hyena_7b_1m": "7B (1m)", "hyena_20b": "20B (1m)", "hyena_40b": "40B (8k)",
    "hyena_40b_1m": "40B (1m)",
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_published_shapes_have_their_number_of_parameters(name):
    row = next(r for r in PUBLISHED.splitlines() if r.startswith(f"| {PUBLISHED_AS[name]} |"))
    _, _, count, layout, width, heads, hidden, groups, rotary, _ = map(str.strip, row.split("|"))
    model = on_meta(name)
    assert sum(p.numel() for p in model.parameters()) == int(count.replace(",", ""))
    config = model.config
    if "`" in layout:
        assert layout == f"{len(config.pattern)} `{config.pattern}`"
    assert [config.hidden_size, config.num_attention_heads, config.intermediate_size] == [
        int(width), int(heads), int(hidden)
    ]  # fmt: skip
    assert config.se_groups == config.mr_groups == int(groups)
    base, divisor = re.split(r", ", rotary)
    assert config.rotary_base == float(base)
    assert f"{config.rotary_divisor:g}" in divisor.split("; ")
    assert config.max_position_embeddings == 8192 * config.rotary_divisor
    assert named_shapes(model).count() == int(count.replace(",", ""))


def test_a_published_file_becomes_a_folder(cards, tmp_path, monkeypatch):
    card = cards.load_card("hyena_tiny")
    reference = cards.make_state_dict("hyena_tiny", dtype=torch.float32)
    reference["blocks.0.projections._extra_state"] = torch.zeros(4, dtype=torch.uint8)
    torch.save(reference, tmp_path / "published.pt")
    config = config_from_published(card["reference_config"])
    fields = {k: v for k, v in config.to_dict().items() if hasattr(HyenaConfig, k)}
    monkeypatch.setitem(SIZES, "hyena_7b", fields)
    folder = tmp_path / "folder"
    convert_command([str(tmp_path / "published.pt"), "hyena_7b", str(folder)])
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).double().eval()
    gold, _ = cards.load_case("hyena_tiny", "published_L64")
    with torch.no_grad():
        found = taps(model, cards.case_input(card, "published_L64"))
    check(cards.compare_taps({k: found[k] for k in gold}, "hyena_tiny", "published_L64"), gold)
    with pytest.raises(ValueError, match="do not fit the model"):
        wrong = HyenaConfig(**(config.to_dict() | dict(intermediate_size=90)))
        convert_published(tmp_path / "published.pt", wrong, tmp_path / "other")
    assert not (tmp_path / "other").exists()


# Wrong input


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(pattern="smx"), r"'smx' has 'x'; its letters are s \(SE\), m \(MR\)"),
        (dict(pattern=""), "has no layer"),
        (dict(se_groups=3), "se_width 16 does not split into 3 groups.* is 2"),
        (dict(mr_groups=5), "mr_width 16 does not split into 5 groups.* is 4"),
        (dict(num_attention_heads=3), "hidden_size 16 does not split into 3 heads"),
        (dict(head_dim=3), "head_dim 3 is odd"),
        (dict(li_order=0), "li_order 0 must be greater than 0"),
        (dict(mlp_activations=["gelu"]), "1 entries for the 4 layers"),
        (dict(mlp_activations=["relu"] * 4), "'relu'; each is one of gelu, identity"),
    ],
)
def test_wrong_numbers_are_refused_in_one_line(changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        tiny(**changes)
    assert "\n" not in str(caught.value)


def test_another_cache_is_refused():
    with pytest.raises(ValueError, match="past_key_values is a DynamicCache"):
        tiny()(tokens(1, 3), past_key_values=transformers.DynamicCache())


def test_a_sequence_beyond_the_positions_is_refused():
    model = tiny(max_position_embeddings=16)
    with pytest.raises(ValueError, match="17 tokens is longer than the 16 positions"):
        model(tokens(1, 17))
    with pytest.raises(ValueError, match="longer than the 16 positions"):
        model.generate(tokens(1, 14), max_new_tokens=9, do_sample=False)
