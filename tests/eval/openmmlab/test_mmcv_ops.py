"""mmcv's missing operations: what they give is what torchvision and plain loops give."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
import torchvision

from zoo.eval.openmmlab import mmcv_ops as ops

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def boxes(count, device, side=40):
    corners = torch.rand(count, 2, device=device) * side
    return torch.cat([corners, corners + 4 + torch.rand(count, 2, device=device) * side], dim=1)


@pytest.mark.parametrize("device", DEVICES)
def test_suppression_is_torchvisions_and_an_offset_widens_the_boxes(device):
    some, scores = boxes(200, device), torch.rand(200, device=device)
    kept = ops.nms(some, scores, iou_threshold=0.5, offset=0)
    assert torch.equal(kept, torchvision.ops.nms(some, scores, 0.5))
    assert 10 < len(kept) < 200
    # 4 of 8 pixels in common, with both ends inside 5 of 9
    pair = torch.tensor([[0.0, 0, 6, 9], [2, 0, 8, 9]], device=device)
    best = torch.tensor([0.9, 0.8], device=device)
    assert len(ops.nms(pair, best, iou_threshold=0.53, offset=0)) == 2
    assert len(ops.nms(pair, best, iou_threshold=0.53, offset=1)) == 1


@pytest.mark.parametrize("device", DEVICES)
def test_suppression_takes_boxes_in_half_precision(device):
    some, scores = boxes(50, device).half(), torch.rand(50, device=device)
    kept = ops.nms(some, scores, iou_threshold=0.5, offset=0)
    assert torch.equal(kept, torchvision.ops.nms(some.float(), scores, 0.5))


def roi_case(device):
    maps = torch.randn(2, 3, 13, 17, device=device, dtype=torch.float64, requires_grad=True)
    image = torch.tensor([0, 1, 1, 0, 1], device=device)[:, None]
    return maps, torch.cat([image, boxes(5, device)], dim=1).double()


HOW = dict(aligned_height=3, aligned_width=4, spatial_scale=0.25, sampling_ratio=0, aligned=True)


@pytest.mark.parametrize("device", DEVICES)
def test_roi_align_and_its_gradient_are_torchvisions(device):
    maps, rois = roi_case(device)
    theirs = torchvision.ops.roi_align(maps, rois, (3, 4), 0.25, 0, True)
    direction = torch.randn_like(theirs)
    (grad,) = torch.autograd.grad(theirs, maps, direction)

    ours, ours_grad = torch.zeros_like(theirs), torch.zeros_like(maps)
    none = maps.new_zeros(0)
    ops.roi_align_forward(maps.detach(), rois, ours, none, none, pool_mode=1, **HOW)
    ops.roi_align_backward(direction, rois, none, none, ours_grad, pool_mode=1, **HOW)
    assert ours.any() and torch.equal(ours, theirs)
    torch.testing.assert_close(ours_grad, grad)  # CUDA adds in any order


def test_roi_align_refuses_maxima():
    maps, rois = roi_case("cpu")
    cells = maps.new_zeros(5, 3, 3, 4)
    with pytest.raises(NotImplementedError, match="maxima"):
        ops.roi_align_forward(maps, rois, cells, cells, cells, pool_mode=0, **HOW)
    with pytest.raises(NotImplementedError, match="maxima"):
        ops.roi_align_backward(cells, rois, cells, cells, maps, pool_mode=0, **HOW)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weighted", [False, True])
def test_focal_loss_is_the_papers_formula_with_background_as_no_class(device, weighted):
    logits = torch.randn(7, 3, device=device, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 3, 1, 2, 3, 0, 2], device=device)  # 3 is background
    weight = torch.rand(3, device=device).double() if weighted else logits.new_empty(0)
    truth = target[:, None] == torch.arange(3, device=device)
    p = logits.sigmoid()
    p_t, alpha_t = torch.where(truth, p, 1 - p), torch.where(truth, 0.25, 0.75)
    theirs = -alpha_t * (1 - p_t) ** 2 * p_t.log()
    theirs = theirs * weight if weighted else theirs
    (grad,) = torch.autograd.grad(theirs.sum(), logits)

    ours, ours_grad = torch.zeros_like(theirs), torch.zeros_like(theirs)
    how = dict(gamma=2.0, alpha=0.25)
    ops.sigmoid_focal_loss_forward(logits.detach(), target, weight, ours, **how)
    ops.sigmoid_focal_loss_backward(logits.detach(), target, weight, ours_grad, **how)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(ours_grad, grad)


SHAPES = [(5, 7), (3, 4)]


def attention_case(device):
    """2 images, 35 + 12 cells, 2 heads of 3 channels; 4 queries look at 5 points a level."""
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(2, 47, 2, 3, generator=generator)
    places = torch.rand(2, 4, 2, 2, 5, 2, generator=generator) * 1.4 - 0.2  # some lie outside
    weights = torch.rand(2, 4, 2, 2, 5, generator=generator)
    return [x.to(device, torch.float64).requires_grad_() for x in (value, places, weights)]


def attend_by_loops(value, places, weights):
    """Deformable attention, one point after the other (2010.04159, section 4.1)."""
    batch, queries, heads, levels, points, _ = places.shape
    rows_of = []
    starts = [0, SHAPES[0][0] * SHAPES[0][1]]
    for b in range(batch):
        for q in range(queries):
            for head in range(heads):
                total = 0
                for level in range(levels):
                    rows, cols = SHAPES[level]
                    cells = value[b, starts[level] :][: rows * cols, head].view(rows, cols, -1)
                    cells = F.pad(cells, (0, 0, 2, 2, 2, 2))  # all is 0 outside
                    for point in range(points):
                        x, y = places[b, q, head, level, point] * value.new_tensor([cols, rows])
                        x, y = x - 0.5, y - 0.5  # cells have their values at their centres
                        left, top = int(x.floor()), int(y.floor())
                        right, low = x - left, y - top
                        a, b_ = cells[top + 2, left + 2], cells[top + 2, left + 3]
                        c, d = cells[top + 3, left + 2], cells[top + 3, left + 3]
                        sampled = (1 - low) * ((1 - right) * a + right * b_)
                        sampled = sampled + low * ((1 - right) * c + right * d)
                        total = total + weights[b, q, head, level, point] * sampled
                rows_of.append(total)
    return torch.stack(rows_of).view(batch, queries, -1)


@pytest.mark.parametrize("device", DEVICES)
def test_deformable_attention_and_its_gradients_are_those_of_loops_over_points(device):
    inputs = attention_case(device)
    theirs = attend_by_loops(*inputs)
    direction = torch.randn_like(theirs)
    grads = torch.autograd.grad(theirs, inputs, direction)

    value, places, weights = (x.detach() for x in inputs)
    shapes = torch.tensor(SHAPES, device=device)
    starts = torch.tensor([0, 35], device=device)
    ours = ops.ms_deform_attn_forward(value, shapes, starts, places, weights, im2col_step=64)
    torch.testing.assert_close(ours, theirs)
    filled = [torch.zeros_like(x) for x in (value, places, weights)]
    ops.ms_deform_attn_backward(
        value, shapes, starts, places, weights, direction, *filled, im2col_step=64
    )
    for place, grad in zip(filled, grads, strict=True):
        assert grad.any()
        torch.testing.assert_close(place, grad)


def test_an_operation_that_is_not_there_says_its_name_when_it_is_called():
    missing = ops.carafe_forward
    with pytest.raises(NotImplementedError, match="carafe_forward"):
        missing(1, 2)
    with pytest.raises(AttributeError):
        _ = ops.__wrapped__


def test_importing_the_detectors_imports_neither_mmcv_nor_mmdet():
    code = (
        "import sys, zoo.eval.openmmlab.mmcv_ops, zoo.eval.openmmlab.mmdet_config; "
        "print([m for m in sys.modules if m.startswith(('mmcv', 'mmdet', 'mmengine'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


MMCV = "mmcv is not installed; it is in the extra [det]"


@pytest.mark.filterwarnings("ignore")  # mmcv's own imports
@pytest.mark.parametrize("device", DEVICES)
def test_mmcvs_functions_run_on_the_supplied_operations(device):
    pytest.importorskip("mmcv", reason=MMCV)
    if not ops.supply_ops() and sys.modules[ops.MODULE].__spec__.origin != ops.__file__:
        pytest.skip("mmcv was compiled here, and keeps its own operations")
    import mmcv.ops
    from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction

    spec = sys.modules[ops.MODULE].__spec__
    assert spec is not None and spec.loader is not None
    assert not ops.supply_ops()  # it is there by now

    some, scores = boxes(100, device), torch.rand(100, device=device)
    labels = torch.randint(0, 3, (100,), device=device)
    kept = mmcv.ops.batched_nms(some, scores, labels, dict(type="nms", iou_threshold=0.5))[1]
    assert torch.equal(kept, torchvision.ops.batched_nms(some, scores, labels, 0.5))

    maps, rois = roi_case(device)
    torch.autograd.gradcheck(  # on a GPU torchvision adds in any order
        lambda x: mmcv.ops.roi_align(x, rois, 2, 0.25, 2, "avg", True), maps, nondet_tol=1e-12
    )

    logits = torch.randn(5, 3, device=device, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 3, 1, 2, 3], device=device)
    torch.autograd.gradcheck(
        lambda x: mmcv.ops.sigmoid_focal_loss(x, target, 2.0, 0.25, None, "mean"), logits
    )

    value, places, weights = attention_case(device)
    shapes, starts = torch.tensor(SHAPES, device=device), torch.tensor([0, 35], device=device)
    torch.autograd.gradcheck(
        lambda v, p, w: MultiScaleDeformableAttnFunction.apply(v, shapes, starts, p, w, 64),
        (value, places, weights),
        fast_mode=True,
        nondet_tol=1e-12,
    )
