"""Kernels of a made-up GPU trace against hand-computed floors, and operators of a real CPU run."""

import json

import pytest
import torch
from torch import nn

from zoo.eval.speed.kernels import Limits, kernels_of, profile, work

LIMITS = Limits(bytes_per_s=1e9, flops_per_s=1e12)
BF16, FP32 = "c10::BFloat16", "float"


def op(name, dims, types=None, concrete=(), number=1):
    types = types or [BF16 if shape else "ScalarList" for shape in dims]
    args = {"External id": number, "Input Dims": dims, "Input type": types}
    return {"cat": "cpu_op", "name": name, "args": {**args, "Concrete Inputs": list(concrete)}}


def kernel(name, microseconds, number=1, cat="kernel"):
    args = {} if number is None else {"External id": number}
    return {"cat": cat, "name": name, "dur": microseconds, "args": args}


@pytest.mark.parametrize(
    ("event", "values", "flops"),
    [
        (op("aten::mm", [[5, 7], [7, 3]]), 35 + 21 + 15, 2 * 5 * 7 * 3),
        (op("aten::mm", [[5, 7], [7, 3], [5, 3]]), 35 + 21 + 15, 2 * 5 * 7 * 3),  # out=
        (op("aten::addmm", [[3], [5, 7], [7, 3], [], []]), 3 + 35 + 21 + 15, 2 * 5 * 7 * 3),
        (op("aten::bmm", [[4, 5, 7], [4, 7, 3]]), 140 + 84 + 60, 4 * 2 * 5 * 7 * 3),
        (
            op("aten::cudnn_convolution", [[2, 3, 8, 8], [16, 3, 3, 3], [], []],
               concrete=["", "", "[1, 1]", "[2, 2]"]),
            2 * 3 * 64 + 16 * 27 + 2 * 16 * 16,
            2 * (2 * 16 * 16) * 27,
        ),
        (
            op("aten::convolution", [[2, 6, 8, 8], [6, 1, 3, 3], [6], [], []],
               concrete=["", "", "", "[1, 1]", "[1, 1]"]),
            2 * 6 * 64 + 54 + 6 + 2 * 6 * 64,
            2 * (2 * 6 * 64) * 9,
        ),
        (
            op("aten::convolution_backward", [[2, 16, 4, 4], [2, 3, 8, 8], [16, 3, 3, 3], []],
               concrete=["", "", "", "[False, True, True]"]),
            512 + 2 * (384 + 432),
            2 * 512 * 27,
        ),
        (
            op("aten::_flash_attention_forward", [[2, 10, 4, 8], [2, 12, 4, 8], [2, 12, 4, 8]]),
            640 + 2 * 768 + 640,
            4 * 640 * 12,
        ),
        (op("aten::gelu", [[10, 10]]), 200, 0),
        (op("aten::copy_", [[10, 10], [10, 10]]), 200, 0),
        (op("aten::cat", [[[2, 3], [2, 5]], []], ["TensorList", "Scalar"]), 16 + 10, 0),
        (op("triton_poi_fused_add_0", [[10, 10], [10], [10, 10], []]), 210, 0),
    ],
    ids=lambda x: x["name"] if isinstance(x, dict) else "",
)  # fmt: skip
def test_bytes_and_flops_follow_from_the_shapes(event, values, flops):
    assert work(event) == (2 * values, flops)


def test_arithmetic_in_32_bit_has_no_floor_and_unknown_shapes_have_no_work():
    assert work(op("aten::mm", [[5, 7], [7, 3]], [FP32, FP32])) == (4 * 71, 0)
    assert work(op("aten::mm", [])) is None


def test_kernels_are_summed_by_name_and_operator_and_sorted_by_their_time():
    events = [
        op("aten::gelu", [[1000, 1000]], number=1),
        op("aten::gelu", [[1000, 1000]], number=2),
        kernel("gelu_kernel", 6000.0, 1),
        kernel("gelu_kernel", 10000.0, 2),
        kernel("Memset", 2000.0, None, cat="gpu_memset"),
        {"cat": "python_function", "name": "forward", "dur": 1e9},
        {"ph": "M", "name": "process_name", "args": {"name": "python"}},
    ]
    first, second = kernels_of(events, steps=2, limits=LIMITS)
    assert (first.name, first.op, first.calls) == ("gelu_kernel", "aten::gelu", 1)
    assert first.seconds == pytest.approx(8e-3) and first.share == pytest.approx(16 / 18)
    assert first.floor_seconds == pytest.approx(4e-3)  # 4 MB a call at 1 GB/s
    assert first.times_floor == pytest.approx(2.0) and first.bound == "memory"
    assert second.name == "Memset" and second.op == "" and second.times_floor is None


def test_an_operator_that_launches_two_kernels_is_held_to_its_floor_once():
    events = [
        op("aten::mm", [[1000, 1000], [1000, 1000]]),
        kernel("split", 8000.0),
        kernel("sum", 4000.0),
    ]
    split, add = kernels_of(events, limits=Limits(1e12, 1e12))
    assert split.floor_seconds == add.floor_seconds == pytest.approx(2e-3)  # 2 GFLOP at 1 TFLOP/s
    assert split.times_floor == add.times_floor == pytest.approx(6.0)
    assert split.bound == "arithmetic"


def test_a_chip_without_known_limits_has_no_floors():
    (found,) = kernels_of([op("aten::gelu", [[8]]), kernel("k", 1.0)])
    assert found.floor_seconds is None and found.times_floor is None


def test_a_real_trace_has_the_fields_that_are_read(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.Flatten(), nn.Linear(128, 5))
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True, acc_events=True
    ) as profiler:
        model(torch.randn(2, 3, 8, 8)).sum().backward()
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    ops = {event["name"]: event for event in events if event.get("cat") == "cpu_op"}
    assert work(ops["aten::convolution"]).bytes == 4 * (2 * 3 * 64 + 8 * 27 + 8 + 2 * 8 * 16)
    assert work(ops["aten::addmm"]).bytes == 4 * (5 + 2 * 128 + 128 * 5 + 2 * 5)
    assert work(ops["aten::convolution_backward"]) is not None
    assert len({event["args"]["External id"] for event in ops.values()}) == len(ops)


def test_on_a_cpu_the_most_expensive_operator_comes_first():
    x = torch.randn(1024, 1024)  # 2 G multiplications against 1 M comparisons
    kernels = profile(lambda: torch.relu(x @ x @ x), "cpu", steps=2)
    assert kernels[0].name == "aten::mm" and kernels[0].calls == 2
    assert sum(kernel.share for kernel in kernels) == pytest.approx(1)
    assert kernels == sorted(kernels, key=lambda kernel: -kernel.seconds)
