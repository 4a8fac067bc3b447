"""Nested training: which size a slice trains, and routers that choose widths for a budget."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from zoo.axes import named_shapes
from zoo.students.prune.choices import chosen, in_layers, parse_choices, words_of
from zoo.students.prune.elastic import FULL, cut_to, numbers, size_of
from zoo.students.prune.library import Parent
from zoo.students.prune.masked import Masked, Size, Widths
from zoo.students.prune.plan import Plan
from zoo.train.elastic import ElasticTask
from zoo.train.elastic_router import AdaptiveTask, RoutedTask, Router, Surrogate
from zoo.train.task import Loss, Task

transformers = pytest.importorskip("transformers")


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    for weight in model.parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=2 / weight.shape[1] ** 0.5)
    return model


class Near(Task):
    """The distance of logits from what they were."""

    def targets(self, batch, step):
        return batch.logits

    def losses(self, state, batch, targets, step):
        far = (state.model(input_ids=batch.ids).logits - targets).square().mean(-1)
        return {"far": Loss(far.sum(), far.numel())}


def slices(model, number):
    for step in range(number):
        ids = torch.randint(40, (4, 12))
        with torch.no_grad():
            logits = model(input_ids=ids).logits
        yield step, SimpleNamespace(ids=ids, logits=logits, positions=[4 * step])


def holding(model) -> Any:
    """What a task sees of a training state."""
    return SimpleNamespace(model=model)


def ranks_of(shapes):
    return {e.path: list(range(shapes.num_layers(e.path))) for e in shapes.layers}


def test_a_slice_draws_its_size_by_the_shares_and_the_same_one_again():
    masked = Masked(model := llama(), named_shapes(model))
    sizes = {name: Size() for name in ("a", "b", "c")}
    task = ElasticTask(Near(), masked, sizes, shares=(0.5, 0.0, 1.5), seed=3)
    drawn = [task.drawn(position) for position in range(0, 4_000, 8)]
    assert drawn.count("a") / len(drawn) == pytest.approx(0.25, abs=0.06)
    assert "b" not in drawn
    assert drawn == [task.drawn(position) for position in range(0, 4_000, 8)]
    other = ElasticTask(Near(), masked, sizes, shares=(0.5, 0.0, 1.5), seed=4)
    assert drawn != [other.drawn(position) for position in range(0, 4_000, 8)]


def test_a_size_trains_its_own_units_and_gives_every_other_parameter_a_gradient_of_zero():
    shapes = named_shapes(model := llama())
    size = size_of(shapes, Plan.parse("ffn=0.5,layers=2"), {"model.layers": [2, 0, 1]})
    task = ElasticTask(Near(), Masked(model, shapes), {"small": size})
    step, batch = next(slices(model, 1))
    found = task.losses(holding(model), batch, task.targets(batch, step), step)
    found["far"].total.backward()
    assert all(p.grad is not None for p in model.parameters())
    for i, layer in enumerate(model.model.layers):
        grad = layer.mlp.down_proj.weight.grad
        assert (grad[:, 24:] == 0).all()
        assert bool((grad[:, :24] != 0).all()) == (i != 1)


def trained(task, model, steps):
    """Train what a task has beside its model, and return each step's losses."""
    learned = [p for module in task.learned for p in module.parameters()]
    optimizer = torch.optim.Adam(learned, lr=1e-3)
    rows = []
    for step, batch in slices(model, steps):
        torch.manual_seed(step)
        losses = task.losses(holding(model), batch, batch.logits, step)
        shares = {name: loss.total / loss.count for name, loss in losses.items()}
        task.weigh(shares, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        rows.append({name: share.item() for name, share in shares.items()})
    return rows


def test_a_static_router_finds_a_size_for_each_budget_that_can_be_cut_out():
    shapes = named_shapes(model := llama().requires_grad_(False))
    choices = parse_choices("ffn=0.25|0.5|0.75|1.0,heads=0.5|1.0,layers=1|2|3", shapes)
    budgets = dict(small=0.4, medium=0.7)
    masked, ranks = Masked(model, shapes), {"model.layers": [2, 0, 1]}
    router = Router(choices, len(budgets))
    task = RoutedTask(
        Near(), masked, router, choices, budgets, ranks, steps=100, strength=30.0, shares=(1, 1, 0)
    )
    trained(task, model, 100)
    for name, budget in budgets.items():
        with torch.no_grad():
            size = task.size(name, sample=False)
        share = float(numbers(shapes, size)) / shapes.count()
        assert share == pytest.approx(budget, abs=0.12), name
        words = words_of(choices, {n: router(n, list(budgets).index(name)) for n in choices})
        child = cut_to(Parent(model), shapes, Plan.parse(words), ranks)
        assert child.shapes.count() == round(float(numbers(shapes, size)))
        ids = torch.randint(40, (2, 9))
        with torch.no_grad(), masked.at(size):
            ours = model(input_ids=ids).logits
        theirs = child.built.model(input_ids=ids).logits
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.fixture
def dead():
    """A model whose second layer has neurons that nothing reads, choices of them, and a budget."""
    model = llama().requires_grad_(False)
    model.model.layers[1].mlp.down_proj.weight.zero_()
    shapes = named_shapes(model)
    words = (f"model.layers.{i}.mlp.f=0.25|1.0" for i in range(3))
    choices = parse_choices(",".join(words), shapes)
    return model, shapes, choices, dict(only=1 - 36 * 32 * 3 / shapes.count())  # one layer's


def test_a_static_router_hears_from_the_loss_which_units_matter_and_keeps_its_budget(dead):
    model, shapes, choices, budgets = dead
    router = Router(choices, 1)
    task = RoutedTask(
        Near(), Masked(model, shapes), router, choices, budgets, {}, steps=40, strength=30.0,
        shares=(1, 0),
    )  # fmt: skip
    shares = {n: torch.tensor([1.0, 0.0], requires_grad=True) for n in choices}
    step, batch = next(slices(model, 1))
    size = chosen(shapes, choices, shares, {})  # all of them narrow
    losses = task.at(size, holding(model), batch, batch.logits, step)
    losses["far"].total.backward()
    first, second, third = (share.grad for share in shares.values())
    assert first is not None and second is not None and third is not None
    assert first[1] < first[0] - 1  # wider is nearer, but where nothing is read
    assert third[1] < third[0] - 1
    assert not second.any()
    rows = trained(task, model, 40)
    assert rows[-1]["cost"] == pytest.approx(0, abs=1e-6)


def test_an_adaptive_router_keeps_its_budget_and_learns_from_what_a_surrogate_predicts(dead):
    model, shapes, choices, budgets = dead
    choices = in_layers(choices, shapes)
    router, surrogate = Router(choices, 1, width=32), Surrogate(choices)
    task = AdaptiveTask(
        Near(), Masked(model, shapes), router, choices, budgets, {}, steps=80, strength=30.0,
        shares=(1, 0), surrogate=surrogate,
    )  # fmt: skip
    rows = trained(task, model, 80)
    first, last = (
        {name: sum(row[name] for row in part) / len(part) for name in rows[0]}
        for part in (rows[:16], rows[-16:])
    )
    assert last["surrogate"] < 0.3 * first["surrogate"]
    assert last["far"] < 0.7 * first["far"]
    assert last["cost"] < 0.05
    _, batch = next(slices(model, 1))
    looking = task.looking("only", sample=False)
    with torch.no_grad(), looking as (size, _, shares), task.masked.at(size):
        model(input_ids=batch.ids)
    assert all(share.shape == (4, 12, 2) for share in shares.values())  # each token chose
    again = model(input_ids=batch.ids).logits  # and nothing of it is left
    torch.testing.assert_close(again, batch.logits)


def test_the_numbers_of_a_size_are_those_of_its_child_and_of_a_mixture_their_mean():
    shapes = named_shapes(model := llama())
    ranks = ranks_of(shapes)
    for words in ("ffn=0.5,stream=0.5", "heads=0.5,layers=2,ffn=20"):
        plan = Plan.parse(words)
        child = cut_to(Parent(model), shapes, plan, ranks)
        assert numbers(shapes, size_of(shapes, plan, ranks)) == child.shapes.count()
    share = torch.tensor([0.5, 0.5], requires_grad=True)
    axis = "model.layers.0.mlp.f"
    half = numbers(shapes, Size({axis: Widths((16, 48), share)}))
    assert half.item() == shapes.count({axis: 32})
    half.backward()
    assert share.grad is not None
    assert share.grad.tolist() == [16 * 3 * 32, 48 * 3 * 32]


def test_the_whole_model_leaves_the_router_a_gradient_of_zero():
    shapes = named_shapes(model := llama())
    choices = parse_choices("ffn=0.5|1.0", shapes)
    router = Router(choices, 1)
    task = RoutedTask(
        Near(), Masked(model, shapes), router, choices, dict(small=0.5), {}, steps=2, shares=(0, 1)
    )
    assert task.drawn(0) == FULL
    trained_step, batch = next(slices(model, 1))
    losses = task.losses(holding(model), batch, batch.logits, trained_step)
    task.weigh({n: x.total for n, x in losses.items()}, 0).backward()
    assert all(p.grad is not None and not p.grad.any() for p in router.parameters())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "needs choices"),
        ("ffn=0.5", "leaves no choice"),
        ("ffn=0.5|1.0,ffn=0.25|1.0", "leaves no choice"),
        ("ffn=0|1.0", "says nothing to keep"),
        ("experts=0.5|1.0", "has no 'experts'"),
    ],
)
def test_choices_that_are_none_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_choices(text, named_shapes(llama()))


def test_what_all_layers_share_is_not_chosen_in_each():
    shapes = named_shapes(llama())
    with pytest.raises(ValueError, match="stream is of all layers"):
        in_layers(parse_choices("ffn=0.5|1.0,stream=0.5|1.0", shapes), shapes)
    with pytest.raises(ValueError, match="number of layers"):
        in_layers(parse_choices("layers=1|2", shapes), shapes)
