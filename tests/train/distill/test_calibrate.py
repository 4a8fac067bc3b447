import pytest
import torch

from zoo.train.distill.calibrate import Statistics
from zoo.train.distill.losses import mse
from zoo.train.distill.phi_s import KINDS, Moments, fit


@pytest.mark.parametrize("kind", KINDS)
def test_the_spread_of_a_map_is_what_the_best_constant_guess_would_lose(kind):
    x = torch.randn(2000, 8, dtype=torch.float64) @ torch.randn(8, 8, dtype=torch.float64) * 3 + 5
    moments = Moments(8)
    moments.update(x)
    normalizer = fit(kind, moments)
    found = Statistics(moments={"a": moments}).baseline_losses({"a": normalizer})["a/spatial"]
    target = normalizer(x)
    lost = mse(target.mean(0).expand_as(target), target)
    torch.testing.assert_close(found, lost * 2000 / 1999)
    if kind in ("phi_s", "alpha_only", "standardize"):
        torch.testing.assert_close(found, torch.ones_like(found))
