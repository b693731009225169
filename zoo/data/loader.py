"""From a token store to what a model reads: training batches, validation and evaluation text."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from zoo.data.masking import chosen_count, mask_windows
from zoo.data.order import stream_restarts, window_starts
from zoo.data.passkey import Passkeys
from zoo.data.store import TokenStore
from zoo.errors import UserError, choose, refuse, refuse_path

# (rows, tokens, generator) -> (rows, tokens): the positions of the tokens of a step's windows.
DrawPositions = Callable[[int, int, torch.Generator], Tensor]


class Steps(Dataset):
    """Item i is the i-th micro-batch that `rank` of `world` reads from `start_step` on.

    A pure function of i.
    """

    def __init__(
        self,
        store: TokenStore,
        *,
        seq_len: int,
        batch_size: int,
        seed: int,
        start_step: int,
        steps: int,
        contiguous: bool,
        rank: int,
        world: int,
        micro_batches: int,
        masked: int | None,
        draw_positions: DrawPositions | None,
        passkeys: Passkeys | None,
        bos: int | None,
    ) -> None:
        self.draw_positions, self.bos = draw_positions, bos
        self.store, self.contiguous, self.masked = store, contiguous, masked
        self.passkeys = passkeys
        self.shape = len(store), seq_len, batch_size, seed
        self.start_step, self.steps = start_step, steps
        self.rank, self.world, self.micro_batches = rank, world, micro_batches
        window_starts(*self.shape, start_step, contiguous)  # refuses a short text at once

    def __len__(self) -> int:
        return self.steps * self.micro_batches

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        done, micro, rows = dealt(index, self.rank, self.world, self.micro_batches)
        step, (_, seq_len, batch_size, seed) = self.start_step + done, self.shape
        shares = self.world * self.micro_batches
        starts = window_starts(*self.shape, step, self.contiguous)[rows]
        if self.contiguous:
            restart = stream_restarts(*self.shape, step)
        else:
            restart = np.ones(batch_size, dtype=bool)
        keys = [(seed, step, row) for row in range(batch_size)]
        mine = keys[rows]
        windows, more = _windows(self.store, starts, seq_len), {}
        if self.passkeys:
            windows = self.passkeys.plant(windows, mine)
        if self.bos is not None:
            windows[restart[rows]] = begun(windows[restart[rows]], self.bos)
        if self.draw_positions:
            more["positions"] = step_positions(
                self.draw_positions, batch_size, seq_len, seed, step
            )[rows]
        if self.masked is not None and shares > 1:
            counts = np.array([chosen_count(seq_len, key) for key in keys])
            more["weight"] = float(counts[rows].sum() * shares / counts.sum())
        return {
            **more,
            **_batch(windows, self.masked, mine),
            "restart": torch.from_numpy(restart[rows]),
            "step": step,
            "micro": micro,
        }


def dealt(index: int, rank: int, world: int, micro_batches: int) -> tuple[int, int, slice]:
    """Steps done, micro-batch, and the rows of the step that are item `index` of a rank."""
    done, micro = divmod(index, micro_batches)
    return done, micro, slice(micro * world + rank, None, world * micro_batches)


def step_positions(
    draw_positions: DrawPositions, rows: int, tokens: int, seed: int, step: int
) -> Tensor:
    """(rows, tokens): the positions of the tokens of a step's windows, drawn from (seed, step)."""
    entropy = np.random.SeedSequence([seed, step], spawn_key=(0,)).generate_state(2)
    return draw_positions(
        rows, tokens, torch.Generator().manual_seed(int(entropy.view(np.uint64)[0]))
    )


def train_loader(
    store: TokenStore,
    *,
    seq_len: int,
    batch_size: int,
    seed: int,
    start_step: int,
    steps: int,
    contiguous: bool,
    rank: int = 0,
    world: int = 1,
    micro_batches: int = 1,
    workers: int = 0,
    masked: int | None = None,
    draw_positions: DrawPositions | None = None,
    passkeys: Passkeys | None = None,
    bos: int | None = None,
) -> DataLoader:
    """The batches of `steps` optimiser steps from `start_step` on, in the order of `order`.

    A step reads `batch_size` windows, which `world` ranks and `micro_batches` share: b rows each.
    A batch: "tokens" int64 (b, seq_len + 1), of which the last seq_len are the targets; "restart"
    bool (b,), rows whose state begins anew (all, unless `contiguous`); "step" and "micro" int. Rank
    r takes the rows m * world + r :: world * micro_batches in micro-batch m, so that a step reads
    the same however it is shared. `masked`, a vocabulary's size, adds what a masked objective
    reads: "shown" int64 and "chosen" bool, (b, seq_len) each, see `masking`, and "weight", the
    tokens chosen over their mean in all of the step's batches. `draw_positions` adds "positions",
    (b, seq_len), drawn by a generator of (seed, step) for all rows; `passkeys` puts keys into some
    windows, see `passkey`; windows whose state begins anew begin with the token `bos`. Raises
    UserError where the text is too short, a window has no room for a key or the batch cannot be
    shared equally.
    """
    if batch_size % (world * micro_batches):
        rule = f"must be a multiple of {world} processes times {micro_batches} micro-batches"
        refuse("batch_size", batch_size, rule)
    dataset = Steps(
        store,
        seq_len=seq_len,
        batch_size=batch_size,
        seed=seed,
        start_step=start_step,
        steps=steps,
        contiguous=contiguous,
        rank=rank,
        world=world,
        micro_batches=micro_batches,
        masked=masked,
        draw_positions=draw_positions,
        passkeys=passkeys,
        bos=bos,
    )
    pin = torch.cuda.is_available()
    return DataLoader(dataset, batch_size=None, num_workers=workers, pin_memory=pin)


def batches_of(loader: DataLoader) -> Iterator[dict[str, Any]]:
    """The batches of a loader; what a worker of it refuses is said without the worker's traceback,
    which PyTorch writes before it."""
    try:
        yield from loader
    except UserError as error:
        line = str(error).splitlines()[-1]
        raise UserError(line.partition(f"{type(error).__name__}: ")[2] or line) from None


def begun(windows: np.ndarray, bos: int | None) -> np.ndarray:
    """Windows (..., t) whose first token, which nothing predicts, is the one that begins a text.

    They are as long as before, so that a model reads no more than it was trained on. As they are
    for None.
    """
    if bos is None:
        return windows
    windows = windows.copy()
    windows[..., 0] = bos
    return windows


def valid_batch(
    store: TokenStore,
    seq_len: int,
    count: int,
    masked: int | None = None,
    bos: int | None = None,
) -> dict[str, Tensor]:
    """One batch of `count` fixed windows spread evenly over the split, without overlap.

    Fewer than `count` where the split does not hold so many; UserError where it holds none.
    """
    windows = begun(_windows(store, _spread(store, seq_len + 1, count), seq_len), bos)
    return _batch(windows, masked, [(row,) for row in range(len(windows))])


def evaluation_text(
    store: TokenStore, unit: int, count: int, documents: str = "whole"
) -> np.ndarray:
    """int64 (n, unit + 1), n <= count: disjoint stretches of text, spread evenly over the split.

    "whole": each lies within one document; "joined": documents are read one after another, as in
    training. Raises UserError where no document ("whole") or the split ("joined") is long enough.
    """
    return _windows(store, _evaluation_starts(store, unit, count, documents), unit)


def evaluation_bytes(
    store: TokenStore, unit: int, count: int, documents: str = "whole"
) -> np.ndarray:
    """int64 (n, unit + 1): the bytes of text of each token of `evaluation_text`."""
    starts = _evaluation_starts(store, unit, count, documents)
    return np.stack([store.bytes_of(start, start + unit + 1) for start in starts])


def _evaluation_starts(store: TokenStore, unit: int, count: int, documents: str) -> np.ndarray:
    choose("documents", documents, ("whole", "joined"))
    if documents == "joined":
        return _spread(store, unit + 1, count)
    lengths = np.diff(store.offsets)
    if lengths.max() < unit + 1:
        refuse_path(
            f"data: {store.name} split",
            f"its longest document has {lengths.max():,} tokens and {unit + 1:,} are needed",
            "Use shorter lengths, or data.eval_documents=joined to read them one after another",
        )
    fit = lengths // (unit + 1)
    within = np.arange(fit.sum()) - np.repeat(np.cumsum(fit) - fit, fit)
    starts = np.repeat(store.offsets[:-1], fit) + within * (unit + 1)
    n = min(count, len(starts))
    return starts[(2 * np.arange(n) + 1) * len(starts) // (2 * n)]


def _spread(store: TokenStore, size: int, count: int) -> np.ndarray:
    """Starts of at most `count` disjoint stretches of `size` tokens, from one end to the other."""
    n = min(count, len(store) // size)
    if n < 1:
        refuse_path(
            f"data: {store.name} split",
            f"it has {len(store):,} tokens and {size:,} are needed",
            "Use shorter lengths or more text",
        )
    return np.arange(n) * (len(store) - size) // max(1, n - 1)


def _batch(
    windows: np.ndarray, masked: int | None, keys: Sequence[Sequence[int]]
) -> dict[str, Tensor]:
    batch = {"tokens": torch.from_numpy(windows)}
    if masked is None:
        return batch
    shown, chosen = mask_windows(windows[:, :-1], masked, keys)
    return batch | {"shown": torch.from_numpy(shown), "chosen": torch.from_numpy(chosen)}


def _windows(store: TokenStore, starts: np.ndarray, seq_len: int) -> np.ndarray:
    """int64 (len(starts), seq_len + 1)."""
    rows = [store.tokens[start : start + seq_len + 1] for start in starts]
    return np.stack(rows).astype(np.int64)
