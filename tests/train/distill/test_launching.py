"""Launching as the limit: the rule, and the operators that it counts."""

import pytest
import torch

from zoo.features import Batch
from zoo.students.build import build_student
from zoo.train.distill.config import Distill
from zoo.train.distill.launching import count_operators, launching

CPU = torch.device("cpu")
WIDTHS = {"one": (64, 96)}


def counted(depth):
    options = dict(depth=depth)
    student = build_student("test_vit", WIDTHS, size=64, options=options, device="meta")
    assert next(student.parameters()).is_meta
    return count_operators(student, 64, Distill(), CPU)


def test_each_block_more_is_as_many_operators_more():
    two, three, four = map(counted, (2, 3, 4))
    assert two < three and four - three == three - two


def test_as_many_are_counted_as_the_profiler_sees_in_a_real_step():
    student = build_student("resnet18", WIDTHS, size=64).train()
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, acc_events=True) as seen:
        answers = student(Batch(torch.rand(2, 3, 64, 64)))["one"]
        sum(x.sum() for x in answers if x is not None).backward()
    kernels = ("convolution_overrideable", "mkldnn_convolution", "native_batch_norm", "addmm", "mm",
               "max_pool2d_with_indices", "clamp_min_", "threshold_backward", "add_", "add",
               "convolution_backward", "native_batch_norm_backward", "mul", "div", "sub",
               "max_pool2d_with_indices_backward", "native_layer_norm", "gelu", "gelu_backward",
               "native_layer_norm_backward", "mean", "sum", "cat")  # fmt: skip
    real = sum(e.count for e in seen.key_averages() if e.key.removeprefix("aten::") in kernels)
    meta = build_student("resnet18", WIDTHS, size=64, device="meta")
    assert count_operators(meta, 64, Distill(), CPU) == pytest.approx(real, rel=0.35)


def test_a_small_batch_is_told_and_a_large_one_is_not():
    small = launching(3000, 0.006, graphs=False)  # 60 ms to launch what computes for 6
    assert small.seconds == pytest.approx(0.06)
    assert "--batch 80" in (small.describe(8) or "")  # ten times as many images
    assert launching(3000, 0.07, graphs=False).describe(256) is None
    assert launching(3000, 0.006, graphs=True).describe(8) is None  # 5.4 ms as a graph


@pytest.mark.gpu
def test_on_a_gpu_a_slice_that_is_called_launching_bound_takes_no_longer_with_twice_the_images():
    device, took = torch.device("cuda"), {}
    student = build_student("resnet50", WIDTHS, size=64, device="meta")
    operators = count_operators(student, 64, Distill(), device)
    student = build_student("resnet50", WIDTHS, size=64).to(device).train()
    for images in (4, 8):
        batch = Batch(torch.rand(images, 3, 64, 64, device=device))
        times = []
        for _ in range(12):
            begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begun.record()
            sum(x.sum() for x in student(batch)["one"] if x is not None).backward()
            ended.record()
            ended.synchronize()
            times.append(begun.elapsed_time(ended) / 1e3)
        took[images] = sorted(times)[len(times) // 2]
    assert took[8] < 1.2 * took[4]
    modelled = launching(operators, 0.0, graphs=False).seconds
    assert 0.3 * modelled < took[4] < 3 * modelled
