"""The dtype in which states are kept and scores are summed."""

import torch
from torch import Tensor


def wide_dtype(x: Tensor) -> torch.dtype:
    """Return x's own dtype, or float32 if that is wider."""
    return torch.promote_types(x.dtype, torch.float32)
