"""What the tests of the ops share."""

import pytest
import torch


@pytest.fixture
def poisoned():
    """Every `torch.empty` is full of NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
