"""Operations of reading are those that PyTorch's counter has at the length read."""

import pytest
import torch
from building import train_config
from torch.utils.flop_counter import FlopCounterMode

from zoo.config.compose import compose
from zoo.config.groups import choices
from zoo.model.build import build_model
from zoo.model.extend import extend
from zoo.model.flops import ReadingCost, forward_flops, reading_cost


def model_of(name: str):
    config = train_config(f"model={name}", "size=tiny", "match=none", "seq_len=64")
    return build_model(config, 256)[0].eval().requires_grad_(False)


@pytest.mark.parametrize(
    "words",
    [
        *("transformer", "mamba", "mamba2", "gated_deltanet", "xpos", "longformer"),
        *("transformer extension=streaming_llm", "transformer extension=pcw"),
    ],
)
def test_a_reading_costs_what_is_counted_at_any_length(words):
    model, *extension = words.split(" ")
    model = model_of(model)
    if extension:
        model = extend(model, compose("eval", ["run=none", *extension]).extension, 64)
    cost = reading_cost(model)
    for tokens in (60, 100, 300, 777, 1800):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, tokens, dtype=torch.long))
        assert cost.of(tokens) == pytest.approx(counter.get_total_flops(), rel=0.02), tokens


def test_beyond_what_is_counted_the_line_goes_on():
    model = model_of("transformer")
    cost = ReadingCost(reading_cost(model)._per_token, 1024)
    assert cost.of(4096) == pytest.approx(4096 * forward_flops(model, 4096), rel=1e-9)


COSTS = [
    ReadingCost(lambda tokens: 3e5 + 250.0 * tokens, 2**30),
    ReadingCost(lambda tokens: 3e5 + 250.0 * tokens, 1024),
    ReadingCost(lambda _: 2e6, 2**30),
]


@pytest.mark.parametrize("cost", COSTS)
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


@pytest.mark.parametrize("name", choices("model"))
def test_no_product_with_a_matrix_is_left_out(name):
    """A token goes through every matrix; the embedding is the head's. Some are tables or windows:
    their share is small."""
    model = model_of(name)
    weights = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    tables = sum(
        p.numel() for key, p in model.named_parameters() if p.ndim > 1 and "position" in key
    )
    assert forward_flops(model, 32) >= 0.95 * 2 * (weights - tables)
