"""Texts of different lengths that are read together are read as each would be by itself."""

import contextlib

import pytest
import torch
from building import ARCHITECTURES, MODEL_OF
from torch import Tensor

from zoo.config.compose import compose
from zoo.config.groups import extensions
from zoo.mixers.base import RowStates
from zoo.mixers.paged_cache import paged
from zoo.model.backbone import Backbone, BackboneState
from zoo.model.extend import extend
from zoo.model.row_batch import RowBatch, joins

VOCABULARY, LENGTHS = 32, (3, 40, 17)
MEASURED = [name for name, one in extensions().items() if not one.get("positions")]  # others train
CLOSE = {"rtol": 1e-9, "atol": 1e-11}


def begun(model: Backbone, length: int) -> BackboneState:
    text = torch.arange(length)[None] * 7 % VOCABULARY
    return model(text, model.empty_state(1))[1]


def check(model: Backbone, pages: bool = True) -> None:
    """Three texts read on together, one leaves and another joins; against each alone."""
    more = torch.randint(VOCABULARY, (4, 6))

    def alone(length: int, tokens: Tensor) -> Tensor:
        state, outs = begun(model, length), []
        for token in tokens:
            x, state = model.hidden(token.view(1, 1), state)
            outs.append(x[0, 0])
        return torch.stack(outs)

    lengths = [*LENGTHS, 29]
    expected = [alone(length, own) for length, own in zip(lengths, more, strict=True)]
    found: list[list[Tensor]] = [[] for _ in lengths]
    with paged(model) if pages else contextlib.nullcontext():
        states = [begun(model, length) for length in lengths]
        batch, members, given = RowBatch(model, states[:3]), [0, 1, 2], [0] * 4
        for step in range(6):
            if step == 3:  # the second leaves, the fourth joins
                left = batch.split()
                batch, members = RowBatch(model, [left[0], left[2], states[3]]), [0, 2, 3]
            tokens = torch.tensor([[int(more[i, given[i]])] for i in members])
            for i in members:
                given[i] += 1
            for i, x in zip(members, batch.hidden(tokens), strict=True):
                found[i].append(x[0])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.stack(one), other[: len(one)], **CLOSE)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_reads_texts_of_any_lengths_together(name, tiny):
    with torch.inference_mode():
        check(tiny(name).eval())


@pytest.mark.parametrize("name", ["transformer", "sinusoidal", "mamba"])
def test_texts_behind_a_sink_token_are_read_together(name, tiny):
    with torch.inference_mode():
        check(tiny(name, "model.sink_token=true").eval(), pages=False)


def test_states_without_positions_are_rows_of_one_state(tiny):
    for name, joined in {"mamba": True, "rwkv7": True, "lstm": True, "transformer": False}.items():
        model = tiny(name)
        mixer = model.layers[0].mixer
        assert joins(mixer) == joined
        with torch.inference_mode():
            batch = RowBatch(model, [begun(model, 3), begun(model, 5)])
        assert isinstance(batch.blocks[0].mixer, RowStates) != joined


@pytest.mark.slow  # 40 s
@pytest.mark.parametrize("name", MEASURED)
def test_every_extension_reads_texts_of_any_lengths_together(name, tiny):
    model = tiny(MODEL_OF.get(name, "transformer")).eval()
    words = [f"extension={name}"]
    words += ["extension.factor=4"] * (extensions()[name]["factor"] == "???")
    if name == "longrope":
        factors = ",".join(["2"] * 16)
        words.append(f"extension.scaling.long_factors=[{factors}]")
    extend(model, compose("eval", ["run=x", *words]).extension, 16)
    with torch.inference_mode():
        check(model.double())
