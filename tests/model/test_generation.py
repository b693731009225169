"""Writing on from a prompt: the same tokens as by reading everything anew for each of them."""

import itertools
from collections.abc import Sequence

import pytest
import torch
from building import train_config

from zoo.config.groups import choices
from zoo.errors import UserError
from zoo.model.backbone import Backbone
from zoo.model.build import build_model
from zoo.model.generation import CHUNK, Sampling, Writer, until
from zoo.ops import linear
from zoo.ops.runtime.dispatch import reset, used_backends

PROMPT = [5, 1, 7, 7, 2, 9]


def model_of(name: str, window: int = 32) -> Backbone:
    torch.manual_seed(0)
    words = f"model={name}", "size=tiny", f"seq_len={window}", "match=none"
    model, _ = build_model(train_config(*words), vocab_size=40)
    weight = torch.randn(40, model.width) / 4  # far from uniform, and not the embedding
    model.head.weight = torch.nn.Parameter(weight)
    return model.eval().requires_grad_(False)


def written(model: Backbone, count: int, sampling: Sampling, ends: Sequence[int] = ()) -> list[int]:
    writer = Writer(model)
    writer.read(PROMPT)
    return [*writer.write(count, sampling, ends)]


@pytest.mark.parametrize("name", sorted(choices("model")))
def test_a_token_by_the_kernels_is_that_of_the_forms_with_a_gradient(name, monkeypatch):
    monkeypatch.setattr(linear, "MIN_WEIGHTS", 0)
    model = model_of(name, 64).double()

    def read() -> torch.Tensor:
        state, found = model.empty_state(1), []
        for token in PROMPT[:3]:
            logits, state = model(torch.tensor([[token]]), state)
            found.append(logits)
        return torch.cat(found, 1)

    reset()
    with torch.no_grad():
        found = read()
    model.requires_grad_(True)
    assert used_backends()["linear"] == "native"
    reset()
    expected = read()
    assert "linear" not in used_backends()
    torch.testing.assert_close(found, expected.detach())


@pytest.mark.parametrize("name", ["transformer", "mamba", "hybrid"])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_tokens_are_those_of_the_whole_text_read_anew(name, temperature):
    model, sampling = (
        model_of(name),
        Sampling(temperature=temperature, **({"top_p": 0.9, "seed": 3} if temperature else {})),
    )
    draw, text = sampling.start(), [*PROMPT]
    for _ in range(12):
        text.append(draw(model(torch.tensor([text]))[0, -1]))
    assert written(model, 12, sampling) == text[len(PROMPT) :]
    assert len({*text}) > 4


def test_reading_and_writing_may_take_turns():
    model, greedy = model_of("transformer"), Sampling()
    writer = Writer(model)
    writer.read(PROMPT)
    first = [*writer.write(3, greedy)]
    writer.read([4, 4])
    second = [*writer.write(3, greedy)]
    whole = Writer(model)
    whole.read([*PROMPT, *first, 4, 4])
    assert second == [*whole.write(3, greedy)]
    assert writer.tokens == len(PROMPT) + 3 + 2 + 3


def test_a_text_that_is_left_early_goes_on_from_what_was_taken():
    model = model_of("transformer")
    writer = Writer(model)
    writer.read(PROMPT)
    taken = [*itertools.islice(writer.write(9, Sampling()), 4)]
    assert [*taken, *writer.write(5, Sampling())] == written(model, 9, Sampling())


def test_a_prompt_longer_than_a_chunk_is_read_whole(monkeypatch):
    assert CHUNK > 4
    model = model_of("mamba")
    expected = written(model, 5, Sampling())
    monkeypatch.setattr("zoo.model.generation.CHUNK", 4)
    assert written(model, 5, Sampling()) == expected


def test_writing_ends_before_the_first_end_token():
    model = model_of("transformer")
    free = written(model, 8, Sampling())
    for ends in ([free[-1]], [free[-1], free[2]]):
        first = min(map(free.index, ends))
        assert written(model, 8, Sampling(), ends) == free[:first]


@pytest.mark.parametrize("top_p", [0.2, 0.5, 0.9, 1.0])
def test_top_p_keeps_the_fewest_likeliest_tokens_that_reach_it(top_p):
    logits = torch.randn(50, generator=torch.Generator().manual_seed(1))
    truncated = Sampling(temperature=0.7, top_p=top_p).probabilities(logits)
    whole = (logits.double() / 0.7).softmax(-1)
    order, total, expected = whole.argsort(descending=True), 0.0, torch.zeros(50).double()
    for token in order.tolist():
        if total >= top_p:
            break
        expected[token] = whole[token]
        total += float(whole[token])
    torch.testing.assert_close(truncated, expected / expected.sum())
    assert truncated.sum() == pytest.approx(1)


def test_tokens_are_drawn_as_often_as_they_are_likely():
    logits, draws = torch.tensor([0.0, 1.0, 2.0]), 4000
    draw = Sampling(temperature=2.0, seed=1).start()
    counts = torch.bincount(torch.tensor([draw(logits) for _ in range(draws)]), minlength=3)
    expected = (logits.double() / 2).softmax(-1)
    spread = (expected * (1 - expected) / draws).sqrt()
    assert ((counts / draws - expected).abs() < 4 * spread).all()


def test_a_temperature_near_zero_takes_the_likeliest_token():
    logits = torch.tensor([1.0, 3.0, 2.0])
    assert Sampling(temperature=1e-320, top_p=0.5).probabilities(logits).tolist() == [0, 1, 0]


def test_a_seed_gives_the_same_text_and_another_seed_another():
    model = model_of("transformer")
    texts = [written(model, 12, Sampling(temperature=1.5, seed=seed)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("temperature", -1), ("temperature", float("nan")), ("top_p", 0)),
        *(("top_p", 0.5), ("seed", 3), ("seed", -1)),  # nothing is drawn at temperature 0
    ],
)
def test_a_value_that_is_no_way_to_sample_is_refused(option, value):
    with pytest.raises(UserError, match=f"^{option}="):
        Sampling(**{option: value})


def test_a_text_longer_than_the_model_can_read_is_refused_before_it_is_read():
    model = model_of("learned")
    writer = Writer(model)
    writer.read([1] * 30)
    with pytest.raises(UserError, match=r"^tokens=3: the model reads at most 32 tokens"):
        next(writer.write(3, Sampling()))
    with pytest.raises(UserError, match=r"^tokens=40: must be from 0 to 39"):
        writer.read([40])
    assert writer.tokens == 30


def test_outputs_that_are_no_numbers_are_an_error():
    model = model_of("transformer")
    with torch.no_grad():
        model.norm.weight.fill_(float("nan"))
    with pytest.raises(ArithmeticError):
        written(model, 1, Sampling())


@pytest.mark.parametrize(
    ("pieces", "stop", "left"),
    [
        (["abc", "def"], ["cd"], ["ab"]),
        (["a", "b", "c"], [], ["a", "b", "c"]),
        (["ab", "c"], ["bd"], ["a", "bc"]),  # what may begin a stop waits
        (["ab"], ["bd"], ["a", "b"]),  # and comes in the end
        (["xyx", "yz"], ["xyz", "y"], ["x"]),  # the first of several
        (["stop"], ["stop"], []),
        (["aaab"], ["aab"], ["a"]),
        (["aa", "ab"], ["aab"], ["a"]),
    ],
)
def test_a_text_ends_before_the_first_stop(pieces, stop, left):
    found = [*until(iter(pieces), stop)]
    assert "".join(found) == "".join(left)
    assert found == left


def test_a_model_that_reads_both_ways_does_not_write():
    config = train_config(
        "model=linformer", "objective=masked", "size=tiny", "seq_len=64", "match=none"
    )
    model, _ = build_model(config, vocab_size=40)
    with pytest.raises(UserError, match="reads its text both ways"):
        Writer(model)
