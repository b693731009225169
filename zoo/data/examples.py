"""Synthetic tasks as data: what training, validation and measurements read of one.

Nothing is stored. The examples of a training step are a function of (seed, step), those that are
measured of their own seed and length; the splits share no random numbers.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from zoo.data.loader import DrawPositions, dealt, step_positions
from zoo.data.synthetic import NO_LABEL, Examples, check_task

SPLITS = ("train", "valid", "test")
AUDITED_ROWS = 16
STREAM = 0x7A5C  # sets these random numbers apart from others of the same (seed, step)


@dataclass(frozen=True)
class SyntheticData:
    """A task under its settings; `symbols` and `answers` as in `Examples`."""

    name: str
    task: partial[Examples]
    length: int  # that it is trained at
    symbols: int
    answers: int
    tokenizer_name: str = "symbols"

    @property
    def vocab_size(self) -> int:
        return self.symbols

    @property
    def fingerprint(self) -> str:
        """sha256 of the task and its settings: equal means the same examples at every seed."""
        what = [self.task.func.__qualname__, self.task.keywords]
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()

    @property
    def summary(self) -> dict[str, int]:
        return {"symbols": self.symbols, "answers": self.answers}

    def examples(self, split: str, seed: int, step: int, rows: int, length: int) -> Examples:
        """The rows of one step of a split. Raises UserError for a length the task cannot have."""
        key = [SPLITS.index(split), seed, step, STREAM]
        return self.task(np.random.default_rng(key), rows, length)

    def text(self, split: str) -> Int[np.ndarray, " t"]:
        """The tokens of some examples of a split, one after another."""
        return self.examples(split, 0, 0, AUDITED_ROWS, self.length).tokens.reshape(-1)

    def batch(self, split: str, seed: int, step: int, rows: int, length: int) -> dict[str, Tensor]:
        """Those rows as tensors: "tokens" and "labels", int64 (rows, length)."""
        examples = self.examples(split, seed, step, rows, length)
        return {
            "tokens": torch.from_numpy(examples.tokens),
            "labels": torch.from_numpy(examples.labels),
        }


def open_synthetic(name: str, task: partial[Examples], length: int) -> SyntheticData:
    """The task under its settings. Raises UserError where it cannot have them, or the `length`."""
    sample = check_task(name, task, length)
    return SyntheticData(name, task, length, sample.symbols, sample.answers)


class ExampleSteps(Dataset):
    """Item i is the i-th micro-batch that `rank` of `world` reads from `start_step` on, dealt as
    `zoo.data.loader.train_loader` deals windows."""

    def __init__(
        self,
        data: SyntheticData,
        *,
        seq_len: int,
        batch_size: int,
        seed: int,
        start_step: int,
        steps: int,
        rank: int = 0,
        world: int = 1,
        micro_batches: int = 1,
        draw_positions: DrawPositions | None = None,
    ) -> None:
        self.data, self.draw_positions, self.shape = data, draw_positions, (batch_size, seq_len)
        self.seed, self.start_step, self.steps = seed, start_step, steps
        self.rank, self.world, self.micro_batches = rank, world, micro_batches

    def __len__(self) -> int:
        return self.steps * self.micro_batches

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        done, micro, mine = dealt(index, self.rank, self.world, self.micro_batches)
        step, shares = self.start_step + done, self.world * self.micro_batches
        batch = self.data.batch("train", self.seed, step, *self.shape)
        counts = (batch["labels"] != NO_LABEL).sum(1)
        if self.draw_positions:
            batch["positions"] = step_positions(self.draw_positions, *self.shape, self.seed, step)
        found: dict[str, Any] = {name: rows[mine] for name, rows in batch.items()}
        if shares > 1:
            found["weight"] = float(counts[mine].sum() * shares / counts.sum())
        return found | {"step": step, "micro": micro}


def example_loader(data: SyntheticData, *, workers: int = 0, **shape: Any) -> DataLoader:
    """The batches of `ExampleSteps`: "tokens" and "labels", int64 (b, seq_len); "step" and "micro";
    "positions" with `draw_positions`; "weight", labels over their mean per batch of the step."""
    dataset = ExampleSteps(data, **shape)
    pin = torch.cuda.is_available()
    return DataLoader(dataset, batch_size=None, num_workers=workers, pin_memory=pin)
