"""A search meets its budget with models that can be built and differ, and goes on after a kill."""

import copy
import itertools
import json
from typing import Any

import pytest
import timm
import torch
from torch import nn

from zoo.axes import named_shapes
from zoo.commands.prune.run import distance
from zoo.students.prune.budget import split_budgets
from zoo.students.prune.candidates import Search
from zoo.students.prune.cost import CostModel
from zoo.students.prune.journal import NAME, Journal
from zoo.students.prune.latency import fit_latency
from zoo.students.prune.library import Parent
from zoo.students.prune.outline import sample_of
from zoo.students.prune.plan import Plan
from zoo.students.prune.prune import prune
from zoo.students.prune.score import magnitude
from zoo.students.prune.search import apart, find_knobs, plan_of, spread
from zoo.students.prune.similarity import linear_cka

VIT: dict[str, Any] = dict(embed_dim=96, depth=4, num_heads=6, img_size=32, num_classes=5)
SWIN: dict[str, Any] = dict(
    embed_dim=32, depths=(2, 2, 2), num_heads=(2, 4, 8), img_size=32, window_size=2
)


def search_of(parent: Parent, to: str, **options: Any) -> Search:
    shapes = named_shapes(parent.model)
    whole = copy.deepcopy(parent.model).to("meta")
    costs = CostModel(whole, shapes, inputs=sample_of(parent), tokens=16)
    budgets, words = split_budgets(to)
    fixed = Plan.parse(words) if words else Plan({})
    return Search(parent, shapes, budgets, fixed, costs, **options)


def vit() -> Parent:
    arguments = VIT
    return Parent(
        timm.create_model("vit_tiny_patch16_224", **arguments).eval(),
        "vit_tiny_patch16_224",
        arguments,
    )


def built(search: Search, words: str) -> nn.Module:
    """Cut by magnitude, as the words say."""
    state = search.parent.model.state_dict()

    def score(axis: str) -> tuple[torch.Tensor, tuple[str, ...]]:
        return magnitude(search.shapes, state, axis), ()

    return prune(search.parent, Plan.parse(words), score).built.model


@pytest.mark.parametrize("to", ["params=200K", "flops=0.6", "memory=0.5,flops=0.5"])
def test_a_vit_meets_its_budget_within_two_percent(to):
    search = search_of(vit(), to)
    limits, found = search.limits(), search.candidates(3)
    for candidate in found:
        child = built(search, candidate.words)
        assert candidate.cost.params == sum(p.numel() for p in child.parameters())
        used = {what: candidate.values()[what] / limit for what, limit in limits.items()}
        assert max(used.values()) <= 1
    assert max(max(c.values()[w] / n for w, n in limits.items()) for c in found) > 0.98


@pytest.mark.parametrize("name", ["llama", "mixtral", "mamba2", "nemotron_h", "swin"])
def test_no_candidate_is_one_that_cannot_be_built(name, build, timm_names):
    tiny = build(name)
    parent = Parent(tiny.model, *timm_names.get(name, ()))
    search = search_of(parent, "params=0.7")
    for candidate in search.candidates(2):
        child = built(search, candidate.words)
        assert candidate.cost.params == sum(p.numel() for p in child.parameters())
        assert candidate.cost.params <= 0.7 * search.costs.cost().params
        with torch.no_grad():
            child(**tiny.inputs)


def test_active_parameters_and_memory_of_a_mixture_are_budgets(build):
    for to in ("active=0.7", "memory=0.7"):
        search = search_of(Parent(build("mixtral").model), to)
        what = to.partition("=")[0]
        best = max(c.values()[what] for c in search.candidates(3))
        assert 0.65 < best / search.parent_values()[what] <= 0.7


def test_stages_vary_on_their_own_where_the_library_lets_them(build, timm_names):
    parent = Parent(build("convnext").model, *timm_names["convnext"])
    search = search_of(parent, "params=0.6")
    words = {w for knob in find_knobs(search.shapes, Plan({}), search.fits) for w in knob.words}
    assert {"stream@0", "stream@1", "stream@2", "stream@3", "layers@2"} <= words
    child = search_of(parent, "params=0.6").candidates(2)[1]
    assert len({word.partition("=")[2] for word in child.words.split(",")}) > 1
    swin = timm.create_model("swin_tiny_patch4_window7_224", **SWIN).eval()
    search = search_of(Parent(swin, "swin_tiny_patch4_window7_224", SWIN), "params=0.6")
    words = {w for knob in find_knobs(search.shapes, Plan({}), search.fits) for w in knob.words}
    assert "ffn" in words  # one ratio serves all stages
    assert "layers@1" in words


def test_what_the_user_fixes_stays():
    wide = search_of(vit(), "params=0.5,layers=1.0").candidates(3)
    assert all("layers=1.0" in candidate.words for candidate in wide)
    deep = search_of(vit(), "params=0.5,ffn=1.0,stream=1.0").candidates(3)
    assert [candidate.words for candidate in deep] == ["ffn=1.0,stream=1.0,layers=0.25"]


@pytest.mark.parametrize(
    ("to", "message"),
    [
        (
            "params=0.001",
            r"params=0.001 is impossible here; the smallest .* has params=[\d,]+ \(\d",
        ),
        ("params=900M", "keeps the whole model, which has 5"),
        ("params=1", "keeps the whole model"),
        ("params=0.5,layers=1.0,ffn=1.0,stream=1.0", "Nothing of VisionTransformer can vary"),
        ("params=half", "'params=half' is no budget"),
        ("params=0.5,params=0.4", "is no budget; give each once"),
        ("latency_ms=3", "There is no latency_ms of this model to count"),
    ],
)
def test_a_budget_that_cannot_be_met_says_what_can(to, message):
    with pytest.raises(ValueError, match=message):
        search_of(vit(), to).candidates(2)


def test_a_library_that_builds_nothing_smaller_has_the_zoo_form(build, timm_names):
    parent = Parent(build("efficientnet_lite").model, *timm_names["efficientnet_lite"])
    for words in ("ffn@3=0.5,stream@2=0.5", "layers@5=0.25"):
        plan = Plan.parse(words)
        assert not search_of(parent, "flops=0.5").fits(plan)
        assert search_of(parent, "flops=0.5", form="zoo").fits(plan)


def test_candidates_differ_and_near_equal_ones_are_left_out():
    knobs = find_knobs(search_of(vit(), "params=0.5").shapes, Plan({}), lambda plan: True)
    settings = list(itertools.product(*(range(len(knob.levels)) for knob in knobs)))[::7]
    chosen = list(itertools.islice(spread(knobs, settings), 10))
    assert chosen[0] == settings[0]
    least = min(apart(knobs, a, b) for a, b in itertools.combinations(chosen, 2))
    largest = sorted(settings, reverse=True)[:10]
    assert least > 4 * min(apart(knobs, a, b) for a, b in itertools.combinations(largest, 2))
    near = [settings[0], settings[0]]
    assert list(spread(knobs, near)) == near[:1]
    whole = tuple(len(knob.levels) - 1 for knob in knobs)
    assert plan_of(knobs, whole, Plan({})) == Plan({})


def test_latency_is_found_again_from_a_few_models():
    rows = [[1, d, d * w, w] for d, w in itertools.product((1.0, 0.5, 0.25), (1.0, 0.6))]
    predict = fit_latency(rows, [0.2 + 3 * row[1] + 5 * row[2] for row in rows])
    assert predict([1, 0.75, 0.75 * 0.8, 0.8]) == pytest.approx(0.2 + 3 * 0.75 + 5 * 0.75 * 0.8)
    launches = fit_latency(rows, [4 * row[1] for row in rows])  # a GPU's, where width costs nothing
    assert launches([1, 0.75, 0.1, 0.1]) == pytest.approx(3.0)


def test_a_latency_that_was_measured_is_kept_to():
    search = search_of(vit(), "latency_ms=4", measure=lambda plan: 10.0 * (plan.layers or 1.0))
    for candidate in search.candidates(3):
        assert candidate.latency_ms is not None
        assert candidate.latency_ms <= 4
        assert Plan.parse(candidate.words).layers == 0.25


def test_a_journal_goes_on_and_refuses_another_request(tmp_path):
    search = search_of(vit(), "params=0.5")
    found, whole = search.candidates(2), search.estimate(Plan({}), "the parent")
    journal = Journal(tmp_path, dict(model="vit", to="params=0.5"))
    assert journal.candidates() is None
    journal.choose(whole, found)
    journal.note(found[0].words, 0, 0.25)
    again = Journal(tmp_path, dict(model="vit", to="params=0.5"))
    assert again.candidates() == (whole, found)
    assert again.distance(found[0].words, 0) == 0.25
    assert again.distance(found[1].words, 0) is None
    assert [json.loads(line) for line in (tmp_path / NAME).read_text().splitlines()]
    with pytest.raises(ValueError, match=r"another search \(to params=0.5, now params=0.4\)"):
        Journal(tmp_path, dict(model="vit", to="params=0.4"))


def test_cka_is_one_under_rotation_and_scale_and_small_for_noise():
    torch.manual_seed(0)
    x = torch.randn(200, 6)
    rotation = torch.linalg.qr(torch.randn(6, 6)).Q
    assert linear_cka(x, 3 * x @ rotation + 1) == pytest.approx(1)
    assert linear_cka(x, torch.randn(200, 4)) < 0.1
    assert 0.5 < linear_cka(x, x[:, :4]) < 1  # 4 of 6 equal variances: sqrt(4 / 6)
    assert linear_cka(x, x[:, :4]) == pytest.approx((4 / 6) ** 0.5, abs=0.05)


def test_cka_of_few_samples_does_not_take_noise_for_likeness():
    torch.manual_seed(0)
    pairs = [(torch.randn(16, 384), torch.randn(16, 256)) for _ in range(50)]
    values = torch.tensor([linear_cka(x, y) for x, y in pairs])
    assert abs(values.mean()) < 3 * values.std() / 50**0.5  # as an unbiased estimate of 0 is
    biased = [torch.corrcoef(torch.stack([centred(x), centred(y)]))[0, 1] for x, y in pairs]
    assert min(biased) > 0.7


def test_features_are_compared_whatever_their_direction_and_classes_are_not():
    class Opposite(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            return -2 * self.model(x).flip(-1)

    torch.manual_seed(0)
    batches = [dict(x=torch.randn(4, 3, 32, 32)) for _ in range(2)]
    far = []
    for classes in (0, 10):
        model = timm.create_model("test_vit", img_size=32, num_classes=classes).eval()
        far.append(distance(model, Opposite(model), batches))
    assert far[0] == pytest.approx(0, abs=1e-6)
    assert far[1] > 0.5  # a class that was first is not last for nothing


def centred(x):
    """Return a kernel, centred as for the estimate that is biased, as one row."""
    kernel = x @ x.T
    return (kernel - kernel.mean(0) - kernel.mean(1, keepdim=True) + kernel.mean()).flatten()


@pytest.mark.parametrize("samples", [4, 5, 40])
def test_cka_equals_the_inner_product_of_u_centred_kernels(samples):
    # Székely & Rizzo (2014, Annals of Statistics 42), definition 2: without the diagonal
    def u_centred(x):
        n, kernel = len(x), (x @ x.T).fill_diagonal_(0)
        rows = kernel.sum(1) / (n - 2)
        u = kernel - rows[:, None] - rows[None] + kernel.sum() / ((n - 1) * (n - 2))
        return u.fill_diagonal_(0)

    torch.manual_seed(0)
    x, mix = torch.randn(samples, 6).double() + 3, torch.randn(6, 9).double()
    y = x @ mix + torch.randn(samples, 9)
    ours, theirs = u_centred(x), u_centred(y)
    expected = (ours * theirs).sum() / (ours.norm() * theirs.norm())
    assert linear_cka(x, y) == pytest.approx(expected.item(), abs=1e-10)


def test_cka_of_three_samples_is_refused():
    with pytest.raises(ValueError, match="4 samples or more; there are 3"):
        linear_cka(torch.rand(3, 5), torch.rand(3, 4))
