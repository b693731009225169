"""A block that is computed again chunk by chunk is the block, and needs less memory."""

import sys
from importlib import import_module

import pytest
import torch
from building import ROOT, train_config
from torch import Tensor
from torch.utils._pytree import tree_leaves

from zoo.cli.explain import peak
from zoo.errors import UserError
from zoo.model.backbone import Backbone
from zoo.model.build import build_model
from zoo.training.rehearse import rehearse

sys.path.append(str(ROOT / "tests/parallel"))
CLOSE = 1e-10
LOSSES = ["normalise=root", "norm_loss=0.1", "entropy_loss=0.1", "entropy_margin=1.0"]
CASES = {
    "sink token": ["model=transformer", "model.sink_token=true"],
    "losses of layers": ["model=relu", *(f"model.mixer.{one}" for one in LOSSES)],
    "values of the first layer": ["model=rwkv7"],
    "short convolution": ["model=transformer", "model.short_conv=4"],
    "evicted keys": ["model=longformer"],
}


def tiny(*words: str) -> Backbone:
    config = train_config("size=tiny", "match=none", "seq_len=64", *words)
    torch.manual_seed(0)
    return build_model(config, 32)[0].double()


def gradients(model: Backbone, loss: Tensor) -> list[Tensor]:
    found = torch.autograd.grad(loss, [*model.parameters()], allow_unused=True)
    return [torch.zeros(()) if x is None else x for x in found]


def assert_alike(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        scale = float(other.abs().max().clamp(min=1e-3))
        assert float((one - other).abs().max()) < CLOSE * scale


@pytest.mark.parametrize("chunk", [5, 16, 40])
@pytest.mark.parametrize("words", CASES.values(), ids=CASES)
def test_loss_and_gradients_are_those_of_the_whole_in_chunks_of_any_size(words, chunk):
    model, tokens = tiny(*words), torch.randint(32, (2, 42))
    expected = model.loss(tokens)
    expected = [expected.detach(), *gradients(model, expected)]
    model.checkpoint_activations = chunk
    loss = model.loss(tokens)
    assert_alike([loss.detach(), *gradients(model, loss)], expected)


@pytest.mark.parametrize("name", ["transformer", "mamba"])
def test_a_window_that_goes_on_from_a_state_leaves_the_state_of_the_whole(name):
    model, tokens = tiny(f"model={name}"), torch.randint(32, (2, 51))
    _, before = model(tokens[:, :10], model.empty_state(2))

    def found() -> list[Tensor]:
        loss, after = model.loss(tokens[:, 10:], before)
        leaves = [x for x in tree_leaves(after) if isinstance(x, Tensor)]
        score = loss + sum(x.sin().sum() for x in leaves)
        return [*(x.detach() for x in leaves), *torch.autograd.grad(score, [*model.parameters()])]

    _, before = model(tokens[:, :10].clone(), model.empty_state(2))
    before = model.truncate_state(before, 10)
    expected = found()
    model.checkpoint_activations = 16
    assert_alike(found(), expected)


def test_memory_of_a_layer_is_its_input_and_less_than_of_whole_blocks():
    def bytes_a_token(again: bool | int, layers: int) -> float:
        model = tiny(f"size.layers={layers}").float()
        model.checkpoint_activations = again
        return peak(model, 1, 1024) / 1024

    width = 4 * tiny().width  # bytes of a token between layers
    one, three = bytes_a_token(64, 1), bytes_a_token(64, 3)
    assert (three - one) / 2 < 1.5 * width  # and the gradients of its weights
    assert three < 0.65 * bytes_a_token(True, 3)
    assert three < 0.3 * bytes_a_token(False, 3)


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        (["model=linformer", "objective=masked"], "Use checkpoint_activations=true"),
        (["trainer.sequence_parallel=2"], "Use checkpoint_activations=true"),
    ],
)
def test_what_cannot_be_read_in_chunks_is_refused_by_name(words, advice):
    with pytest.raises(UserError, match=f"^checkpoint_activations=16: .*{advice}"):
        rehearse(train_config("size=tiny", "checkpoint_activations=16", *words))


@pytest.mark.slow  # 60 s
@pytest.mark.parametrize("chunk", [7, 16])
def test_every_architecture_and_extension_is_the_whole_in_chunks(chunk):
    ranks, cases = import_module("chunks"), import_module("test_hand_over").every_case()
    for words, extension, (length, *_) in cases.values():
        model, positions = ranks.built(ranks.composed(words, extension, [length]), length)
        tokens, labels = torch.randint(ranks.VOCABULARY, (2, ranks.ROWS, length))
        found = []
        for again in (False, chunk):
            model.checkpoint_activations = again
            loss = model.labels_loss(tokens, labels, positions)
            found.append([loss.detach(), *gradients(model, loss)])
        assert_alike(found[1], found[0])
