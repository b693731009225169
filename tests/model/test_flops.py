"""Operations of reading are those that PyTorch's counter has at the length read."""

import pytest
import torch
from building import train_config
from torch.utils.flop_counter import FlopCounterMode

from zoo.config.compose import compose
from zoo.config.groups import choices, extensions
from zoo.model.build import build_model
from zoo.model.extend import extend
from zoo.model.flops import ReadingCost, forward_flops, reading_cost
from zoo.model.quantization import quantize

LENGTH = 64  # that models are trained at
BLOCK = 64  # queries, for the tests of texts of many
WINDOWED = [name for name, tree in extensions().items() if tree.get("attention")]
SMALLER = (
    *("zoo.model.flops.BLOCK_QUERIES", "zoo.attention.pattern.BLOCK_QUERIES"),
    "zoo.attention.streaming_llm.MAX_BLOCK_QUERIES",
    "zoo.attention.lm_infinite.MAX_BLOCK_QUERIES",
    *("zoo.positions.t5.TILE", "zoo.mixers.linformer.SEGMENT", "zoo.ops.kernel_attention.TILE"),
)
SHORTER = {"longnet": ["model.mixer.segments=[16,64]", "model.mixer.dilations=[1,2]"]}


def model_of(words: str):
    """A tiny model, under an extension where one follows its name."""
    name, *extension = words.split(" ")
    more = SHORTER.get(name, [])
    config = train_config(f"model={name}", "size=tiny", "match=none", f"seq_len={LENGTH}", *more)
    model = build_model(config, 256)[0].eval().requires_grad_(False)
    if extension:
        model = extend(model, compose("eval", ["run=none", *extension]).extension, LENGTH)
    return model


def counted(model, tokens: int) -> int:
    """The operations of really reading so many tokens."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, tokens, dtype=torch.long))
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "words",
    [
        *("transformer", "mamba", "gated_deltanet", "xpos", "transformer extension=streaming_llm"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("mamba2", "longformer")),
    ],
)
def test_a_reading_costs_what_is_counted_at_any_length(words):
    model = model_of(words)
    cost = reading_cost(model)
    for tokens in (100, 777):
        assert cost.of(tokens) == pytest.approx(counted(model, tokens), rel=0.02), tokens


@pytest.mark.parametrize(
    "words",
    [
        *choices("model"),
        *(
            pytest.param(
                f"transformer extension={name}",
                marks=pytest.mark.slow if name in ("pcw", "structured", "dca") else [],
            )
            for name in WINDOWED
        ),
        "transformer extension=lm_infinite extension.attention.top_k=5",
    ],
)
def test_texts_beyond_every_window_cost_what_is_counted_there(words, monkeypatch):
    for name in SMALLER:
        monkeypatch.setattr(name, BLOCK)
    monkeypatch.setattr("zoo.model.flops.CHUNK", 4 * BLOCK)
    model = model_of(words)
    if model.max_length:
        assert forward_flops(model, model.max_length) * LENGTH == counted(model, LENGTH)
        return
    cost = reading_cost(model)
    assert cost.longest <= 32 * LENGTH
    tokens = 2 * cost.longest  # at least four of the longest windows
    truth = counted(model, tokens)
    assert cost.of(tokens) == pytest.approx(truth, rel=1e-3)
    assert forward_flops(model, tokens) * tokens == pytest.approx(truth, rel=1e-3)


def test_a_window_is_seen_however_long_it_is_and_whatever_the_size_of_the_model():
    """Counted with PyTorch's fake tensors, since nothing would read so long a text in time."""
    model = model_of("transformer")
    window = compose("eval", ["run=none", "extension=streaming_llm"]).extension
    longest = 16384
    model = extend(model, window, longest)
    attention = 4 * 64 * 2 * longest  # a product with each key and value, of a width, and layers
    far = forward_flops(model, 2**21)
    assert forward_flops(model, 2**20) == pytest.approx(far, rel=0.02)
    assert far == pytest.approx(forward_flops(model, LENGTH) + attention, rel=0.3)


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_a_model_of_fewer_bits_computes_as_much(form):
    model = model_of("transformer")
    before = forward_flops(model, LENGTH)
    quantize(model, form)
    assert forward_flops(model, LENGTH) == before


def test_counting_reads_no_values_and_leaves_none_behind():
    """Tables of angles that a count would leave could not be read by the next text."""
    model = model_of("transformer")
    text = torch.arange(LENGTH)[None]
    before = model(text)
    forward_flops(model_of("transformer"), 4 * LENGTH)
    forward_flops(model, 4 * LENGTH)
    found = model(torch.arange(4 * LENGTH)[None] % 256)
    assert type(found) is torch.Tensor
    assert torch.equal(found[:, :LENGTH].argmax(-1), before.argmax(-1))


COSTS = [
    ReadingCost(lambda tokens: 3e5 + 250.0 * tokens, 2**30),
    ReadingCost(lambda tokens: 3e5 + 250.0 * tokens, 1024),
    ReadingCost(lambda tokens: 3e5 + 250.0 * min(tokens, 400), 1024, grows=False),
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
