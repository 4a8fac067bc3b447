"""The compiled operations that mmcv-lite lacks, from torchvision and plain PyTorch.

mmdet calls mmcv's operations, and these call a compiled module, `mmcv._ext`. The pure wheel of
mmcv has none, and its sources do not compile against recent PyTorch. `supply_ops` puts this file
in its place: the functions below have the names and the arguments that mmcv calls, most of which
are tensors to be filled. All of them run on the CPU and on a GPU.

Covered is what Cascade and plain Mask R-CNN, RetinaNet, DINO and their like need. Any other
operation says its name when it is called. Importing this file does nothing, and needs no mmcv.
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
    """Make the operations below mmcv's compiled module, unless it has one; tell whether it was so.

    Call this before mmdet's models are imported.

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
    # mmengine asks the import system whether the module is there: it needs a spec and a loader.
    spec = importlib.util.spec_from_file_location(MODULE, __file__)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[MODULE] = module
    spec.loader.exec_module(module)
    return True


def __getattr__(name: str) -> Callable[..., Any]:
    """Return an operation that is not here in a form that can be looked up, but not called."""
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*_: Any, **__: Any) -> Any:
        raise NotImplementedError(
            f"mmcv's operation {name} is not among those that zoo supplies; a compiled mmcv has it."
        )

    return missing


def get_compiler_version() -> str:
    """Say that nothing was compiled, where mmcv reports its environment."""
    return "none (operations from torchvision)"


def get_compiling_cuda_version() -> str:
    """Return the CUDA version of the PyTorch whose kernels run."""
    return str(torch.version.cuda)


def nms(
    boxes: Float[Tensor, "n 4"], scores: Float[Tensor, " n"], iou_threshold: float, offset: int
) -> Int[Tensor, " kept"]:
    """Return the rows of the boxes that stay, best first (torchvision's suppression).

    Args:
        offset: 1 for boxes whose last pixel lies inside, as in mmdet's first version.
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
        pool_mode: 1, the mean; the maximum (0) is not here.
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
            grad_output, rois.to(grad_output.dtype), spatial_scale, aligned_height, aligned_width,
            *grad_input.shape, sampling_ratio, aligned,
        )
    )  # fmt: skip


def _check_mean(pool_mode: int) -> None:
    if pool_mode != 1:
        raise NotImplementedError("RoIAlign takes means here, no maxima; a compiled mmcv has both.")


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
    """Fill `grad_input` with each element's derivative by its own logit."""
    with torch.enable_grad():
        logits = input.detach().requires_grad_()
        loss = _focal_loss(logits, target, weight, gamma, alpha)
        (grad,) = torch.autograd.grad(loss.sum(), logits)
    grad_input.copy_(grad)


def _focal_loss(
    input: Tensor, target: Tensor, weight: Tensor, gamma: float, alpha: float
) -> Float[Tensor, "n C"]:
    """Count each row's class as 1 and the others as 0, background's own column left out."""
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
        sampling_locations: Across and down, as parts of the map's sides; outside it all is 0.
        im2col_step: The compiled kernel's chunk; of no meaning here.
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
    """Fill the gradients of the values, the places and the weights."""
    shapes = [(int(rows), int(cols)) for rows, cols in value_spatial_shapes.tolist()]
    with torch.enable_grad():
        inputs = [
            x.detach().requires_grad_() for x in (value, sampling_locations, attention_weights)
        ]
        output = _attend(inputs[0], shapes, inputs[1], inputs[2])
        grads = torch.autograd.grad(output, inputs, grad_output)
    for place, grad in zip((grad_value, grad_sampling_loc, grad_attn_weight), grads, strict=True):
        place.copy_(grad)


def _attend(
    value: Tensor, shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Float[Tensor, "B queries D"]:
    """Sample each level's map bilinearly, heads as images of a batch; then weigh and add."""
    batch, _, heads, chs = value.shape
    queries = locations.shape[1]
    levels = value.split([rows * cols for rows, cols in shapes], dim=1)
    # grid_sample's sides run from -1 to 1.
    places = (2 * locations - 1).permute(3, 0, 2, 1, 4, 5).flatten(1, 2)
    shares = weights.permute(3, 0, 2, 1, 4).flatten(1, 2).unsqueeze(2)
    output = value.new_zeros(batch * heads, chs, queries)
    for cells, (rows, cols), place, share in zip(levels, shapes, places, shares, strict=True):
        level = cells.permute(0, 2, 3, 1).reshape(batch * heads, chs, rows, cols)
        sampled = F.grid_sample(level, place, padding_mode="zeros", align_corners=False)
        output = output + (sampled * share).sum(-1)
    return output.view(batch, heads * chs, queries).transpose(1, 2).contiguous()
