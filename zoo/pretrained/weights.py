"""Opens a checkpoint's tensors without copying them: safetensors, in one file or in shards.

Tensors are views of the mapped files, so that opening costs no memory beyond the pages that are
read. Nothing is unpickled and nothing is downloaded.
"""

import functools
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.errors import UserError, refuse
from zoo.runs.files import as_it_is

if TYPE_CHECKING:  # torch takes seconds, and what is refused is refused at once
    import torch
    from torch import Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
WHOLE = "Download the whole checkpoint again"
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file. UserError where there is none, or it is damaged."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        rule = f"{file.name} cannot be read ({error.strerror})"
        refuse("checkpoint", file.parent, rule, "Give the folder of a checkpoint")
    except (ValueError, RecursionError):
        refuse("checkpoint", file.parent, f"{file.name} is damaged (it is not JSON)", WHOLE)
    if not isinstance(found, dict):
        refuse("checkpoint", file.parent, f"{file.name} is damaged (it holds no object)", WHOLE)
    return found


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder, in the order of their names.

    Raises UserError where there are none or a shard is missing.
    """
    if (folder / INDEX).is_file():
        placed = read_json(folder / INDEX).get("weight_map")
        if not isinstance(placed, dict) or not all(isinstance(v, str) for v in placed.values()):
            refuse("checkpoint", folder, f"{INDEX} is damaged (it has no weight_map)", WHOLE)
        names = sorted({*placed.values()})
        if any(Path(name).name != name for name in names):
            refuse("checkpoint", folder, f"{INDEX} names files outside the folder", WHOLE)
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise UserError(
                f"checkpoint={folder}: {len(missing)} of {len(names)} shards are missing, such as "
                f"{missing[0]}. Put the whole checkpoint there."
            )
        return [folder / name for name in names]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if found := sorted(folder.glob("*.bin")):
        raise UserError(
            f"checkpoint={folder}: {found[0].name} is a pickle, which can run code when it is "
            "read. Save the model as safetensors."
        )
    raise UserError(f"checkpoint={folder}: no {SINGLE} and no {INDEX}. Give a checkpoint's folder.")


def stored_dtype(folder: Path) -> str:
    """The dtype of most of a checkpoint's numbers by PyTorch's name: "bfloat16". Reads headers.

    Raises UserError where a file is missing or damaged.
    """
    counts: dict[str, int] = {}
    for path in weight_files(folder):
        try:
            with path.open("rb") as file:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            parts = [one for name, one in header.items() if name != "__metadata__"]
            for one in parts:
                begin, end = one["data_offsets"]
                counts[one["dtype"]] = counts.get(one["dtype"], 0) + end - begin
        except (OSError, ValueError, LookupError, TypeError, MemoryError, OverflowError):
            refuse("checkpoint", folder, f"{path.name} is damaged (its header)", WHOLE)
    most = max(counts, key=lambda one: counts[one], default="F32")
    if most not in DTYPES:
        rule = f"its weights are {most}, and {', '.join(DTYPES)} are read"
        refuse("checkpoint", folder, rule, "Use a checkpoint in one of these")
    return DTYPES[most]


def open_weights(folder: Path, dtype: "torch.dtype | None" = None) -> "dict[str, Tensor]":
    """Every tensor of a checkpoint folder by its name, in `dtype`.

    Those that are stored in it are mapped from the files, the others are converted one by one, each
    from a mapping of its own, whose pages go with it; with None all are mapped, in their own dtype.
    What is stored in another dtype than DTYPES has keeps it.
    Raises UserError where a file is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    tensors, kept = {}, str(dtype).removeprefix("torch.")
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt") as opened:
                names = {name: opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118 (no mapping)
                for name, stored in names.items():
                    if dtype is None or DTYPES.get(stored, kept) == kept:
                        tensors[name] = opened.get_tensor(name)
            for name in names:
                if name not in tensors:
                    with safe_open(file, framework="pt") as opened:
                        tensors[name] = opened.get_tensor(name).to(dtype)
        except (SafetensorError, OSError, ValueError) as error:
            line = str(error).splitlines()[0]
            refuse("checkpoint", folder, f"{file.name} is damaged ({line})", WHOLE)
    return tensors


def digest_files(files: list[Path]) -> str:
    """sha256 over the files' contents, in their order; of the same files read once."""
    return _digest(tuple(map(as_it_is, files)))


@functools.cache
def _digest(files: tuple[tuple[Path, int, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for path, *_ in files:
        with open(path, "rb") as file:
            while block := file.read(2**22):
                digest.update(block)
    return digest.hexdigest()
