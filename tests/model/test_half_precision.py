"""Weights in 16 bits, as `weights=bfloat16` reads them: every architecture, whole and by token."""

import pytest
import torch
from building import train_config, warnings_as_errors

from zoo.config.groups import choices
from zoo.model.build import build_model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", choices("model"))
def test_every_architecture_computes_with_weights_in_16_bits(name, dtype):
    torch.manual_seed(0)
    config = train_config(f"model={name}", "size=tiny", "match=none", "seq_len=64")
    model, exact = (build_model(config, 64)[0].eval().requires_grad_(False) for _ in range(2))
    exact.load_state_dict(model.state_dict())
    model.to(dtype)
    tokens = torch.randint(64, (1, 20), generator=torch.Generator().manual_seed(0))
    expected = exact(tokens)
    with warnings_as_errors():
        whole = model(tokens)
        _, state = model(tokens[:, :15], model.empty_state(1))
        last, _ = model(tokens[:, 15:16], state)
    for logits, right in ((whole, expected), (last, expected[:, 15:16])):
        assert logits.dtype == whole.dtype
        assert (logits.float() - right).norm() < 0.1 * right.norm()
