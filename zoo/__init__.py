"""A zoo of sequence architectures, compared on length extrapolation: train short, test long.

From Python: `zoo.load`, `zoo.rows` and `zoo.write_report` (see zoo/api.py), which are imported when
they are used: `import zoo` itself costs nothing.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zoo.api import load, rows, write_report

__all__ = ["load", "rows", "write_report"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from zoo import api

        return getattr(api, name)
    raise AttributeError(f"module 'zoo' has no attribute {name!r}")
