"""Selects the implementation of an op that runs, by name or as the best available, and logs it."""

import logging
import threading
from collections.abc import Callable, Mapping, Sequence

import torch
from torch.autograd import forward_ad

from zoo.errors import choose, refuse

log = logging.getLogger("zoo")

# True: usable. False: made for other inputs (another device). A string: why it is missing here.
Available = bool | str | Callable[[], bool | str]

UNTRANSFORMED = "it has no forward gradients and is not transformed by torch.func"

_used: dict[str, list[str]] = {}


class _ShapesOnly(threading.local):
    """While `on`, in this thread, kernels do not run: outputs are allocated and stay unwritten."""

    on = False

    def __enter__(self) -> None:
        self.on = True

    def __exit__(self, *_: object) -> None:
        self.on = False


shapes_only = _ShapesOnly()


def select_backend(op: str, requested: str, available: Mapping[str, Available]) -> str:
    """Return the backend of `op` to run: `requested`, or for "auto" the first that is available.

    Callables in `available` are called in their order until one is available, so that no kernel is
    built for a caller who requested another backend. Inside a transform of torch.func, and while
    forward gradients are computed, "auto" is the definition, since others have a backward of their
    own, and kernels are refused.
    Logs one line the first time an op uses a backend. Raises `UserError` where the requested one
    cannot run.
    """
    if requested != "auto":
        choose("backend", requested, ["auto", *available], kind=f"backend of {op}")
    if is_transformed():
        available = {**available, "native": UNTRANSFORMED}
        if requested == "auto":
            definition = "reference" if "reference" in available else "torch"
            available = {definition: available.get(definition, UNTRANSFORMED)}
    reasons = []
    for name in available if requested == "auto" else [requested]:
        usable = available[name]
        usable = usable() if callable(usable) else usable
        if usable is True:
            record(op, name, reasons)
            return name
        if usable:
            reasons.append(f"{name} is not available: {usable}")
    message = "; ".join(reasons) or f"{requested} does not take these inputs"
    refuse("backend", requested, f"{op} cannot run ({message})", "Use backend=auto")


def is_transformed() -> bool:
    """Whether a transform of torch.func (vmap, grad) or a level of forward gradients is open."""
    inside = torch._C._functorch.peek_interpreter_stack()  # type: ignore[attr-defined]
    return inside is not None or forward_ad._current_level >= 0


def without_values() -> bool:
    """Whether tensors are made that have no values to read or to keep: PyTorch's fake tensors."""
    fake = torch._C._TorchDispatchModeKey.FAKE  # type: ignore[attr-defined]
    return torch._C._get_dispatch_mode(fake) is not None  # type: ignore[attr-defined]


def used_backends() -> dict[str, str]:
    """Return op -> backend used since the last `reset` ("native+torch" where both were)."""
    return {op: "+".join(names) for op, names in _used.items()}


def reset() -> None:
    """Forget which backends were used: each run of a sweep has a record of its own."""
    _used.clear()


def record(op: str, name: str, reasons: Sequence[str] = ()) -> None:
    """Note that an op used a backend, and why none of those before it; logs it the first time."""
    names = _used.setdefault(op, [])
    if name in names:
        return
    names.append(name)
    if reasons:  # a faster backend is missing, which the user may be able to install
        log.warning("%s runs on its %s backend (%s)", op, name, "; ".join(reasons))
    else:
        log.info("%s runs on its %s backend", op, name)
