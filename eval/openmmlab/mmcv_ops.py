"""The compiled operations that mmcv-lite lacks, from torchvision and plain PyTorch.

mmdet calls mmcv's operations, and these call a compiled module, `mmcv._ext`. The pure wheel of
mmcv does not have it, and its sources do not compile against recent PyTorch. `supply_ops` puts
this file in its place: the functions below have the names and arguments that mmcv uses; most
arguments are tensors to be filled. All functions run on the CPU and on a GPU.

The operations are those of Cascade and plain Mask R-CNN, RetinaNet, DINO and similar detectors. Any
other operation raises an error with its name when it is called. Importing this file has no side
effects, and does not need mmcv.
"""

import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from jaxtyping import Float, Int
from torch import Tensor

MODULE = "mmcv._ext"


def supply_ops() -> bool:
    """Install the operations below as mmcv's compiled module, unless it has one.

    Call this before mmdet's models are imported. Return whether they were installed.

    Raises:
        ValueError: mmcv is not installed.
    """
    if MODULE in sys.modules:
        return False
    if importlib.util.find_spec("mmcv") is None:
        raise ValueError(
            "mmcv is not installed: pip install 'backbone-zoo[det]' for mmdet, [seg] for mmseg."
        )
    if importlib.util.find_spec(MODULE) is not None:
        return False
    # mmengine looks the module up in the import system, so it needs a spec and a loader.
    spec = importlib.util.spec_from_file_location(MODULE, __file__)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[MODULE] = module
    spec.loader.exec_module(module)
    return True


def __getattr__(name: str) -> Callable[..., Any]:
    """Return a stand-in for an operation that is not here, which raises when it is called."""
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*_: Any, **__: Any) -> Any:
        raise NotImplementedError(
            f"mmcv's operation {name} is not among those that zoo supplies; a compiled mmcv has it."
        )

    return missing


def get_compiler_version() -> str:
    """Return what mmcv reports as its compiler."""
    return "none (operations from torchvision)"


def get_compiling_cuda_version() -> str:
    """Return the CUDA version of PyTorch, whose kernels are used."""
    return str(torch.version.cuda)


def nms(
    boxes: Float[Tensor, "n 4"], scores: Float[Tensor, " n"], iou_threshold: float, offset: int
) -> Int[Tensor, " kept"]:
    """Return the indices of the boxes that remain, best first (torchvision's suppression).

    Args:
        offset: 1 for boxes that include their last pixel, as in mmdet's first version.
    """
    precise = torch.promote_types(boxes.dtype, torch.float32)
    boxes, scores = boxes.to(precise), scores.to(precise)
    if offset:
        boxes = boxes + boxes.new_tensor([0, 0, offset, offset])
    return torchvision.ops.nms(boxes, scores, iou_threshold)


def roi_align_forward(
    input: Float[Tensor, "B C H W"],
    rois: Float[Tensor, "n 5"],
    output: Float[Tensor, "n C h w"],
    argmax_y: Tensor,
    argmax_x: Tensor,
    *,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Fill `output` with the means of the maps in the boxes (Mask R-CNN, 1703.06870, section 3).

    Args:
        rois: Image, left, top, right, bottom, in pixels of the image.
        pool_mode: 1 for the mean; the maximum (0) is not supported.
    """
    _check_mean(pool_mode)
    size = (aligned_height, aligned_width)
    scale, ratio = spatial_scale, sampling_ratio
    rois = rois.to(input.dtype)
    output.copy_(torchvision.ops.roi_align(input, rois, size, scale, ratio, aligned))


def roi_align_backward(
    grad_output: Float[Tensor, "n C h w"],
    rois: Float[Tensor, "n 5"],
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Float[Tensor, "B C H W"],
    *,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Fill `grad_input`, the gradient of the maps; the boxes have none."""
    _check_mean(pool_mode)
    grad_input.copy_(
        torch.ops.torchvision._roi_align_backward(
            grad_output,
            rois.to(grad_output.dtype),
            spatial_scale,
            aligned_height,
            aligned_width,
            *grad_input.shape,
            sampling_ratio,
            aligned,
        )
    )


def _check_mean(pool_mode: int) -> None:
    if pool_mode != 1:
        raise NotImplementedError(
            "RoIAlign supports only means here; a compiled mmcv also has maxima."
        )


def sigmoid_focal_loss_forward(
    input: Float[Tensor, "n C"],
    target: Int[Tensor, " n"],
    weight: Float[Tensor, " C"] | Float[Tensor, "0"],
    output: Float[Tensor, "n C"],
    *,
    gamma: float,
    alpha: float,
) -> None:
    """Fill `output` with the focal loss of each row and class (1708.02002, section 3).

        loss = −α_t (1 − p_t)^γ log p_t

    Args:
        target: A row's class; `C` for background.
        weight: One factor a class, or empty.
    """
    output.copy_(_focal_loss(input, target, weight, gamma, alpha))


def sigmoid_focal_loss_backward(
    input: Float[Tensor, "n C"],
    target: Int[Tensor, " n"],
    weight: Float[Tensor, " C"] | Float[Tensor, "0"],
    grad_input: Float[Tensor, "n C"],
    *,
    gamma: float,
    alpha: float,
) -> None:
    """Fill `grad_input` with each element's derivative with respect to its logit."""
    with torch.enable_grad():
        logits = input.detach().requires_grad_()
        loss = _focal_loss(logits, target, weight, gamma, alpha)
        (grad,) = torch.autograd.grad(loss.sum(), logits)
    grad_input.copy_(grad)


def _focal_loss(
    input: Tensor, target: Tensor, weight: Tensor, gamma: float, alpha: float
) -> Float[Tensor, "n C"]:
    """Return the focal loss against one-hot classes, without a column for the background."""
    precise = torch.promote_types(input.dtype, torch.float32)
    truth = F.one_hot(target, input.shape[1] + 1)[:, :-1].to(precise)
    loss = torchvision.ops.sigmoid_focal_loss(input.to(precise), truth, alpha=alpha, gamma=gamma)
    return loss * weight if weight.numel() else loss


def ms_deform_attn_forward(
    value: Float[Tensor, "B N heads C"],
    value_spatial_shapes: Int[Tensor, "levels 2"],
    value_level_start_index: Int[Tensor, " levels"],
    sampling_locations: Float[Tensor, "B queries heads levels points 2"],
    attention_weights: Float[Tensor, "B queries heads levels points"],
    *,
    im2col_step: int,
) -> Float[Tensor, "B queries D"]:
    """Attend to a few points of each level's map (Deformable DETR, 2010.04159, section 4.1).

    Args:
        value: The cells of all levels, one level after the other, each in raster order.
        sampling_locations: (column, row) as shares of the map's sides; outside of it values are 0.
        im2col_step: The chunk of the compiled kernel; not used here.
    """
    shapes = [(int(rows), int(cols)) for rows, cols in value_spatial_shapes.tolist()]
    return _attend(value, shapes, sampling_locations, attention_weights)


def ms_deform_attn_backward(
    value: Float[Tensor, "B N heads C"],
    value_spatial_shapes: Int[Tensor, "levels 2"],
    value_level_start_index: Int[Tensor, " levels"],
    sampling_locations: Float[Tensor, "B queries heads levels points 2"],
    attention_weights: Float[Tensor, "B queries heads levels points"],
    grad_output: Float[Tensor, "B queries D"],
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    *,
    im2col_step: int,
) -> None:
    """Fill the gradients of the values, the locations and the weights."""
    shapes = [(int(rows), int(cols)) for rows, cols in value_spatial_shapes.tolist()]
    with torch.enable_grad():
        inputs = [
            x.detach().requires_grad_() for x in (value, sampling_locations, attention_weights)
        ]
        output = _attend(inputs[0], shapes, inputs[1], inputs[2])
        grads = torch.autograd.grad(output, inputs, grad_output)
    outputs = (grad_value, grad_sampling_loc, grad_attn_weight)
    for out, grad in zip(outputs, grads, strict=True):
        out.copy_(grad)


def _attend(
    value: Tensor, shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Float[Tensor, "B queries D"]:
    """Return the weighted sum of bilinear samples of all levels; heads become images of a batch."""
    batch, _, heads, chs = value.shape
    queries = locations.shape[1]
    levels = value.split([rows * cols for rows, cols in shapes], dim=1)
    # grid_sample takes coordinates from -1 to 1.
    positions = (2 * locations - 1).permute(3, 0, 2, 1, 4, 5).flatten(1, 2)
    shares = weights.permute(3, 0, 2, 1, 4).flatten(1, 2).unsqueeze(2)
    output = value.new_zeros(batch * heads, chs, queries)
    for cells, (rows, cols), at, share in zip(levels, shapes, positions, shares, strict=True):
        level = cells.permute(0, 2, 3, 1).reshape(batch * heads, chs, rows, cols)
        sampled = F.grid_sample(level, at, padding_mode="zeros", align_corners=False)
        output = output + (sampled * share).sum(-1)
    return output.view(batch, heads * chs, queries).transpose(1, 2).contiguous()
