"""Work around a bug of torch's compiler."""

import os
import sys
from typing import Any

import torch

_PADDING = "TORCHINDUCTOR_COMPREHENSIVE_PADDING"


def keep_strides() -> None:
    """Keep the compiler of torch before 2.15 from padding rows, which can ruin gradients.

    It pads rows of more than 1,024 numbers that 64 does not divide, such as the 1,568 of the large
    models, and may then build a view with padded strides over a buffer that it has not padded
    (pytorch/pytorch#192575). FasterViT-4's backward pass read beyond the end of one and gave NaN.
    A value that the user has put into the environment stays.
    """
    if torch.__version__ >= "2.15" or _PADDING in os.environ:
        return
    os.environ[_PADDING] = "0"
    # Read once, when the compiler is first imported; importing it here would take seconds.
    config: Any = sys.modules.get("torch._inductor.config")
    if config is not None:
        config.comprehensive_padding = False
