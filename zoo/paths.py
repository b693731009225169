"""Where the package lies, and what is shipped with it."""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
ROOT = PACKAGE.parent


def shipped(folder: str) -> Path:
    """A folder of ours that is no code: inside the package in a wheel, beside it in a checkout."""
    inside = PACKAGE / f"_{folder}"
    return inside if inside.is_dir() else ROOT / folder
