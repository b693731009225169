"""Configurations as the programs check them, for tests that build models."""

from pathlib import Path

from zoo.config.compose import compose
from zoo.config.resolve import reads_both_ways
from zoo.config.schema import TrainConfig

ROOT = Path(__file__).parents[1]
ARCHITECTURES = sorted(path.stem for path in ROOT.glob("configs/model/*.yaml"))

ENCODERS = [name for name in ARCHITECTURES if reads_both_ways(name)]


def train_config(*words: str) -> TrainConfig:
    """The checked configuration of `python train.py` under these options."""
    config = compose("train", words)
    assert isinstance(config, TrainConfig)
    return config
