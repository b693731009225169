"""Selects the implementation of an op that runs, by name or as the best available, and logs it."""

import logging
import threading
from collections.abc import Callable, Mapping

from zoo.errors import choose, refuse

log = logging.getLogger("zoo")

# True: usable. False: made for other inputs (another device). A string: why it is missing here.
Available = bool | str | Callable[[], bool | str]

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
    built for a caller who requested another backend. Logs one line the first time an op uses a
    backend. Raises `UserError` where the requested one cannot run.
    """
    choose("backend", requested, ["auto", *available], kind=f"backend of {op}")
    reasons = []
    for name in available if requested == "auto" else [requested]:
        usable = available[name]
        usable = usable() if callable(usable) else usable
        if usable is True:
            _record(op, name, reasons)
            return name
        if usable:
            reasons.append(f"{name} is not available: {usable}")
    message = "; ".join(reasons) or f"{requested} does not take these inputs"
    refuse("backend", requested, f"{op} cannot run ({message})", "Use backend=auto")


def used_backends() -> dict[str, str]:
    """Return op -> backend used since the last `reset` ("native+torch" where both were)."""
    return {op: "+".join(names) for op, names in _used.items()}


def reset() -> None:
    """Forget which backends were used: each run of a sweep has a record of its own."""
    _used.clear()


def _record(op: str, name: str, reasons: list[str]) -> None:
    names = _used.setdefault(op, [])
    if name in names:
        return
    names.append(name)
    if reasons:  # a faster backend is missing, which the user may be able to install
        log.warning("%s runs on its %s backend (%s)", op, name, "; ".join(reasons))
    else:
        log.info("%s runs on its %s backend", op, name)
