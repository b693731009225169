"""The text or the task of a run, without Lightning: evaluations read it too."""

from pathlib import Path

from torch import Tensor

from zoo.config.schema.data import Data
from zoo.config.schema.train import TrainConfig
from zoo.data.corpora import Corpus, open_corpus
from zoo.data.examples import SyntheticData, open_synthetic
from zoo.data.loader import valid_batch
from zoo.data.tokenizers import tokenizer_of


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
