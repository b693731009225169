"""The training and validation data of a run, as its processes read it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
from torch import Tensor

from zoo.config.schema.data import Data
from zoo.config.schema.train import TrainConfig
from zoo.data.corpora import Corpus, open_corpus
from zoo.data.examples import SyntheticData, example_loader, open_synthetic
from zoo.data.loader import batches_of, train_loader, valid_batch
from zoo.data.tokenizers import tokenizer_of
from zoo.model.extend import places
from zoo.training.partition import ranks_per_window


def open_data(data: Data, seq_len: int) -> Corpus | SyntheticData:
    """Open a run's text or task. Raises UserError where it is not available."""
    if data.task is not None:
        return open_synthetic(data.name, data.task.load(), seq_len)
    return open_corpus(data.model_dump(), Path(data.options["cache"]))


def vocabulary(data: Data, seq_len: int) -> int:
    """The size of a run's vocabulary, without opening its text."""
    if data.task is not None:
        return open_synthetic(data.name, data.task.load(), seq_len).vocab_size
    return tokenizer_of(data.options).vocab_size


def validation(data: Corpus | SyntheticData, config: TrainConfig) -> dict[str, Tensor]:
    """The fixed windows of a run's validation, as one batch."""
    if isinstance(data, SyntheticData):
        return data.batch("valid", 0, 0, config.valid_windows, config.seq_len)
    masked = data.vocab_size if config.objective == "masked" else None
    bos = data.tokenizer.bos
    return valid_batch(data.valid, config.seq_len, config.valid_windows, masked, bos)


class Windows(lightning.LightningDataModule):
    """Training windows of a text or a task in the order of (seed, step), from the current step."""

    def __init__(self, data: Corpus | SyntheticData, config: TrainConfig) -> None:
        super().__init__()
        self.data, self.config = data, config

    def train_dataloader(self) -> "Windows":
        return self

    def __iter__(self) -> Iterator[dict[str, Any]]:
        trainer, config = self.trainer, self.config
        assert trainer is not None
        ranks = ranks_per_window(config)  # which read the same windows
        shape: dict[str, Any] = {
            "seq_len": config.seq_len,
            "batch_size": config.batch_size,
            "seed": config.seed,
            "start_step": trainer.global_step,
            "steps": trainer.max_steps - trainer.global_step,
            "rank": trainer.global_rank // ranks,
            "world": trainer.world_size // ranks,
            "micro_batches": trainer.accumulate_grad_batches,
            "workers": config.workers,
            "draw_positions": places(config.extension, config.seq_len),
        }
        if isinstance(self.data, SyntheticData):
            return batches_of(example_loader(self.data, **shape))
        loader = train_loader(
            self.data.train,
            **shape,
            contiguous=config.state_passing == "carry",
            masked=self.data.vocab_size if config.objective == "masked" else None,
            passkeys=self.data.passkeys,
            bos=self.data.tokenizer.bos,
        )
        return batches_of(loader)
