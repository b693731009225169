"""Softmax attention with fewer heads of keys than of queries."""

import importlib
from functools import partial

import pytest
import torch

from zoo.config.schemes import declared, schemes
from zoo.mixers.softmax import SoftmaxAttention
from zoo.ops.attention import attention

INSIDE = [name for name, target in schemes().items() if not declared(target, "embedded", False)]


def scheme(name: str):
    module, _, cls = schemes()[name].rpartition(".")
    found = getattr(importlib.import_module(module), cls)
    return partial(found, window=6) if name == "xpos" else found  # which has no default


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("name", INSIDE)
def test_tokens_one_by_one_under_grouped_keys_are_those_of_the_whole(name, kv_heads):
    torch.manual_seed(0)
    mixer = SoftmaxAttention(width=32, heads=4, kv_heads=kv_heads, positions=scheme(name))
    mixer, x = mixer.double(), torch.randn(3, 9, 32, dtype=torch.float64)
    whole, state, parts = mixer(x), mixer.empty_state(3), []
    for token in x.split(1, 1):
        y, state = mixer(token, state)
        parts.append(y)
    assert torch.allclose(torch.cat(parts, 1), whole, rtol=0, atol=1e-12)
    wanted = torch.autograd.grad(whole.square().sum(), [*mixer.parameters()], allow_unused=True)
    found = torch.autograd.grad(
        torch.cat(parts, 1).square().sum(), [*mixer.parameters()], allow_unused=True
    )
    for one, other in zip(found, wanted, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.allclose(one, other, rtol=0, atol=1e-10)


def test_grouped_keys_are_not_repeated_for_one_token(monkeypatch):
    seen = []

    def watched(parts, **options):
        seen.extend(part.k.shape for part in parts)
        return attention(parts, **options)

    monkeypatch.setattr("zoo.mixers.softmax.attention", watched)
    mixer = SoftmaxAttention(width=32, heads=4, kv_heads=2)
    _, state = mixer(torch.randn(1, 7, 32), mixer.empty_state(1))
    mixer(torch.randn(1, 1, 32), state)
    assert seen == [(1, 8, 2, 8)]
