"""The zoo form: widths that no class can be built with, other ones in each layer."""

import copy

import pytest
import torch

import zoo
from zoo.students.prune.library import NotExpressible, Parent, save
from zoo.students.prune.parent import open_parent
from zoo.students.prune.plan import Plan
from zoo.students.prune.proof import forward_of
from zoo.students.prune.prune import prune
from zoo.students.prune.score import magnitude

PLANS = [
    ("vit", "stream=0.75,heads=3,blocks.0.mlp.f=10"),
    ("swin", "*.0.attn.h=0.5,*.1.mlp.f=7"),
    ("convnext", "C1=5,ffn=3"),
    ("convnextv2", "ffn=0.5"),
    ("resnet", "stream=0.5"),
    ("resnet_bottleneck", "ffn=0.5"),
    ("efficientnet_lite", "stream=0.5,blocks.1.0.m=10"),
    ("fastervit", "heads=0.5,ffn=0.3"),
    ("mambavision", "heads=0.5,ffn=0.5,ssm_state=0.5,*.l=1"),
    ("eradio", "heads=0.5,ffn=0.5,*.u=0.5"),
    ("radio", "heads=0.5"),
    ("llama", "model.layers.0.mlp.f=10,model.layers.1.self_attn.q=1"),
    ("gemma3", "model.layers.0.mlp.f=10,model.layers.1.self_attn.k=1"),
    ("mixtral", "model.layers.0.mlp.e=3,stream=0.5"),
    ("laguna", "*0.mlp.f=10,*0.self_attn.q=1,*1.mlp.t=7"),
    ("hyena", "*0.operator.p=3,*1.operator.g=1,*2.operator.p=9,*3.operator.h=3,*0.mlp.f=10"),
    ("mamba2", "*0.mixer.r=3,*1.mixer.p=3,*0.mixer.s=2,stream=0.75"),
    ("nemotron_h", "*.s=3,*.e=3"),
    ("falcon_h1", "*0.feed_forward.f=10,*1.self_attn.q=1,stream=0.75"),
    ("granite_hybrid", "*0.mamba.r=3,*0.mamba.s=3,*.e=3,*1.shared_mlp.t=7,stream=0.75"),
    ("zamba2", "*1.shared_transformer.feed_forward.f=10,*0.mamba.s=3,*3.mamba.p=5"),
    ("siglip_vision", "encoder.layers.0.self_attn.h=0.5,encoder.layers.1.mlp.f=9"),
    ("clip", "heads=0.5"),
    ("dinov2", "heads=0.5,ffn=0.3"),
    ("bert", "heads=0.5,ffn=0.3"),
]


def cut(tiny, names, words):
    def score(axis):
        return magnitude(tiny.shapes, tiny.state, axis), ()

    parent = Parent(tiny.model, *names.get(tiny.name, ()))
    return prune(parent, Plan.parse(words), score, probe=tiny.inputs, form="zoo")


@pytest.mark.parametrize(("name", "words"), PLANS)
def test_any_widths_equal_the_masked_parent_and_reload(name, words, build, timm_names, tmp_path):
    child = cut(build(name), timm_names, words)
    assert child.proof is not None
    assert child.proof.moved < 1e-5 * child.proof.control
    save(child.built, tmp_path)
    again = zoo.create_model(f"local-dir:{tmp_path}")
    ours, theirs = child.built.model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    tiny = build(name)
    again.to(next(tiny.model.parameters()).dtype)
    for kind in ("_attn_implementation", "_experts_implementation"):  # a float64 one, as the parent
        if hasattr(tiny.model, "config"):
            setattr(again.config, kind, "eager")
    outputs = (forward_of(model, tiny.inputs) for model in (child.built.model, again))
    assert all(map(torch.equal, *(forward({}) for forward in outputs)))
    with pytest.raises(ValueError, match="was cut already"):
        open_parent(str(tmp_path))


def test_a_reloaded_child_gives_the_same_outputs_and_learns(build, timm_names, tmp_path):
    vit = build("vit")
    child = cut(vit, timm_names, "heads=3,blocks.0.mlp.f=10")
    save(child.built, tmp_path)
    again = zoo.create_model(f"local-dir:{tmp_path}")
    assert torch.equal(again(**vit.inputs), child.built.model(**vit.inputs))
    again(**vit.inputs).sum().backward()
    assert all(p.grad is not None for p in again.parameters())
    assert again.blocks[0].mlp.fc1.out_features == 10
    assert again.blocks[1].attn.num_heads == 3


def test_a_child_shares_no_memory_with_its_parent(build, timm_names):
    vit = build("vit")
    child = cut(vit, timm_names, "blocks.0.mlp.f=10")
    theirs = {t.data_ptr() for t in vit.model.state_dict().values()}
    assert not theirs & {t.data_ptr() for t in child.built.model.state_dict().values()}


@pytest.mark.parametrize("name", ["eva02", "dinov3", "swinv2", "vit_map", "siglip"])
def test_what_keeps_tables_of_its_old_width_is_refused(name, build, timm_names):
    with pytest.raises(NotExpressible, match="keeps something of its old width"):
        cut(build(name), timm_names, "heads=1")


def test_widths_that_falcons_multipliers_lie_along_are_refused(build, timm_names):
    with pytest.raises(NotExpressible, match=r"multipliers in a table.*--form library"):
        cut(build("falcon_h1"), timm_names, "*0.mamba.r=3")


def test_a_mixer_block_may_go_whatever_kind_its_place_had(build, timm_names):
    """MambaVision makes the first half of a stage's blocks state-space mixers, by their index."""
    vision = build("mambavision")

    def first_goes(path, length):
        return torch.arange(float(length))

    parent = Parent(vision.model, *timm_names["mambavision"])
    child = prune(parent, Plan({}, 0.5), None, rank_layers=first_goes, form="zoo")
    assert child.layers["stages.3.blocks"] == [1]
    assert type(child.built.model.stages[3].blocks[0].mixer).__name__ == "Attention"
    with torch.no_grad():
        child.built.model(**vision.inputs)
    with pytest.raises(NotExpressible, match="MambaVision"):
        prune(parent, Plan({}, 0.5), None, rank_layers=first_goes)


def test_blocks_of_an_efficientnet_that_add_nothing_may_go(build, timm_names, tmp_path):
    tiny = build("efficientnet_lite")
    model = copy.deepcopy(tiny.model)
    parent = Parent(model, *timm_names["efficientnet_lite"])
    for stage in (3, 5):  # behind the first block of each, which changes the width
        for block in model.blocks[stage][1:]:
            torch.nn.init.zeros_(block.bn3.weight)
            torch.nn.init.zeros_(block.bn3.bias)
    child = prune(parent, Plan.parse("layers@3=1,layers@5=1"), None, form="zoo").built
    theirs, ours = (list(network.blocks) for network in (model, child.model))
    assert [len(a) - len(b) for a, b in zip(theirs, ours, strict=True)] == [0, 0, 0, 2, 0, 3, 0]
    save(child, tmp_path)
    again = zoo.create_model(f"local-dir:{tmp_path}")
    torch.testing.assert_close(again(**tiny.inputs), model(**tiny.inputs))
    with pytest.raises(NotExpressible, match="--form zoo has any"):
        prune(parent, Plan.parse("layers@3=1"), None)
