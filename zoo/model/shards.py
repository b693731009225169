"""Checkpoints whose tensors are written in parts, by every process its own.

A run's `checkpoints/step=<number>.ckpt` then holds, in the place of each tensor, the name that it
has in the folder `step=<number>.shards` beside it, and the hashes of that folder's files. The
folder is PyTorch's format (torch.distributed.checkpoint). Read, it is the checkpoint of whole
tensors that one process writes.
"""

import functools
import hashlib
import io
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only

HASHES = "shards"  # of a checkpoint's entries: {file: sha256}
PART = "in the shards: "  # begins what is in the place of a tensor
# What the folder's index may name: a pickle, which else could call any code.
OF_METADATA = ("Metadata", "TensorStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING")
OF_METADATA += ("ChunkStorageMetadata", "MetadataIndex", "StorageMeta")
INDEX = {("torch.distributed.checkpoint.metadata", name) for name in OF_METADATA} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    *(("pathlib", kind) for kind in ("PosixPath", "WindowsPath")),
}


def folder_of(file: Path) -> Path:
    """The folder of a checkpoint's shards."""
    return file.with_suffix(".shards")


def write(tree: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Write the parts of all tensors in `tree` that are divided; every process must call it.

    Returns the tree with their names in their place, and the hashes of the files.
    """
    parts: dict[str, Tensor] = {}
    names: dict[int, str] = {}  # by tensor: of weights that are tied, once

    def name(part: DTensor) -> str:
        if id(part) not in names:
            names[id(part)] = str(len(names))
            parts[names[id(part)]] = part.detach()
        return PART + names[id(part)]

    named = tree_map_only(DTensor, name, tree)
    save(dict(parts), checkpoint_id=folder)
    rank, hashes = dist.get_rank(), [{} for _ in range(dist.get_world_size())]
    own = [*folder.glob(f"__{rank}_*"), *([folder / ".metadata"] if rank == 0 else [])]
    dist.all_gather_object(hashes, {file.name: _hash(file) for file in own})
    return {**named, HASHES: {file: digest for those in hashes for file, digest in those.items()}}


class Unread:
    """A tensor of a folder of shards that is read, as a whole, when it is needed."""

    def __init__(self, reader: "_Reader", name: str, about: TensorStorageMetadata) -> None:
        self.reader, self.name = reader, name
        self.shape, self.dtype = about.size, about.properties.dtype

    def read(self) -> Tensor:
        found = torch.empty(self.shape, dtype=self.dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that this process alone reads
            load({self.name: found}, storage_reader=self.reader, no_dist=True)
        return found


def read(tree: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The checkpoint with whole tensors in the place of their names, on the CPU.

    Raises ValueError where a file is missing, damaged or not one that `write` writes.
    """
    known: dict[str, Tensor] = {}  # of weights that are tied, once

    def whole(one: Unread) -> Tensor:
        if one.name not in known:
            known[one.name] = one.read()
        return known[one.name]

    return tree_map_only(Unread, whole, unread(tree, folder))


def unread(tree: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The checkpoint with an `Unread` in the place of each tensor's name. ValueError as `read`."""
    for name, digest in tree[HASHES].items():
        file = folder / name
        if Path(name).name != name or not file.is_file() or _hash(file) != digest:
            raise ValueError(f"{folder.name}/{name} is missing or damaged")
    reader = _Reader(folder)
    found: dict[str, Unread] = {}
    for name, about in reader.read_metadata().state_dict_metadata.items():
        if not isinstance(about, TensorStorageMetadata):
            raise ValueError(f"{folder.name} holds more than tensors")
        found[name] = Unread(reader, name, about)

    def stored(text: str) -> Any:
        return found[text.removeprefix(PART)] if text.startswith(PART) else text

    rest = {key: value for key, value in tree.items() if key != HASHES}
    return tree_map_only(str, stored, rest)


class _Reader(FileSystemReader):
    """PyTorch's reader, which calls nothing that a folder's index names."""

    @functools.cached_property
    def index(self) -> Metadata:
        return _Index(io.BytesIO((Path(self.path) / ".metadata").read_bytes())).load()

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        return self.index


class _Index(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        numbers = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module, name) in INDEX or numbers:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"names {module}.{name}")


def _hash(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
