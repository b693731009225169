"""What tests share: tiny models of every architecture, built as the programs build them."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests run in as many processes as cores

ROOT = Path(__file__).parents[1]
ARCHITECTURES = sorted(path.stem for path in ROOT.glob("configs/model/*.yaml"))


@pytest.fixture
def tiny() -> Callable:
    """tiny(name, **changes) -> the architecture at size tiny, vocabulary 32, in float64."""
    import torch

    from zoo.build import build_model
    from zoo.config import compose

    def build(name: str, *overrides: str, dtype=torch.float64):
        config = compose("train", [f"model={name}", "size=tiny", "seq_len=64", *overrides])
        torch.manual_seed(0)
        model, _ = build_model(config, vocab_size=32)
        return model.to(dtype)

    return build


@pytest.fixture(params=ARCHITECTURES)
def architecture(request) -> str:
    """Every architecture in turn, by name."""
    return request.param
