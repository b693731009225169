"""Many-shot recall: what a prompt holds is what can be recalled, side by side or in a row."""

import functools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from building import train_config
from fakes import Reader, make_context, measure, text_store

from zoo.attention.parallel_windows import ParallelWindows
from zoo.config.compose import compose
from zoo.data import synthetic
from zoo.data.demonstrations import LETTERS, lines
from zoo.data.examples import open_synthetic
from zoo.data.tokenizers import BYTE_TOKENIZER
from zoo.errors import FORM, UserError
from zoo.model.backbone import BackboneState
from zoo.model.build import build_model
from zoo.model.extend import extend, position_schemes
from zoo.tasks import memory
from zoo.tasks.many_shot import ManyShot, _side_by_side

L = 80
TEXT = text_store(np.arange(32, 126))


class Recalls(Reader):
    """Writes the label of an item that is among the last `memory` bytes, else the first label."""

    def __init__(self, memory: int):
        super().__init__()
        self.memory = memory

    def hidden(self, tokens, state=None, positions=None):
        whole = tokens if state is None else torch.cat([state.blocks[0], tokens], 1)
        logits = torch.zeros(*tokens.shape, 256)
        for row, text in enumerate(whole.tolist()):
            for place in range(tokens.shape[1]):
                until = len(text) - tokens.shape[1] + place + 1
                near = bytes(text[max(0, until - self.memory) : until]).decode("latin1")
                logits[row, place, ord(_next(near))] = 5.0
        return logits, None if state is None else BackboneState((whole,), whole.shape[1])

    def state_bytes(self, tokens, batch=1):
        return tokens


def _next(text: str) -> str:
    if text.endswith(":"):
        return " "
    item = re.search(r"(\w+): $", text)
    found = item and re.search(rf"\b{item[1]}: ([A-Z])\n", text)
    return found[1] if found else LETTERS[0]


def context(model, **other):
    data = {"data": make_context(model, Path(), TEXT).data} | other
    if "data" not in other:
        object.__setattr__(data["data"], "tokenizer", BYTE_TOKENIZER)
    return make_context(model, Path(), TEXT, **{"train_length": L} | data)


def rows_of(model, data=None, **settings):
    few = {"draws": 2, "questions_each": 24, "labels": None if data else 4}
    return [*measure(ManyShot, context(model, **data or {}), **few | settings)]


def test_what_the_prompt_holds_is_recalled_and_the_rest_is_guessed():
    rows = rows_of(Recalls(10_000), windows=[4, 1, 2])
    assert [(row["windows"], row["length"]) for row in rows] == [(1, L), (2, 2 * L), (4, 4 * L)]
    assert all(row["status"] == "ok" for row in rows), rows
    for row in rows:
        assert row["shown"] <= row["correct"] <= row["count"] == 48
        assert row["prompt_tokens"] <= row["windows"] * 3 * L // 4
        assert row["chance"] == 1 / 4
    shown = [row["shown"] / row["count"] for row in rows]
    np.testing.assert_allclose(shown, [0.25, 0.5, 1.0], atol=0.15)
    assert rows[-1]["accuracy"] == 1.0
    # The first label is a guess of one in four for what is not shown.
    hidden = sum(row["count"] - row["shown"] for row in rows)
    guessed = sum(row["correct"] - row["shown"] for row in rows)
    assert abs(guessed / hidden - 0.25) < 0.2


def test_a_model_that_forgets_is_not_helped_by_more_windows():
    rows = rows_of(Recalls(60), windows=[1, 4])
    assert rows[1]["accuracy"] <= rows[0]["accuracy"] + 0.05


def test_every_number_of_windows_has_the_same_questions_and_the_first_of_the_same_items():
    found, task = context(Recalls(100)), ManyShot(windows=(1, 4), draws=1, questions_each=9)
    one, again = (task._draw(found, 0, most=4, window=60) for _ in range(2))
    assert one == again
    assert one != task._draw(found, 1, most=4, window=60)
    items = [tuple(d.question) for window in one.windows for d in window]
    assert len({*items}) == len(items)
    assert {tuple(q.question) for q in one.questions} <= {*items}
    assert all(sum(len(d.shown) for d in window) in range(51, 61) for window in one.windows)


def tiny(*words: str, vocab: int, extension: str = "none", seq_len: int = L):
    torch.manual_seed(0)
    config = train_config("size=tiny", "match=none", f"seq_len={seq_len}", *words)
    model = build_model(config, vocab)[0].double().eval().requires_grad_(False)
    chosen = compose("eval", ["run=x", f"extension={extension}"]).extension
    return extend(model, chosen, seq_len)


@pytest.mark.parametrize("extension", ["pcw", "structured"])
@pytest.mark.parametrize(
    ("kind", "bos"),
    [("transformer", None), ("transformer", 7), ("learned", 7), ("t5", 7), ("alibi", 7)],
)
def test_windows_are_read_as_if_alone_and_the_pattern_is_put_back(extension, kind, bos):
    model = tiny(f"model={kind}", vocab=256, extension=extension)
    found = context(model)
    object.__setattr__(found.data, "tokenizer", BYTE_TOKENIZER._replace(bos=bos))
    before = [scheme.pattern for scheme in position_schemes(model)]
    task = ManyShot(windows=(3,), draws=1)
    draw = task._draw(found, 0, most=3, window=60)
    starts = [] if bos is None else [bos]
    texts = [[*starts, *(t for d in window for t in d.shown)] for window in draw.windows]
    alone = tiny(f"model={kind}", vocab=256)
    with _side_by_side(found, draw.windows) as parallel:
        assert parallel
        whole = model(torch.tensor([[token for text in texts for token in text]]))
    expected = torch.cat([alone(torch.tensor([text])) for text in texts], 1)
    torch.testing.assert_close(whole, expected, rtol=1e-9, atol=1e-10)
    assert [scheme.pattern for scheme in position_schemes(model)] == before


@pytest.mark.parametrize("name", ["recall", "mqar"])
def test_symbols_are_keys_and_values_of_the_data_the_run_was_trained_on(name):
    task = {
        "recall": functools.partial(synthetic.recall, keys=32, values=8),
        "mqar": functools.partial(synthetic.mqar, symbols=66, pairs=2),
    }[name]
    data = open_synthetic(name, task, 32)
    for extension in ("none", "pcw"):
        model = tiny("model=transformer", vocab=data.vocab_size, extension=extension, seq_len=32)
        rows = rows_of(model, {"data": data, "train_length": 32}, windows=[1, 2])
        assert [row["status"] for row in rows] == ["ok", "ok"], rows
        assert [row["prompt_tokens"] for row in rows] == [24, 48]  # twelve pairs, and twice as many
        assert rows[0]["chance"] == 1 / (8 if name == "recall" else 33)


def test_a_draw_of_lines_has_as_many_labels_as_said_and_no_item_twice():
    found = lines(BYTE_TOKENIZER, 3, np.random.default_rng(0))
    first = [next(found.drawn) for _ in range(2000)]
    assert len({tuple(one.question) for one in first}) == 2000
    assert {one.label for one in first} == {0, 1, 2}
    assert [bytes(one) for one in found.labels] == [b" A", b" B", b" C"]
    for one in first[:50]:
        assert bytes(one.shown) == bytes([*one.question, *found.labels[one.label]]) + b"\n"


@pytest.mark.parametrize(
    ("settings", "extension", "message"),
    [
        ({"windows": [5]}, "pcw", "extension.attention.windows=4: must be at least 5"),
        ({"window": 70}, "pcw", "extension.attention.window=60: must be at least"),
        ({"window": 79}, "none", "task.many_shot.window=79: must be at most 71, so that"),
        ({"window": 5}, "none", "task.many_shot.window=5: must be at least 10, the tokens of a"),
    ],
)
def test_windows_that_cannot_be_are_refused_before_any_is_read(settings, extension, message):
    found = context(tiny("model=transformer", vocab=256, extension=extension))
    with pytest.raises(UserError) as error:
        ManyShot(**settings).questions(found)
    assert str(error.value).startswith(message)
    assert FORM.fullmatch(str(error.value))


def test_answers_that_no_memory_holds_are_refused(monkeypatch):
    found = context(tiny("model=transformer", vocab=256))
    monkeypatch.setattr(memory.os, "sysconf", lambda _: 2**13)
    assert ManyShot(windows=(1,), questions_each=1).questions(found)
    with pytest.raises(UserError, match=r"^task\.many_shot\.windows=1024: 8192 answers of this"):
        ManyShot(windows=(2, 1024), questions_each=1024).questions(found)


def test_too_few_keys_are_refused_and_data_without_keys_does_not_apply():
    recall = open_synthetic("recall", functools.partial(synthetic.recall, keys=4), 32)
    found = context(tiny("model=transformer", vocab=20, seq_len=32), data=recall, train_length=32)
    with pytest.raises(UserError, match=r"hold more demonstrations than there are items \(4\)"):
        ManyShot().questions(found)
    with pytest.raises(UserError, match=r"^task\.many_shot\.labels=3: the labels of data=recall"):
        ManyShot(labels=3).questions(found)
    parity = open_synthetic("parity", functools.partial(synthetic.parity), 32)
    with pytest.raises(Exception, match="data=parity: has no keys with values"):
        ManyShot().questions(context(found.model, data=parity, train_length=32))


def test_a_pattern_has_room_for_the_windows_of_a_prompt():
    pattern = ParallelWindows(lambda _: ((), 1.0), original_length=8, windows=2)
    with pytest.raises(UserError, match=r"^windows=2: must be at least 3"):
        pattern.arranged([1, 1, 1], begun=False)
    with pytest.raises(UserError, match=r"^window=6: must be at least 7"):
        pattern.arranged([7], begun=False)
