"""N of each M weights stay: the three one-shot choices and the learned one."""

import pytest
import timm
import torch
from torch import nn

from zoo.students.prune.nm import (
    Pattern,
    input_norms,
    input_products,
    load_weights,
    prune_nm,
    sparse_layers,
    sparsegpt,
)
from zoo.train.masks import LearnedMask, bake, learn_masks

TWO = Pattern(2, 4)


@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(1, 4), Pattern(4, 8)])
def test_a_mask_keeps_exactly_n_of_each_m_and_those_are_the_largest(pattern):
    scores = torch.rand(5, 32)
    mask = pattern.mask(scores)
    groups = mask.view(5, -1, pattern.group)
    assert (groups.sum(-1) == pattern.kept).all()
    kept = scores.view_as(groups).where(groups, torch.inf).amin(-1)
    dropped = scores.view_as(groups).where(~groups, -torch.inf).amax(-1)
    assert (kept >= dropped).all()
    assert (
        pattern.mask(torch.zeros(3, 32)).view(3, -1, pattern.group).sum(-1) == pattern.kept
    ).all()


def error(weight, sparse, x):
    return ((x @ (weight - sparse).T).square().sum() / (x @ weight.T).square().sum()).item()


def correlated(rows=400, width=32):
    torch.manual_seed(0)
    return torch.randn(rows, 8) @ torch.randn(8, width) + 0.3 * torch.randn(rows, width)


def test_sparsegpt_makes_up_for_what_it_drops_and_wanda_does_not():
    x, weight = correlated() * torch.linspace(0.2, 3, 32), torch.randn(16, 32)
    magnitude = weight * TWO.mask(weight.abs())
    wanda = weight * TWO.mask(weight.abs() * x.norm(dim=0))
    updated = sparsegpt(weight, x.T @ x, TWO, block=8)
    assert TWO.holds(updated)
    errors = [error(weight, found, x) for found in (updated, wanda, magnitude)]
    assert errors == sorted(errors)
    assert errors[0] < errors[1] / 2


def test_products_are_exact_under_autocast_too():
    """Rounded to bfloat16 they have negative eigenvalues: seen on Gemma 3 270M."""
    model = nn.Sequential(nn.Linear(64, 64))
    x = correlated(rows=512, width=64) * torch.logspace(-1, 2, 64)

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            model(x)

    (found,) = input_products({"0": model[0]}, run).values()
    exact = x.double().T @ x.double()
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4 * exact.abs().max().item())
    assert torch.linalg.eigvalsh(found)[0] > 0


def test_sparsegpt_takes_products_that_rounding_has_made_indefinite():
    x, weight = correlated(), torch.randn(16, 32)
    products = x.T @ x
    products -= 0.1 * products.diagonal().mean() * torch.eye(32)
    assert torch.linalg.eigvalsh(products)[0] < 0
    updated = sparsegpt(weight, products, TWO)
    assert TWO.holds(updated)
    assert error(weight, updated, x) < error(weight, weight * TWO.mask(weight.abs()), x)
    with pytest.raises(ValueError, match="not finite"):
        sparsegpt(weight, products.fill_diagonal_(torch.inf), TWO)


def test_sparsegpt_is_the_same_for_every_block_of_columns():
    x, weight = correlated(), torch.randn(6, 32)
    found = [sparsegpt(weight, x.T @ x, TWO, block=block) for block in (4, 8, 32, 128)]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=1e-5, rtol=1e-5)


def test_sparsegpt_is_optimal_brain_surgeon_column_by_column():
    """Without Cholesky: the inverse of what is behind each zero makes up for it, row by row."""
    x, weight = correlated()[:, :16].double(), torch.randn(3, 16).double()
    hessian = x.T @ x
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(16)
    expected = weight.clone()
    for row in expected:
        for start in range(0, 16, 4):
            inverses = [torch.linalg.inv(hessian[i:, i:]) for i in range(start, start + 4)]
            saliency = [row[start + i] ** 2 / inverses[i][0, 0] for i in range(4)]
            dropped = sorted(range(4), key=lambda i, s=saliency: s[i].item())[:2]
            for i in range(4):
                if i in dropped:
                    behind, inverse = slice(start + i, None), inverses[i]
                    row[behind] -= row[start + i] / inverse[0, 0] * inverse[0].clone()
                    row[start + i] = 0
    torch.testing.assert_close(sparsegpt(weight, x.T @ x, TWO, block=8), expected)


def test_inputs_that_are_never_there_are_dropped_without_a_singular_matrix():
    x = correlated()
    x[:, ::4] = 0
    updated = sparsegpt(torch.randn(4, 32), x.T @ x, TWO)
    assert updated.isfinite().all()
    assert (updated[:, ::4] == 0).all()


def test_all_linears_of_the_blocks_are_thinned_and_the_classifier_is_not():
    model = timm.create_model("test_vit", img_size=32)
    layers = sparse_layers(model, TWO)
    inside = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "blocks" in n}
    assert set(layers) == inside
    with pytest.raises(ValueError, match="no multiple of 7"):
        sparse_layers(model, Pattern(2, 7))
    with pytest.raises(ValueError, match="nothing to thin"):
        sparse_layers(nn.Linear(4, 4), TWO)


def test_what_a_layer_sees_is_summed_over_batches_of_any_size():
    model = timm.create_model("test_vit", img_size=32).eval()
    layers, images = sparse_layers(model, TWO), torch.rand(6, 3, 32, 32)

    def run(size):
        return lambda: [model(part) for part in images.split(size)]

    norms, products = input_norms(layers, run(6)), input_products(layers, run(6))
    for name in layers:
        torch.testing.assert_close(input_norms(layers, run(4))[name], norms[name])
        torch.testing.assert_close(products[name].diagonal().sqrt(), norms[name], rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="did not reach"):
        input_norms(layers, lambda: None)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_a_model_runs_with_thinned_weights(method):
    model = timm.create_model("test_vit", img_size=32).eval()
    layers, images = sparse_layers(model, TWO), torch.rand(4, 3, 32, 32)
    dense = model(images)
    load_weights(layers, prune_nm(layers, TWO, method, lambda: model(images)))
    assert all(TWO.holds(layer.weight) for layer in layers.values())
    assert not torch.equal(model(images), dense)
    if method != "magnitude":
        with pytest.raises(ValueError, match="looks at data"):
            prune_nm(layers, TWO, method)


def test_a_learned_mask_begins_at_its_prior_and_ends_in_plain_weights():
    torch.manual_seed(0)
    layer = nn.Linear(64, 64)
    weight, prior = layer.weight.detach().clone(), TWO.mask(layer.weight.abs())
    layers = {"layer": layer}
    learn_masks(layers, TWO, {"layer": layer.weight.detach() * prior})
    bake(layers)
    assert list(dict(layer.named_parameters())) == ["bias", "weight"]
    assert TWO.holds(layer.weight)
    assert torch.equal(layer.weight[layer.weight != 0], weight[layer.weight != 0])
    same = ((layer.weight != 0) == prior).view(-1, 4).all(-1).float().mean()
    assert same > 0.85  # the draw of the logits leaves a few groups another mask


def test_a_soft_mask_sums_to_n_and_hardens_as_it_cools():
    torch.manual_seed(0)
    weight = torch.ones(64, 16)
    mask = LearnedMask(weight, TWO)
    mask.kappa, mask.tau = 100.0, 4.0
    soft = mask(weight).view(-1, 4)
    torch.testing.assert_close(soft.sum(-1), torch.full((256,), 2.0))
    mask.kappa, mask.tau = 500.0, 0.05
    hard = mask(weight)
    assert (soft - soft.round()).abs().mean() > 5 * (hard - hard.round()).abs().mean()


def test_the_draws_follow_the_gumbel_softmax_of_the_logits():
    """Equation 4: for a temperature of nearly 0, mask j is drawn with probability softmax(κπ)ⱼ."""
    torch.manual_seed(0)
    mask = LearnedMask(torch.ones(1, 4), TWO)
    mask.kappa, mask.tau = 1.0, 1e-4
    with torch.no_grad():
        mask.logits.copy_(torch.tensor([[0.0, 0.5, 1.0, -1.0, 0.2, 2.0]]))
    drawn = torch.stack([mask(torch.ones(1, 4))[0] for _ in range(4000)])
    expected = mask.logits.softmax(-1)[0].detach() @ TWO.masks()
    torch.testing.assert_close(drawn.mean(0), expected, atol=0.03, rtol=0)
