"""Operations of reading are a line per token in the length read, as PyTorch's counter has them."""

import pytest
import torch
from building import train_config
from torch.utils.flop_counter import FlopCounterMode

from zoo.model.build import build_model
from zoo.model.flops import ReadingCost, forward_flops, reading_cost


def model_of(name: str):
    config = train_config(f"model={name}", "size=tiny", "match=none", "seq_len=64")
    return build_model(config, 256)[0].eval().requires_grad_(False)


@pytest.mark.parametrize("name", ["transformer", "mamba", "gated_deltanet"])
def test_a_reading_costs_what_is_counted_at_any_length(name):
    model = model_of(name)
    cost = reading_cost(model)
    for tokens in (256, 768, 1024):
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, tokens, dtype=torch.long))
        assert cost.of(tokens) == pytest.approx(counter.get_total_flops(), rel=0.02)
    assert cost.of(4096) == pytest.approx(4096 * forward_flops(model, 4096), rel=1e-9)
    assert (cost.growing * 1024 > 0.05 * cost.fixed) == (name == "transformer")


@pytest.mark.parametrize("cost", [ReadingCost(3e5, 250.0), ReadingCost(2e6, 0.0)])
@pytest.mark.parametrize("tokens", [1, 2, 77, 5000, 10**6])
def test_as_many_tokens_are_read_as_operations_suffice_for(cost, tokens):
    assert cost.tokens(cost.of(tokens) * (1 + 1e-9)) == tokens
    assert cost.tokens(cost.of(tokens) * (1 - 1e-6)) == tokens - 1
    assert cost.tokens(0) == cost.tokens(-5.0) == 0


def test_the_parts_of_a_reading_add_up():
    cost = reading_cost(model_of("transformer"))
    assert cost.of(300) + cost.of(700, 300) == pytest.approx(cost.of(1000))
    assert cost.of(700, 300) > cost.of(700)


def test_a_model_of_a_longest_length_is_counted_within_it():
    model = model_of("learned")
    assert model.max_length == 64
    assert reading_cost(model).of(64) == pytest.approx(64 * forward_flops(model, 64))
