"""A Llava of zoo's towers is cut along its axes, vision and language under one budget."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from zoo.axes import named_shapes
from zoo.cli import main
from zoo.commands.prune.image_text import check_form
from zoo.multimodal.open import adaptor_tower, mixture_tower, open_tower, open_vlm, tower_of
from zoo.students.build import build_student
from zoo.students.prune.cost import CostModel
from zoo.students.prune.library import NotExpressible, Parent
from zoo.students.prune.plan import Plan
from zoo.students.prune.proof import forward_of, prove
from zoo.students.prune.prune import prune
from zoo.students.prune.score import activation, contribution, magnitude, unit_scores
from zoo.students.prune.search import find_knobs

transformers = pytest.importorskip("transformers")

VIT = dict(embed_dim=24, depth=2, num_heads=4)
ERADIO = dict(
    depths=(1, 1, 1, 1), dim=8, num_heads=(2, 4), in_dim=6, neck_dim=20, bias_hidden=12,
    trained_window=2, return_full_features=True,
)  # fmt: skip


def vit(size=32, **options):
    return open_tower("vit_tiny_patch16_224", size=size, options=VIT, **options)


def mixture():
    wider = open_tower("vit_tiny_patch16_224", size=64, options=VIT | dict(embed_dim=32))
    return mixture_tower([vit(), wider], size=32, stride=16)


def adaptors(kind="v2", options=VIT, name="vit_tiny_patch16_224", size=32, upsample=1):
    heads = dict(one=(None, 12), other=(7, 8))
    more = dict(options=options, kind=kind, upsample=upsample)
    return adaptor_tower(build_student(name, heads, size=size, **more), stride=16 // upsample)


def ladders(**network):
    return adaptors("ladder", **network)


PYRAMID = dict(name="resnet10t", options=dict(channels=(8, 8, 16, 16)), size=64)
HEADS = dict(
    ladders=(ladders, "vision.stream=0.5,*.balance.one.o=0.5,*.heads.*.r=0.5,*.heads.*.s=0.5"),
    ladders_on_stages=(lambda: ladders(**PYRAMID), "vision.stream@1=0.5,vision.stream@4=0.5"),
    attention=(
        lambda: adaptors("attn", VIT | dict(embed_dim=32)),
        "vision.stream=0.5,*.balance.one.o=0.5,*.heads.*.mlp.r=0.5,*.heads.one.spatial.f=0.25",
    ),
    finer=(
        lambda: adaptors(upsample=2),
        "vision.stream=0.5,*.balance.one.o=0.5,*.heads.*.r=0.5",
    ),
    finer_v1=(lambda: adaptors("v1", upsample=2), "vision.stream=0.5,*.balance.one.o=0.5"),
    finer_ladders=(lambda: ladders(upsample=2), "*.heads.*.r=0.5,*.heads.*.s=0.5"),
    finer_attention=(
        lambda: adaptors("attn", VIT | dict(embed_dim=32), upsample=2),
        "vision.stream=0.5,*.heads.*.mlp.r=0.5",
    ),
)
LONG = ("eradio", "ladders_on_stages", "finer_attention")


BOTH = "stream=0.5,ffn=0.5,heads=0.5"
TOWERS = {
    "vit": (vit, BOTH),
    "vit_unbalanced": (lambda: vit(balanced=False), "vision.stream=0.5,language.ffn=0.5"),
    "vit_shuffled": (lambda: vit(shuffle=2), "vision.stream=0.5,vision.ffn=0.5"),
    "mixture": (mixture, "vision.stream@1=0.5,vision.ffn@0=0.5,language.stream=0.5"),
    "adaptors": (adaptors, "vision.stream=0.5,*.balance.one.o=0.5,*.heads.*.r=0.5"),
    "eradio": (
        lambda: open_tower("eradio_nano", size=64, options=ERADIO),
        "vision.stream=0.5,vision.ffn=0.5",
    ),
    "resnet": (
        lambda: open_tower("resnet10t", size=64, options=dict(channels=(8, 8, 8, 16))),
        "vision.stream@4=0.5",
    ),
} | HEADS  # fmt: skip


@torch.no_grad()
def awake(model):
    """Give every weight a size at which it shows, in float64."""
    torch.manual_seed(2)
    model = model.double().eval()
    for tensor in model.parameters():
        if tensor.ndim < 2:
            tensor.add_(torch.randn_like(tensor) * 0.3)
        else:
            tensor.normal_(std=2 / tensor[0].numel() ** 0.5)
    tower = tower_of(model)
    sizes = [each.weight.shape[0] for each in tower.balances if hasattr(each, "weight")]
    tower.standardise(
        [(torch.randn(n).double(), torch.randn(n, n).double() / n**0.5) for n in sizes]
    )
    return model


def inputs_of(model, ids_with):
    size = model.config.vision_config.size
    torch.manual_seed(1)
    return dict(
        input_ids=ids_with(model.config.image_seq_length),
        pixel_values=torch.rand(2, 3, size, size, dtype=torch.float64),
    )


def scores(model, shapes, inputs, sizes):
    columns = activation(model, shapes, [inputs], sizes)
    weighed = contribution(columns, shapes, model.state_dict())
    return lambda axis: (
        unit_scores(weighed, shapes, axis)
        if shapes.readers(axis)
        else (magnitude(shapes, model.state_dict(), axis), ())
    )


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.long] * (n in LONG)) for n in TOWERS]
)
def test_a_cut_llava_is_its_masked_parent_and_reloads_and_writes(
    name, tiny_llava, ids_with, tmp_path
):
    build, words = TOWERS[name]
    model = awake(tiny_llava(build()))
    shapes, inputs, plan = named_shapes(model), inputs_of(model, ids_with), Plan.parse(words)
    proofs = prove(shapes, dict(model.state_dict()), forward_of(model, inputs))
    assert {"C", "model.w"} <= {proof.axis for proof in proofs}
    score = scores(model, shapes, inputs, plan.sizes(shapes))
    child = prune(Parent(model), plan, score, probe=inputs)
    assert child.proof is not None and child.proof.moved < 1e-12 * child.proof.control
    child.built.model.save_pretrained(tmp_path / "child")
    again = open_vlm(str(tmp_path / "child"), dtype=torch.float64)
    assert again.config.vision_config.to_dict() != model.config.vision_config.to_dict()
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, child.built.model(**inputs).logits)
    written = again.generate(**inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    assert written.shape[1] == inputs["input_ids"].shape[1] + 2


def test_layers_of_one_part_go(tiny_llava, ids_with):
    model = awake(tiny_llava(vit()))
    rank = lambda path, length: torch.arange(float(length))  # noqa: E731
    child = prune(Parent(model), Plan.parse("vision.layers=1"), None, rank_layers=rank)
    assert child.layers == {"model.vision_tower.backbone.blocks": [1]}
    small = child.built.model
    assert len(small.model.vision_tower.backbone.blocks) == 1
    assert len(small.model.language_model.layers) == len(model.model.language_model.layers)
    with torch.no_grad():
        small(**inputs_of(small, ids_with))


def test_blocks_that_ladder_heads_read_stay(tiny_llava):
    rank = lambda path, length: torch.arange(float(length))  # noqa: E731
    with pytest.raises(NotExpressible, match="reads every block") as refused:
        prune(Parent(tiny_llava(ladders())), Plan.parse("vision.layers=1"), None, rank_layers=rank)
    assert "\n" not in str(refused.value)


def test_flops_are_those_that_torch_counts_of_an_image_with_its_text(tiny_llava, ids_with):
    model = tiny_llava(vit())
    inputs = dict(input_ids=ids_with(4, rows=1), pixel_values=torch.rand(1, 3, 32, 32))
    meta = {key: value.to("meta") for key, value in inputs.items()}
    costs = CostModel(copy.deepcopy(model).to("meta"), named_shapes(model), inputs=meta)
    plain = sdpa_kernel(SDPBackend.MATH)  # torch 2.11 does not count a CPU's fused attention
    with FlopCounterMode(display=False) as counter, torch.no_grad(), plain:
        model(**inputs)
    scaled = 0 if torch.__version__ >= "2.12" else 80  # it also multiplies by the scale
    assert costs.cost().flops == counter.get_total_flops() - scaled


def test_knobs_are_of_both_parts_or_of_the_one_asked_for(tiny_llava):
    shapes = named_shapes(tiny_llava(vit()))
    words = [k.words[0] for k in find_knobs(shapes, Plan({}), lambda plan: True)]
    assert {"vision.ffn", "language.ffn", "vision.layers", "language.layers"} <= set(words)
    alone = [k.words[0] for k in find_knobs(shapes, Plan({}), lambda plan: True, ("vision",))]
    assert alone == [word for word in words if word.startswith("vision.")]


def test_zoos_own_form_is_refused(tiny_llava):
    with pytest.raises(ValueError, match="leave out --form zoo"):
        check_form(Parent(tiny_llava(vit())), "zoo")


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_llava):
    folder = tmp_path_factory.mktemp("parent")
    awake(tiny_llava(vit())).float().save_pretrained(folder)
    return folder


WORDS = "--data generated:32 --samples 8 --batch 4 --search.candidates 2"


@pytest.mark.long
def test_a_budget_may_be_met_by_vision_alone(run, tmp_path):
    main(f"prune vlm:{run} --to params=0.7 --part vision {WORDS} --out {tmp_path}/cut".split())
    before, after = (load_file(f / "model.safetensors") for f in (run, tmp_path / "cut"))
    moved = {n for n in before if n not in after or not before[n].equal(after[n])}
    assert all("vision_tower" in n or n.endswith("linear_1.weight") for n in moved)
    total = [sum(t.numel() for t in state.values()) for state in (before, after)]
    assert 0.6 * total[0] < total[1] < 0.72 * total[0]


@pytest.mark.long
def test_a_child_learns_tokens_and_features_from_its_parent(run, tmp_path):
    words = f"--to flops=0.5 {WORDS} --out {tmp_path}/half --distill 4 --batch 8 --eval-samples 8"
    main(f"prune vlm:{run} {words} --every.log 1".split())
    lines = (tmp_path / "half" / "run" / "metrics.jsonl").read_text()
    assert f"{run.name}/kl" in lines and f"{run.name}/vision" in lines
    assert (tmp_path / "half" / "report.html").is_file()
    child = open_vlm(str(tmp_path / "half"))
    parent = open_vlm(str(run))
    assert sum(p.numel() for p in child.parameters()) < sum(p.numel() for p in parent.parameters())
