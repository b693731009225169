"""Numbers that layers find of their own accuracy while a task reads, for its rows.

A layer names them in its class: `diagnostics` is {field of a row: attribute}, such as how far the
last inverse of an iteration was from one. Of all layers and calls the largest counts.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn


class Largest:
    """The largest of each number since the last row that was made of new calls."""

    def __init__(self) -> None:
        self._found: dict[str, float] = {}
        self._reported = False

    def add(self, layer: nn.Module, *_: Any) -> None:
        """Take the numbers of a layer's call."""
        if self._reported:
            self._found, self._reported = {}, False
        for field, attribute in layer.diagnostics.items():  # type: ignore[union-attr]
            if (value := getattr(layer, attribute)) is not None:
                self._found[field] = max(float(value), self._found.get(field, 0.0))

    def fields(self) -> dict[str, float]:
        """The fields of a row: those of the calls it was made of, also where several rows are made
        of the same."""
        self._reported = True
        return dict(self._found)


@contextmanager
def diagnosed(model: nn.Module) -> Iterator[Largest]:
    """Collect the numbers of every layer that has some, of each of its calls."""
    found = Largest()
    layers = [layer for layer in model.modules() if getattr(layer, "diagnostics", None)]
    hooks = [layer.register_forward_hook(partial(Largest.add, found)) for layer in layers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
