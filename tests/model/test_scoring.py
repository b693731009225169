"""Continuations that are scored together are scored as each would be by itself."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zoo.data.tokenizers import BYTE_TOKENIZER
from zoo.model.generation import Sampling, Writer, until
from zoo.model.scoring import finished_text, likelihoods, write_many
from zoo.model.shared_prefixes import Read, plan, walk

NAMES = ["transformer", "mamba", "hybrid", "rwkv7", "xpos"]
VOCABULARY = 32


def alone(model, context: list[int], rest: list[int]) -> tuple[float, bool]:
    """The likelihood of one continuation, by one reading of the whole."""
    tokens = torch.tensor([[*context, *rest]])
    with torch.no_grad():
        chances = model(tokens[:, :-1])[0].log_softmax(-1)[len(context) - 1 :]
    targets = tokens[0, len(context) :]
    return float(chances.gather(1, targets[:, None]).sum()), bool(
        (chances.argmax(-1) == targets).all()
    )


def sequences() -> st.SearchStrategy[list[list[int]]]:
    """Texts of two letters with much in common."""
    heads = st.sampled_from([[], [1] * 20, [1] * 20 + [2] * 9, [1] * 5, [2, 1, 2]])
    tails = st.lists(st.integers(0, 3), max_size=12)
    return st.lists(st.builds(list.__add__, heads, tails), min_size=1, max_size=9)


@given(sequences(), st.integers(1, 12))
def test_a_plan_reads_every_token_of_every_sequence_once(texts, least):
    """Stretches of the tree and what is left of each sequence are the sequence."""
    read: dict[int, list[int]] = {}

    def visit(node, before: list[int]) -> None:
        stretch = texts[node.members[0]][node.start : node.stop]
        assert all(texts[i][node.start : node.stop] == stretch for i in node.members)
        for child in node.children:
            assert len(child.members) > 1
            visit(child, [*before, *stretch])
        for i in node.rest:
            assert i not in read
            read[i] = [*before, *stretch, *texts[i][node.stop :]]

    visit(plan(texts, least), [])
    assert [read[i] for i in range(len(texts))] == texts


@pytest.mark.parametrize("name", NAMES)
def test_likelihoods_are_those_of_each_pair_alone(name, tiny):
    model = tiny(name)
    head = torch.randint(0, VOCABULARY, (40,)).tolist()
    contexts = [head, head[:30], [*head, 1, 2, 3], [5], head[::-1]]
    rests = [[3], [3, 4], [9] * 7, [1, 2, 3, 4, 5]]
    pairs = [(context, rest) for context in contexts for rest in rests]
    pairs.append((head, head[:5]))
    greedy = model(torch.tensor([head]))[0, -1].argmax().item()
    pairs.append((head, [greedy]))
    for rows in (1, 3, 64):
        found = likelihoods(model, pairs, rows=rows, precision="64-true")
        for pair, one in zip(pairs, found, strict=True):
            nats, likeliest = alone(model, *pair)
            assert one.nats == pytest.approx(nats, abs=1e-9)
            assert one.greedy == likeliest
    assert found[-1].greedy
    assert likelihoods(model, [], rows=4) == []


def test_what_requests_begin_with_is_read_once(tiny, monkeypatch):
    model = tiny("transformer")
    head = torch.randint(0, VOCABULARY, (100,)).tolist()
    pairs = [([*head, one], [2, 3]) for one in range(8)]
    seen = 0
    hidden = type(model).hidden

    def counted(self, tokens, *args, **kwargs):
        nonlocal seen
        seen += tokens.numel()
        return hidden(self, tokens, *args, **kwargs)

    monkeypatch.setattr(type(model), "hidden", counted)
    likelihoods(model, pairs, rows=4, precision="64-true")
    assert seen == 100 + 8 * 2
    seen = 0
    how = {"tokens": 1, "sampling": Sampling(), "rows": 4, "stops": lambda *_: False}
    write_many(model, [context for context, _ in pairs], precision="64-true", **how)
    assert seen == 100 + 8


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, seed=3)])
def test_texts_written_together_are_those_written_alone(name, sampling, tiny):
    model = tiny(name)
    head = torch.randint(0, VOCABULARY, (30,)).tolist()
    prompts = [head, head, [*head, 4], [*head[:20], 7], [3], [4]]
    end = 5

    def stops(prompt, written):
        assert prompt
        return written[-1] == end

    how = {"tokens": 12, "sampling": sampling, "stops": stops, "precision": "64-true"}
    expected = []
    for prompt in prompts:
        writer = Writer(model, "64-true")
        writer.read(prompt)
        written = [*writer.write(12, sampling, [end])]
        expected.append(written if len(written) == 12 else [*written, end])
    for rows in (1, 4):
        assert write_many(model, prompts, rows=rows, **how) == expected


def test_long_stretches_are_read_in_chunks(tiny, monkeypatch):
    monkeypatch.setattr("zoo.model.shared_prefixes.CHUNK", 7)
    model = tiny("hybrid")
    head = torch.randint(0, VOCABULARY, (50,)).tolist()
    pairs = [(head[:20], [*head[20:], one]) for one in (1, 2)]
    found = likelihoods(model, pairs, rows=2, precision="64-true")
    for pair, one in zip(pairs, found, strict=True):
        assert one.nats == pytest.approx(alone(model, *pair)[0], abs=1e-9)
    texts = [head, head]
    with torch.no_grad():
        sizes = [r.x.shape[1] for r in walk(model, texts, plan(texts)) if isinstance(r, Read)]
    assert sizes == [7] * 7 + [1]


@pytest.mark.parametrize("stop", ["\ufffd", "é", "\ufffd\ufffd", "ab"])
def test_a_text_stops_where_it_does_token_by_token(stop):
    """A character that is not finished yet is shown as U+FFFD, and is none."""
    generator = torch.Generator().manual_seed(0)
    letters = torch.tensor([*"abé€".encode(), 0xE2, 0xFF])
    stopped = 0
    for _ in range(200):
        written = letters[torch.randint(len(letters), (12,), generator=generator)].tolist()
        texts = [finished_text(BYTE_TOKENIZER, [], written[: n + 1]) for n in range(12)]
        ends = next((n + 1 for n, text in enumerate(texts) if stop in text), 12)
        many, alone = (
            "".join(until(BYTE_TOKENIZER.decode(part), [stop]))
            for part in (written[:ends], written)
        )
        assert many == alone
        stopped += ends < 12
    assert stopped
