"""The text as a run reads it: one share of each step's windows for every process."""

from collections.abc import Iterator
from typing import Any

import lightning

from zoo.data.corpora import Corpus
from zoo.data.loader import train_loader
from zoo.extend import places
from zoo.schema import TrainConfig


class Windows(lightning.LightningDataModule):
    """The corpus as training windows in the order of (seed, step), from the step we are at."""

    def __init__(self, corpus: Corpus, config: TrainConfig) -> None:
        super().__init__()
        self.corpus, self.config = corpus, config

    def train_dataloader(self) -> "Windows":
        return self

    def __iter__(self) -> Iterator[dict[str, Any]]:
        trainer, config = self.trainer, self.config
        assert trainer is not None
        loader = train_loader(
            self.corpus.train,
            seq_len=config.seq_len,
            batch_size=config.batch_size,
            seed=config.seed,
            start_step=trainer.global_step,
            steps=trainer.max_steps - trainer.global_step,
            contiguous=config.state_passing == "carry",
            rank=trainer.global_rank,
            world=trainer.world_size,
            micro_batches=trainer.accumulate_grad_batches,
            workers=config.workers,
            masked=self.corpus.vocab_size if config.objective == "masked" else None,
            places=places(config.extension, config.seq_len),
            passkeys=self.corpus.passkeys,
        )
        return iter(loader)
