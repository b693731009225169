"""Which implementation of an op runs: chosen by name or as the best there is, and said aloud."""

import logging
from collections.abc import Callable, Mapping

from zoo.errors import UserError, choose

log = logging.getLogger("zoo")

# True: usable. False: made for other inputs (another device). A string: why it is missing here.
Available = bool | str | Callable[[], bool | str]

_used: dict[str, list[str]] = {}


def select_backend(op: str, requested: str, available: Mapping[str, Available]) -> str:
    """The backend of `op` to run: `requested`, or for "auto" the first of `available` that can.

    Callables in `available` are asked only when it comes to them, so that a kernel is not built
    for someone who wants another. Logs one line the first time an op uses a backend.
    Raises `UserError` where the requested one cannot run.
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
    raise UserError(
        f"{op}: " + ("; ".join(reasons) or f"backend {requested!r} does not take these inputs")
    )


def used_backends() -> dict[str, str]:
    """Op -> backend used since the last `reset` ("native+torch" where both were)."""
    return {op: "+".join(names) for op, names in _used.items()}


def reset() -> None:
    """Begin a new record; each run of a sweep has its own."""
    _used.clear()


def _record(op: str, name: str, reasons: list[str]) -> None:
    names = _used.setdefault(op, [])
    if name in names:
        return
    names.append(name)
    if reasons:  # something better was passed over: the user may want to mend that
        log.warning("%s runs on its %s backend (%s)", op, name, "; ".join(reasons))
    else:
        log.info("%s runs on its %s backend", op, name)
