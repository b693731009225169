"""Tensors that are not in memory yet."""

from typing import Any

import torch
from torch import Tensor


class Later:
    """A tensor that is read or computed, as a whole, when it is needed."""

    shape: torch.Size
    dtype: torch.dtype

    def read(self) -> Tensor:
        raise NotImplementedError


def read(value: Any) -> Any:
    """The tensor of a `Later`; any other value as it is."""
    return value.read() if isinstance(value, Later) else value
