"""Divides documents that no folder has divided into training, validation and test splits.

Valid and test get 5 % of the bytes each. A document is in one split only, and so are its copies.
"""

import hashlib
import itertools
import logging
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from zoo.data.files import SPLITS, Documents, Files, check_text, opened
from zoo.errors import refuse_path

HELD_OUT = 0.05  # share of the bytes for each of valid and test
MAX_DOCUMENT = 2**24  # bytes of a document that is cut from a single file
BLOCK = 2**20

log = logging.getLogger("zoo")


def split_files(root: Path, files: Iterable[Path], held_out: int = 0) -> dict[str, list[Path]]:
    """Divide whole files, in the order of a hash of their names relative to `root`.

    Test, then valid take files until they hold 5 % of the bytes and at least `held_out`; each
    split gets one file or more. A file stays in its split when others come and go, but for the few
    at the edges. Needs at least three files.
    """

    def name(path: Path) -> bytes:
        return os.fsencode(path.relative_to(root).as_posix())

    ranked = sorted(files, key=lambda path: hashlib.sha256(name(path)).digest())
    goal = max(held_out, HELD_OUT * sum(path.stat().st_size for path in ranked))
    splits: dict[str, list[Path]] = {split: [] for split in SPLITS}
    for split, reserved in (("test", 2), ("valid", 1)):  # one for each split still to be served
        size = 0
        while not splits[split] or (size < goal and len(ranked) > reserved):
            splits[split].append(ranked.pop())
            size += splits[split][-1].stat().st_size
    splits["train"] = ranked
    _warn_of_little(root, (path.stat().st_size for path in ranked), goal / HELD_OUT)
    return {split: sorted(paths) for split, paths in splits.items()}


def split_one_file(files: Files, path: Path) -> dict[str, Documents]:
    """Divide one file into three stretches: the first 90 % train, then valid and test.

    They begin at a paragraph, or at a line where there is none. Documents are named by their bytes,
    `a.txt[0:900]`, and longer stretches are cut into documents of about 16 MiB.
    """
    with opened(path) as file:
        size = 0
        while block := file.read(BLOCK):
            size += len(block)
    edges = [0]
    for share in (1 - 2 * HELD_OUT, 1 - HELD_OUT):
        start = int(share * size)
        with opened(path) as file:
            file.seek(start)
            edges.append(start + _paragraph(file.read(BLOCK), 0))
    edges.append(size)
    if not all(start < stop for start, stop in itertools.pairwise(edges)):
        advice = "Give a longer file, or a folder with at least 3"
        refuse_path(path, f"has {size} bytes, too few to cut into three splits", advice)
    stretches = zip(SPLITS, edges, edges[1:], strict=False)
    return {split: _stretch(files, path, start, stop) for split, start, stop in stretches}


def _stretch(files: Files, path: Path, start: int, stop: int) -> Iterator[tuple[str, bytes]]:
    with opened(path) as file:
        file.seek(start)
        held, left = b"", stop - start
        while held or left:
            more = file.read(min(left, MAX_DOCUMENT + BLOCK - len(held)))
            if left and not more:  # as often as it is read
                refuse_path(path, "became shorter while it was read", "Use the same command again")
            held += more
            left = stop - file.tell()
            cut = len(held) if len(held) <= MAX_DOCUMENT else _paragraph(held, MAX_DOCUMENT)
            document, held = held[:cut], held[cut:]
            check_text(path, document, start=start)
            yield f"{files.name(path)}[{start}:{start + cut}]", document
            start += cut


def _paragraph(block: bytes, at: int) -> int:
    """Where the next paragraph begins from `at` on: else a line, a word, or a character."""
    for separator in (b"\n\n", b"\n", b" "):
        if (found := block.find(separator, at)) >= 0:
            return found + len(separator)
    inside = (i for i in range(at, len(block)) if block[i] & 0xC0 != 0x80)
    return next(inside, len(block))


def split_documents(read: Callable[[], Documents], name: str) -> dict[str, Documents]:
    """Divide documents by a hash of their content; of copies the first counts.

    `read()` begins anew each time: one pass finds the hashes (17 bytes of memory a document), and
    each split is a pass of its own. UserError where there are fewer than three documents.
    """
    import numpy as np

    keys, sizes = array("Q"), array("Q")
    for _, document in read():
        keys.append(_key(document))
        sizes.append(len(document))
    unique, first = np.unique(np.array(keys, dtype=np.uint64), return_index=True)
    if len(unique) < len(SPLITS):
        advice = "Give at least 3, or folders train, valid and test"
        refuse_path(name, f"has {len(unique)} different documents", advice)
    if repeated := len(keys) - len(unique):
        log.info("%d documents repeat others and are left out", repeated)
    lengths = np.array(sizes, dtype=np.int64)[first][::-1]  # of the highest key first
    goal = HELD_OUT * lengths.sum()
    tests = min(int(np.searchsorted(lengths.cumsum(), goal)) + 1, len(unique) - 2)
    rest = lengths[tests:].cumsum()
    valids = min(int(np.searchsorted(rest, goal)) + 1, len(unique) - tests - 1)
    _warn_of_little(name, lengths[tests + valids :], goal / HELD_OUT)
    bounds = [0, len(unique) - tests - valids, len(unique) - tests, len(unique)]

    def part(start: int, stop: int) -> Iterator[tuple[str, bytes]]:
        written = np.zeros(len(unique), dtype=bool)
        for label, document in read():
            rank = int(np.searchsorted(unique, np.uint64(_key(document))))
            if start <= rank < stop and not written[rank]:
                written[rank] = True
                yield label, document

    pairs = zip(SPLITS, bounds, bounds[1:], strict=False)
    return {split: part(start, stop) for split, start, stop in pairs}


def _warn_of_little(name: object, train: Iterable[int], whole: float) -> None:
    """Say where one long document leaves little of so many bytes to train on."""
    if (share := sum(map(int, train)) / max(whole, 1)) < 0.5:
        log.warning(
            "%s: %.1f%% of the bytes are left to train on, as documents are divided whole. Give "
            "folders train, valid and test to divide them otherwise",
            *(name, 100 * share),
        )


def without_copies(splits: Mapping[str, Callable[[], Documents]]) -> dict[str, Documents]:
    """Leave out what is in another split too, so that given splits share no document.

    Each is to be read anew. What is in valid leaves test, and what is in either leaves train.
    """
    first = {"valid": [], "test": ["valid"], "train": ["valid", "test"]}

    def part(split: str) -> Iterator[tuple[str, bytes]]:
        known = {_key(document) for other in first[split] for _, document in splits[other]()}
        dropped = 0
        for name, document in splits[split]():
            if _key(document) in known:
                dropped += 1
            else:
                yield name, document
        if dropped:
            others = " or ".join(first[split])
            log.info("%d documents of %s are in %s and are left out", dropped, split, others)

    return {split: part(split) for split in SPLITS}


def _key(document: bytes) -> int:
    return int.from_bytes(hashlib.sha256(document).digest()[:8], "little")
