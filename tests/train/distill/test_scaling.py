"""A recipe on another number of GPUs."""

import pytest

from zoo.commands.distill.args import read_args
from zoo.train.distill.recipes import RECIPES
from zoo.train.distill.scaling import changes, scaled_to, shared_out

RECIPE = RECIPES["c_radio_v4"]()


@pytest.mark.parametrize("gpus", [8, 32, 2048])
def test_each_gpu_keeps_its_images_and_as_many_are_seen(gpus):
    run = scaled_to(RECIPE, gpus)
    assert run.batch == 32 * gpus and run.batches == (32 * gpus,) * 6 + (4 * gpus,) * 4
    assert run.num_slices == gpus
    assert run.steps * run.samples == pytest.approx(RECIPE.steps * RECIPE.samples, rel=1e-3)
    assert run.optim.lr == pytest.approx(1e-3 * (gpus / 32) ** 0.5)
    if gpus == 32:
        assert run == RECIPE


def test_the_options_that_are_printed_make_that_run():
    run = scaled_to(RECIPE, 8)
    (stage,) = read_args(["c_radio_v4", *changes(RECIPE, run)]).stages.values()
    assert stage == run


def test_a_batch_of_ones_own_is_cut_for_the_gpus_or_refused():
    assert shared_out(RECIPE, 8) == RECIPE  # four slices each
    assert shared_out(RECIPE, 64).num_slices == 64
    with pytest.raises(ValueError, match="1024 does not split over 48 GPUs; 1008 does"):
        shared_out(RECIPE, 48)
