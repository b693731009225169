"""The windows that a run trains on, as Lightning takes them."""

from collections.abc import Iterator
from typing import Any

import lightning

from zoo.config.schema.train import TrainConfig
from zoo.data.corpora import Corpus
from zoo.data.examples import SyntheticData, example_loader
from zoo.data.loader import batches_of, train_loader
from zoo.model.extend import places
from zoo.training.partition import ranks_per_window


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
