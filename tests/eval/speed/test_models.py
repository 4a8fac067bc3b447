"""The measuring road, on tiny models: what is measured, not how fast it was."""

import dataclasses
import json

import pytest
import timm
import torch
from timm.models import register_model
from torch import nn

from zoo.eval.speed.cost import build, cost, name_and_options
from zoo.eval.speed.environment import environment
from zoo.eval.speed.models import (
    Case,
    Measured,
    measure,
    measure_interleaved,
    peer_of,
    prepare,
    ratio,
    relative_error,
    timed,
    words,
)

TINY = Case(model="eradio_nano", size=64, batch=2)
CALLS: list[str] = []


class Probe(nn.Module):
    """Writes down that it ran, and on how many images."""

    def __init__(self, name: str):
        super().__init__()
        self.name, self.weight = name, nn.Parameter(torch.ones(3))

    def forward(self, x):
        if x.device.type != "meta":
            CALLS.append(self.name)
        return (x * self.weight[:, None, None]).mean((2, 3))


@register_model
def bench_probe_a(pretrained=False, **kwargs):
    return Probe("a")


@register_model
def bench_probe_b(pretrained=False, **kwargs):
    return Probe("b")


def row(seconds, model="eradio_nano", macs=0.0, **case):
    return Measured(case=Case(model=model, **({"batch": 4} | case)), macs=macs, seconds=seconds)


@pytest.mark.parametrize("mode", ["egaer", "deploy+train", "compiled+graphs", "train+blocks", ""])
def test_a_mode_that_means_nothing_is_refused(mode):
    with pytest.raises(ValueError, match=r"mode|exclude"):
        words(mode)


def test_a_mode_is_read_word_by_word():
    assert words("deploy+compiled") == {"deploy", "compiled"}


def test_options_stand_behind_the_name():
    assert name_and_options("eradio_l") == ("eradio_l", {})
    name = "mambavision_t,depths=(1, 1, 2, 2),layer_scale=None,drop_rate=0.5"
    options = dict(depths=(1, 1, 2, 2), layer_scale=None, drop_rate=0.5)
    assert name_and_options(name) == ("mambavision_t", options)


@pytest.mark.parametrize("model", ["x,window_size", "x,a=open('f')", "x,a=1)+(2", "x,**{}", "x,=3"])
def test_options_are_plain_values_and_nothing_is_run(model):
    with pytest.raises(ValueError, match="window_size=8"):
        name_and_options(model)


@pytest.mark.parametrize("wrong", [dict(precision="fp8"), dict(size=0), dict(batch=0)])
def test_a_case_that_cannot_be_is_refused(wrong):
    with pytest.raises(ValueError, match=r"precision|at least 1"):
        dataclasses.replace(TINY, **wrong)


@pytest.mark.parametrize(
    ("name", "millions", "gmacs"), [("fastervit_0", 31.405, 3.49), ("mambavision_t", 31.794, 4.56)]
)
def test_parameters_and_multiply_adds_are_the_counted_ones_of_the_networks(name, millions, gmacs):
    parameters, macs = cost(name, 224)
    assert parameters / 1e6 == pytest.approx(millions, abs=5e-4)
    assert macs / 1e9 == pytest.approx(gmacs, abs=5e-3)


def test_a_learnt_query_of_attention_pooling_is_counted_too():
    pooled, plain = (
        cost(f"test_vit3,num_classes=0,global_pool={pool!r},class_token={token}", 160)
        for pool, token in (("map", False), ("avg", False))
    )
    width, tokens = 96, 10 * 10 + 1
    layers = 1 + 2 * tokens + 1 + 2 * 2  # query, keys and values, output, an MLP of twice the width
    assert pooled[1] - plain[1] == width * (width * layers + 2 * tokens)  # and two products


def test_a_model_is_the_same_each_time_and_leaves_the_random_numbers_alone():
    before = torch.get_rng_state()
    first, second = (build("eradio_nano", 64, "cpu").state_dict() for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    assert not build("eradio_nano", 64, "cpu").training


def test_a_model_is_fitted_to_the_size_unless_its_window_is_chosen():
    def window(model, size):
        return build(model, size, "meta").stages[2].blocks[0][0].position.window

    assert window("eradio_xxxtiny", 224) == 7
    assert window("eradio_xxxtiny", 256) == 16  # its default size: as it is registered
    assert window("eradio_xxxtiny,window_size=8", 224) == 8


@pytest.mark.parametrize("mode", ["eager", "deploy", "train"])
@pytest.mark.parametrize("precision", ["float32", "amp", "bf16"])
def test_every_mode_and_precision_gives_a_row(mode, precision):
    case = dataclasses.replace(TINY, mode=mode, precision=precision, channels_last=True, batch=1)
    (found,) = measure([case], rounds=2, warmup=1)
    assert found.error is None
    assert (found.case, len(found.seconds)) == (case, 2)
    assert found.images_per_s > 0 and found.first_seconds > 0
    assert found.macs_per_s == found.macs * found.images_per_s
    assert found.peak_bytes is None  # known on a GPU only


def test_images_a_second_are_those_of_the_median_round():
    assert row([1.0, 8.0, 2.0]).images_per_s == 2.0
    assert row([]).images_per_s == 0.0


def test_a_training_step_runs_backward_and_keeps_no_gradient():
    prepared = prepare(dataclasses.replace(TINY, mode="train"))
    gradients = []
    weight = next(prepared.module.parameters())
    weight.register_hook(lambda grad: gradients.append(grad.abs().sum().item()))
    prepared.step()
    assert gradients[0] > 0 and weight.grad is None
    assert prepared.module.training


def test_a_model_with_several_outputs_is_trained_through_all_of_them():
    name = "eradio_nano,num_classes=3,return_full_features=True"
    prepared = prepare(Case(model=name, size=64, batch=2, mode="train"))
    weights = dict(prepared.module.named_parameters())
    of_neck = next(key for key in weights if key.startswith("neck."))
    grads = {}
    for key in ("head.fc.weight", of_neck):
        weights[key].register_hook(lambda grad, key=key: grads.update({key: bool(grad.any())}))
    prepared.step()
    assert len(grads) == 2 and all(grads.values())


def test_the_deploy_form_and_low_precision_are_compared_with_eager_float32():
    assert relative_error(prepare(TINY)) == 0
    assert relative_error(prepare(dataclasses.replace(TINY, mode="deploy"))) < 1e-5
    assert 1e-5 < relative_error(prepare(dataclasses.replace(TINY, precision="bf16"))) < 0.1
    (found,) = measure([TINY], rounds=1, warmup=1, accuracy=True)
    assert found.relative_error == 0


def test_a_case_that_fails_leaves_the_others_and_says_why():
    off_the_grid = dataclasses.replace(TINY, size=65)
    unknown = dataclasses.replace(TINY, model="eradio_giant")
    for rows in (
        list(measure([off_the_grid, TINY, unknown], rounds=1, warmup=1)),
        measure_interleaved([off_the_grid, TINY, unknown], rounds=1),
    ):
        assert "ValueError" in rows[0].error and "65" in rows[0].error
        assert rows[1].error is None and rows[1].seconds
        assert "eradio_giant" in rows[2].error
        assert [r.case for r in rows] == [off_the_grid, TINY, unknown]


def test_no_case_is_started_when_the_time_is_over():
    (found,) = measure([Case(model="bench_probe_a")], seconds=0.0)
    assert found.error == "not run: the 0 s were over"


def test_models_on_a_cpu_take_turns():
    CALLS.clear()
    cases = [Case(model=f"bench_probe_{x}", size=32, batch=1) for x in "ab"]
    rows = measure_interleaved(cases, rounds=3, warmup=1)
    assert "".join(CALLS) == "ab" + "ab" * 3  # warmed up, then in turns
    assert [len(r.seconds) for r in rows] == [3, 3]


def test_models_alone_are_measured_one_after_the_other():
    CALLS.clear()
    cases = [Case(model=f"bench_probe_{x}", size=32, batch=1) for x in "ab"]
    list(measure(cases, rounds=3, warmup=2))
    assert "".join(CALLS) == "a" * 5 + "b" * 5


def test_a_clock_counts_one_call_a_round():
    calls = []
    times = timed(lambda: calls.append(1), "cpu", 7)
    assert len(times) == len(calls) == 7 and min(times) >= 0


def test_a_ratio_is_the_median_over_rounds_so_a_slow_spell_that_hits_both_does_not_count():
    ours, theirs = row([1.0, 1.0, 9.0, 9.0, 1.0]), row([2.0, 2.0, 18.0, 18.0, 2.0])
    assert ratio(ours, theirs) == 2.0
    assert ratio(ours, row([1.0, 9.0], batch=8)) == pytest.approx(ours.images_per_s / (8 / 5))
    assert ratio(ours, row([])) is None


def test_a_peer_is_the_model_of_that_name_in_the_same_setting():
    rows = [row([1.0]), row([2.0], "resnet18", size=64), row([3.0], "resnet18")]
    assert peer_of(rows[0], rows, "resnet18") is rows[2]
    assert peer_of(rows[1], rows, "eradio_nano") is None


def test_a_row_survives_json():
    (found,) = measure([TINY], rounds=2, warmup=1, kernels=3)
    assert len(found.kernels) == 3
    written = json.loads(json.dumps(found.as_json()))
    assert written["model"] == "eradio_nano" and written["images_per_s"] == found.images_per_s
    assert Measured.from_json({**written, "added": "by a later version"}) == found


def test_the_surroundings_name_versions_threads_and_machine():
    about = environment("zoo bench models")
    assert about["versions"]["torch"] == torch.__version__
    assert about["versions"]["timm"] == timm.__version__
    assert about["threads"] == torch.get_num_threads()
    assert about["command"] == "zoo bench models" and about["machine"]["processor"]
    json.dumps(about)


def test_blocks_are_compiled_one_by_one_or_the_whole():
    for mode, apart in (("train+compiled+blocks", True), ("train+compiled", False)):
        module = prepare(dataclasses.replace(TINY, mode=mode)).module
        block = module.stages[-1].blocks[0]
        assert (block._compiled_call_impl is not None) == apart


@pytest.mark.long
def test_a_compiled_case_compiles_in_its_first_call_and_agrees_with_the_plain_one():
    case = Case(model="bench_probe_a", size=64, batch=2, mode="deploy+compiled")
    (found,) = measure([case], rounds=3, warmup=1, accuracy=True)
    assert found.error is None
    assert found.first_seconds > 10 * min(found.seconds)
    assert found.relative_error < 1e-5


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")  # torch's own first recording
@pytest.mark.parametrize(
    "mode",
    [
        "eager",
        "deploy+compiled",
        "deploy+graphs",
        "deploy+graphs+blocks",
        "train",
        "train+graphs+blocks",
    ],
)
def test_on_a_gpu_a_row_has_a_peak_and_its_kernels_have_floors(mode):
    case = Case(
        model="fastervit_0", batch=8, mode=mode, precision="amp", channels_last=True, device="cuda"
    )
    (found,) = measure([case], rounds=3, warmup=2, accuracy=True, kernels=5)
    assert found.error is None
    assert found.peak_bytes > 4 * found.parameters
    assert len(found.kernels) == 5
    if "H200" in torch.cuda.get_device_name() and mode == "eager":
        assert any(kernel.times_floor for kernel in found.kernels)
        assert all(kernel.times_floor > 0.5 for kernel in found.kernels if kernel.times_floor)
    if "train" not in mode:
        assert found.relative_error < 0.05
