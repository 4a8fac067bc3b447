"""Students that are trained together learn what each learns alone."""

import copy

import jaxtyping
import pytest
import torch
from torch.nn.utils import clip_grad_norm_

from zoo.experiments.stack import Stack, clip_each
from zoo.students.build import build_student
from zoo.train.config import Optim
from zoo.train.optim import build_optimizer, learning_rate

TEACHERS = {"a": (8, 16), "b": (None, 24)}
OPTIM = Optim(lr=1e-2, weight_decay=0.1, clip=0.5, warmup=0.2, ema=0.0)
STEPS = 6


def student(seed, **options):
    torch.manual_seed(seed)
    options = dict(depth=2, embed_dim=16, num_heads=2) | options
    return build_student("vit_tiny_patch16_224", TEACHERS, size=32, options=options)


def batches():
    draws = torch.Generator().manual_seed(3)
    return [torch.rand(3, 3, 32, 48, generator=draws)[..., :32] for _ in range(STEPS)]


def loss_of(answers, scale):
    """Scales differ, so that one student's gradient is clipped and the other's is not."""
    return scale * sum((x - 1).square().mean() for x in answers)


def train_alone(one, scale):
    optimizer = build_optimizer(one, OPTIM)
    for step, images in enumerate(batches()):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, STEPS, OPTIM)
        answers = one.answer(images)
        loss_of([x for f in answers.values() for x in f if x is not None], scale).backward()
        clip_grad_norm_(one.parameters(), OPTIM.clip)
        optimizer.step()
        optimizer.zero_grad()
    return one


def test_two_students_in_a_stack_learn_what_each_learns_alone():
    students, scales = [student(0), student(1)], (1e-3, 10.0)
    stack = Stack(students, OPTIM, steps=STEPS)
    for images in batches():
        parts = stack.answers(images)
        stack.update(
            torch.stack([loss_of([x[m] for x in parts.values()], scales[m]) for m in (0, 1)])
        )
    for m, scale in enumerate(scales):
        alone = train_alone(copy.deepcopy(students[m]), scale).state_dict()
        for name, value in stack.student(m).state_dict().items():
            # float32 sums in another order, through six steps of AdamW
            torch.testing.assert_close(value, alone[name], rtol=1e-3, atol=2e-5, msg=name)
            assert name == "mean" or not torch.equal(value, students[m].state_dict()[name])


def test_each_student_may_see_images_of_its_own():
    students = [student(0), student(1)]
    stack = Stack(students, OPTIM, steps=STEPS)
    images = torch.rand(2, 3, 3, 32, 32)
    parts = stack.answers(images)
    for m in (0, 1):
        alone = students[m].answer(images[m])
        torch.testing.assert_close(parts["a/spatial"][m], alone["a"].spatial, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(parts["a/summary"][m], alone["a"].summary, atol=1e-5, rtol=1e-4)


def test_a_stack_that_begins_again_forgets_what_it_learnt():
    students = [student(0), student(1)]
    stack = Stack(students, OPTIM, steps=STEPS)
    place = {name: value.data_ptr() for name, value in stack.params.items()}
    stack.update(stack.answers(batches()[0])["a/spatial"].square().mean((1, 2, 3, 4)))
    stack.restart(students, steps=2)
    assert stack.done == 0 and not stack.optimizer.state
    assert {name: value.data_ptr() for name, value in stack.params.items()} == place
    for name, value in stack.student(1).named_parameters():
        torch.testing.assert_close(value, students[1].get_parameter(name), rtol=0, atol=0)


def test_the_products_run_in_bf16_under_autocast():
    stack = Stack([student(0), student(1)], OPTIM, steps=STEPS)
    with torch.autocast("cpu", torch.bfloat16):
        assert stack.answers(batches()[0])["b/spatial"].dtype == torch.bfloat16


def test_each_gradient_is_clipped_by_its_own_norm():
    gradients = [torch.randn(3, 4, 5), torch.randn(3, 6)]
    gradients = [g * torch.tensor([0.01, 1, 100]).view(-1, *[1] * (g.ndim - 1)) for g in gradients]
    clipped = [g.clone() for g in gradients]
    norms = clip_each(clipped, 1.0)
    for m in range(3):
        params = [torch.nn.Parameter(torch.zeros_like(g[m])) for g in gradients]
        for p, g in zip(params, gradients, strict=True):
            p.grad = g[m].clone()
        torch.testing.assert_close(clip_grad_norm_(params, 1.0), norms[m])
        for p, g in zip(params, clipped, strict=True):
            torch.testing.assert_close(p.grad, g[m])


def test_a_student_with_other_layers_is_refused():
    other = build_student("eradio_nano", TEACHERS, size=64)
    with pytest.raises(ValueError, match="stacked"):
        Stack([other], OPTIM, steps=STEPS)


@pytest.mark.gpu
def test_a_compiled_stack_gives_the_same_answers(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # no compiler follows beartype
    students = [student(0).cuda(), student(1).cuda()]
    images = batches()[0].cuda()
    plain, compiled = (Stack(students, OPTIM, steps=STEPS, compiled=c) for c in (False, True))
    for name, value in compiled.answers(images).items():
        torch.testing.assert_close(value, plain.answers(images)[name], atol=1e-3, rtol=1e-3)
