"""Checks the tensors that an op is called with: shapes that fit, real numbers, one device.

Each op checks before it selects a backend, so that a wrong call is refused in one line and never
reaches a kernel, to which a tensor is no more than an address.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MAX_REMEMBERED = 4096  # calls

_passed: set[tuple] = set()


def check(op: str, shapes: Mapping[str, str], *tensors: Tensor | None) -> None:
    """Refuse a call whose `tensors` do not fit `shapes`, such as {"x": "b t>0 d", "bias": "d?"}.

    A dimension is a name, which means the same size everywhere, a number, or first of all a star:
    any dimensions, the same everywhere. The tokens "t>0" may not be none. A tensor whose dimensions
    end in a question mark may be None. Raises `TypeError` on what is not a dense tensor of real
    numbers, and `ValueError` on shapes that do not fit or tensors on several devices.
    """
    try:  # an op is called thousands of times alike
        like = (
            op,
            *[None if x is None else (x.shape, x.dtype, x.device, x.layout) for x in tensors],
        )
        if like in _passed:
            return
    except (AttributeError, TypeError):  # no tensor, or one of symbolic sizes
        like = None
    _check(op, shapes, tensors)
    if like and len(_passed) < MAX_REMEMBERED:
        _passed.add(like)


def _check(op: str, shapes: Mapping[str, str], tensors: tuple[Tensor | None, ...]) -> None:
    sizes: dict[str, int] = {}
    places: dict[torch.device, str] = {}
    leading: tuple[int, ...] | None = None
    for (name, shape), tensor in zip(shapes.items(), tensors, strict=True):
        if tensor is None and shape.endswith("?"):
            continue
        tensor = _real(op, name, tensor)
        places[tensor.device] = name
        found, dims = tuple(tensor.shape), shape.rstrip("?").replace("t>0", "t").split()
        wanted: tuple[int, ...] = ()
        if dims[0] == "*":
            dims = dims[1:]
            leading = wanted = found[: -len(dims)] if leading is None else leading
        if len(found) != len(wanted) + len(dims):
            raise ValueError(f"{op}: {name} is {found}, must be ({', '.join(dims)})")
        for dim, size in zip(dims, found[len(wanted) :], strict=True):
            wanted += (int(dim) if dim.isdigit() else sizes.setdefault(dim, size),)
        if found != wanted:
            raise ValueError(f"{op}: {name} is {found}, must be {wanted}")
        if "t>0" in shape and sizes["t"] == 0:
            raise ValueError(f"{op}: no tokens: {name} is {found}")
    if len(places) > 1:
        where = ", ".join(f"{name} on {device}" for device, name in places.items())
        raise ValueError(f"{op}: tensors lie on several devices ({where})")


def _real(op: str, name: str, tensor: Tensor | None) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} is {type(tensor).__name__}, must be a tensor")
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{op}: {name} is {tensor.dtype}, must be a floating-point type")
    if tensor.layout != torch.strided:
        raise TypeError(f"{op}: {name} is {tensor.layout}, must be a dense tensor")
    return tensor
