"""Launching as the limit: the rule, and the operators that it counts."""

import json
import statistics
from pathlib import Path

import pytest
import torch
from torch import nn

from zoo.experiments.students.config import FAMILIES, StudentsExperiment
from zoo.experiments.students.run import networks
from zoo.features import Batch
from zoo.students.build import build_student
from zoo.teachers.from_torch import ModuleTeacher, from_module
from zoo.train.distill.config import Distill, TeacherSpec
from zoo.train.distill.launching import Operators, count_forward, count_operators, launching

CPU = torch.device("cpu")
RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"
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


def tower(*layers: nn.Module) -> ModuleTeacher:
    network = nn.Sequential(nn.Conv2d(3, 4, 8, stride=8), *layers)
    return from_module("tower", network.to("meta"), size=32, device="meta")


def test_a_teacher_launches_its_normalisation_and_a_kernel_for_each_layer():
    plain = tower()  # mean and deviation, a convolution; what returns views launches nothing
    assert count_forward(plain, Distill(precision="float32"), CPU) == 3
    more = tower(nn.ReLU(), nn.Conv2d(4, 4, 1), nn.GELU())
    assert count_forward(more, Distill(precision="float32"), CPU) == 6


def test_a_teacher_of_somebodys_own_is_not_run_on_shapes():
    config = Distill(teachers=(TeacherSpec(name="torch:some.module@64"),), size=64)
    student = build_student("test_vit", WIDTHS, size=64, device="meta")
    found = Operators.of(config, {"own": tower()}, student, CPU)
    assert found.teachers == {} and found.average == 0
    assert found.student == count_operators(student, 64, config, CPU)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_steps_that_the_constant_was_not_taken_from_took_as_long_as_launching_and_up_to_twice(
    family,
):
    """Distilled students of 5 M parameters at 96 px, batch 256, as they are written, on an H200.

    What a step has beside its networks (losses, AdamW, crops) is not counted.
    """
    lines = (RESULTS / "students-h200-2026-11-22" / "rows.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["family"] == family]
    seen = statistics.median(row["step_ms"] for row in rows if row["way"] == "distilled")
    run = Distill(precision="bf16")
    teachers = {
        label: from_module(label, network.to("meta"), size=96, device="meta")
        for label, (_, network) in networks(StudentsExperiment()).items()
    }
    widths = {label: (one.summary_dim, one.spatial_dim) for label, one in teachers.items()}
    name, options = FAMILIES[family]
    options = dict(options, drop_path_rate=0.0)  # as they were built
    student = build_student(name, widths, size=96, options=options, device="meta")
    operators = count_operators(student, 96, run, CPU)
    operators += sum(count_forward(one, run, CPU) for one in teachers.values())
    assert 0.5 < 1e3 * launching(operators, 0.0, graphs=False).seconds / seen < 1


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
