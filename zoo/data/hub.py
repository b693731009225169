"""Data sets by the package datasets: of the Hugging Face hub, streamed, or from a local folder."""

import importlib
import itertools
import os
import threading
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from zoo.data.files import SPLITS, Documents, text_fault
from zoo.data.records import document_of, require_package
from zoo.data.splits import split_documents, without_copies
from zoo.errors import UserError

PG19 = "emozilla/pg19"  # parquet; the original deepmind/pg19 is a script that no longer loads
PATIENCE = 2.0  # seconds for the hub to answer
ALIASES = {"valid": ("validation", "valid", "dev")}  # what others call our splits
SAVED = ("dataset_dict.json", "state.json")  # a folder that `save_to_disk` wrote


def pg19_documents(count: int | None) -> dict[str, Documents]:
    """The first `count` books of each split of PG-19 (Rae 2019, arXiv 1911.05507)."""
    require_hub("pg19", PG19)
    names = {"train": "train", "valid": "validation", "test": "test"}
    return {split: _pg19_stream(names[split], count) for split in SPLITS}


def _pg19_stream(split: str, count: int | None) -> Iterator[tuple[str, bytes]]:
    try:
        books = importlib.import_module("datasets").load_dataset(PG19, split=split, streaming=True)
        for number, book in enumerate(itertools.islice(books, count)):
            document = book["text"].encode()
            if document and text_fault(document) is None:
                yield f"{split}/{number} {book.get('short_book_title', '')}".rstrip(), document
    except Exception as error:  # of the library, its file systems or the network
        raise _failed(f"data=pg19: reading {PG19} ({split})", error) from error


def dataset_documents(dataset: str, field: str, count: int | None) -> dict[str, Documents]:
    """The documents of a data set, the first `count` of each of its splits.

    Splits are its own where it has three, else those of all its documents by their content.
    """
    check_dataset(dataset)
    names = _split_names(dataset)
    found = {ours: _own(ours, names) for ours in SPLITS}
    if all(found.values()):
        reads = {s: partial(_rows, dataset, str(name), field, count) for s, name in found.items()}
        return without_copies(reads)
    every = lambda: itertools.chain.from_iterable(  # noqa: E731
        _rows(dataset, name, field, count) for name in names
    )
    return split_documents(every, dataset)


def check_dataset(dataset: str) -> None:
    """Refuse early: the package is missing, or the hub that a name needs is out of reach."""
    if os.path.isdir(os.path.expanduser(dataset)):
        require_package("datasets", f"data.dataset={dataset}")
    else:
        require_hub("hf", dataset)


def _own(ours: str, names: list[str]) -> str | None:
    return next((name for name in ALIASES.get(ours, (ours,)) if name in names), None)


def _load(dataset: str) -> Mapping[str, Any]:
    """The splits of a data set by name, streamed."""
    library, folder = importlib.import_module("datasets"), Path(os.path.expanduser(dataset))
    if any((folder / name).is_file() for name in SAVED):
        loaded = library.load_from_disk(str(folder))
        return loaded if isinstance(loaded, Mapping) else {"train": loaded}
    return library.load_dataset(str(folder) if folder.is_dir() else dataset, streaming=True)


def _split_names(dataset: str) -> list[str]:
    try:
        return sorted(_load(dataset))
    except Exception as error:
        raise _failed(f"data.dataset={dataset}: opening it", error) from error


def _rows(dataset: str, split: str, field: str, count: int | None) -> Documents:
    try:
        for number, record in enumerate(itertools.islice(_load(dataset)[split], count)):
            if document := document_of(record, field, f"{dataset} {split}:{number}"):
                yield f"{split}:{number}", document
    except UserError:
        raise
    except Exception as error:  # of the library, its file systems or the network
        raise _failed(f"data.dataset={dataset}: reading {split}", error) from error


def _failed(what: str, error: Exception) -> UserError:
    reason = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(".")
    return UserError(f"{what} failed: {reason}. Try again, or use data=text.")


def require_hub(name: str, dataset: str) -> None:
    """Raise UserError within `PATIENCE` seconds unless the data set can be streamed from here."""
    from urllib.request import urlopen  # a third of this module's import time, for this one use

    require_package("datasets", f"data={name}")
    for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        if os.environ.get(variable, "").upper() in {"1", "ON", "YES", "TRUE"}:
            raise UserError(
                f"data={name}: streams from the network, but {variable} is set. Unset it, or use "
                "data=text."
            )
    url = f"{os.environ.get('HF_ENDPOINT', 'https://huggingface.co')}/api/datasets/{dataset}"
    outcome: list[str] = []

    def resolve() -> None:
        try:
            with urlopen(url, timeout=PATIENCE):
                outcome.append("")
        except (OSError, ValueError) as error:
            outcome.append(str(error))

    probe = threading.Thread(
        target=resolve, daemon=True
    )  # name resolution has no timeout of its own
    probe.start()
    probe.join(PATIENCE)
    if outcome != [""]:
        reason = outcome[0] if outcome else f"no answer in {PATIENCE:.0f} s"
        raise UserError(
            f"data={name}: streams from the network, but {url} is out of reach ({reason}). "
            "Connect, or use data=text."
        )
