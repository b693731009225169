"""Checkpoints of tensors that are divided among processes: whole, or each process's own parts.

In parts, a run's `checkpoints/step=<number>.ckpt` holds, in the place of each tensor, the name that
it has in the folder `step=<number>.shards` beside it, and the hashes of that folder's files. The
folder is PyTorch's format (torch.distributed.checkpoint). Read, it is the checkpoint of whole
tensors that one process writes.
"""

import functools
import io
import mmap
import os
import pickle
import shutil
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor
from torch.serialization import set_default_mmap_options, skip_data
from torch.utils._pytree import tree_leaves, tree_map_only

from zoo.errors import refuse_path
from zoo.model.later import Later
from zoo.runs.checkpoints import PART
from zoo.runs.files import file_hash, one_line

HASHES = "shards"  # of a checkpoint's entries: {file: sha256}
BLOCK_BYTES = 2**20
# Of an archive (APPNOTE.TXT of PKWARE, sections 4.3.7 and 4.3.12): where in an entry's own header
# the lengths of its name and of what follows begin; where in the directory its checksum does; and
# the directory's bytes for it without these.
LENGTHS, CHECKSUM, ENTRY_BYTES = 26, 16, 46
# What the folder's index may name: a pickle, which else could call any code.
OF_METADATA = ("Metadata", "TensorStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING")
OF_METADATA += ("ChunkStorageMetadata", "MetadataIndex", "StorageMeta")
INDEX = {("torch.distributed.checkpoint.metadata", name) for name in OF_METADATA} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    *(("pathlib", kind) for kind in ("PosixPath", "WindowsPath")),
}


def write(tree: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Write the parts of all tensors in `tree` that are divided; every process must call it.

    What was in the folder before is gone: a killed run may have left parts of more processes.
    Returns the tree with their names in their place, and the hashes of the files. UserError, in
    every process, where one cannot write.
    """
    parts: dict[str, Tensor] = {}
    names: dict[int, str] = {}  # by tensor: of weights that are tied, once

    def name(part: DTensor) -> str:
        if id(part) not in names:
            names[id(part)] = str(len(names))
            parts[names[id(part)]] = part.detach()
        return PART + names[id(part)]

    named = tree_map_only(DTensor, name, tree)
    if dist.get_rank() == 0 and folder.exists():
        shutil.rmtree(folder)
    dist.barrier()
    try:
        save(dict(parts), checkpoint_id=folder)
    except CheckpointException as error:  # no Exception: what expects one would let it pass
        rule = f"cannot be written ({_first_failure(error)})"
        refuse_path(folder, rule, "Free some space, or choose another folder")
    rank, hashes = dist.get_rank(), [{} for _ in range(dist.get_world_size())]
    own = [*folder.glob(f"__{rank}_*"), *([folder / ".metadata"] if rank == 0 else [])]
    dist.all_gather_object(hashes, {file.name: file_hash(file) for file in own})
    return {**named, HASHES: {file: digest for those in hashes for file, digest in those.items()}}


def _first_failure(error: CheckpointException) -> str:
    """What a process says of why it failed, in one line."""
    chain: list[BaseException] = [next(iter(error.failures.values()))[0]]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    return one_line(next((one for one in chain if isinstance(one, OSError)), chain[0]))


def write_whole(tree: dict[str, Any], file: BinaryIO | None) -> None:
    """Write the whole tensors of `tree`, of which every process has parts, as one process does.

    A file of the same size is written first, and filled with one tensor after another, so that no
    process has more than one whole tensor in memory. Every process must call it.

    Args:
        file: open for reading and writing, in the first process; None in the others.
    """
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    places = {id(x): place for place, x in enumerate(tensors)}  # of weights that are tied, one
    stored = _laid_out(tree, file) if file else None
    for place in places.values():
        x = tensors[place].detach()
        whole = x.full_tensor() if isinstance(x, DTensor) else x
        if stored:
            stored[place].copy_(whole)
        del whole  # before the next one is put together
    if file:
        del stored
        _correct_checksums(file)


def _laid_out(tree: dict[str, Any], file: BinaryIO) -> list[Tensor]:
    """The tensors of a file of `tree`, without values yet: written to, they change the file."""
    empty: dict[int, Tensor] = {}  # memory that is not written to takes none

    def without_values(x: Tensor) -> Tensor:
        return empty.setdefault(id(x), torch.empty(x.shape, dtype=x.dtype))

    with skip_data():
        torch.save(tree_map_only(Tensor, without_values, tree), file)
    file.flush()
    if hasattr(os, "posix_fallocate"):  # where a disk that is full is found before it is written to
        os.posix_fallocate(file.fileno(), 0, file.tell())
    with set_default_mmap_options(mmap.MAP_SHARED):
        mapped = torch.load(file.name, weights_only=True, mmap=True)
    return [leaf for leaf in tree_leaves(mapped) if isinstance(leaf, Tensor)]


def _correct_checksums(file: BinaryIO) -> None:
    """Give the directory of an archive, which ends `file`, the checksums of what was filled in."""
    with zipfile.ZipFile(file) as archive:
        at, entries = archive.start_dir, archive.infolist()
    for entry in entries:
        file.seek(entry.header_offset + LENGTHS)
        name, extra = (int.from_bytes(file.read(2), "little") for _ in range(2))
        file.seek(entry.header_offset + LENGTHS + 4 + name + extra)
        checksum, left = 0, entry.file_size
        while left:
            block = file.read(min(left, BLOCK_BYTES))
            assert block
            checksum, left = zlib.crc32(block, checksum), left - len(block)
        file.seek(at + CHECKSUM)
        file.write(checksum.to_bytes(4, "little"))
        at += ENTRY_BYTES + len(entry.filename.encode()) + len(entry.extra) + len(entry.comment)


class Unread(Later):
    """A tensor of a folder of shards that is read, as a whole, when it is needed."""

    def __init__(self, reader: "_Reader", name: str, about: TensorStorageMetadata) -> None:
        self.reader, self.name = reader, name
        self.shape, self.dtype = about.size, about.properties.dtype

    def read(self) -> Tensor:
        found = torch.empty(self.shape, dtype=self.dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that this process alone reads
            try:
                load({self.name: found}, storage_reader=self.reader, no_dist=True)
            except CheckpointException as error:
                raise ValueError(f"{self.name}: {_first_failure(error)}") from None
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
        if Path(name).name != name or not file.is_file() or file_hash(file) != digest:
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
