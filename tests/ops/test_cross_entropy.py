"""The cost under a linear head: in chunks the same numbers and gradients, in less memory."""

import pytest
import torch
import torch.nn.functional as F
from building import train_config

from zoo.data.synthetic import NO_LABEL
from zoo.model.build import build_model
from zoo.ops import cross_entropy
from zoo.ops.cross_entropy import summed_cross_entropy
from zoo.tasks.memory import peak_bytes

IGNORED = -1


def drawn(n: int, d: int = 6, v: int = 11, dtype=torch.float64):
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, d, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(v, d, generator=generator, dtype=dtype).requires_grad_()
    return x, weight, torch.randint(IGNORED, v, (n,), generator=generator)


def definition(x, weight, targets):
    """The module's formula, token by token."""
    pairs = [pair for pair in zip(x, targets.tolist(), strict=True) if pair[1] != IGNORED]
    costs = [(weight @ row).exp().sum().log() - weight[y] @ row for row, y in pairs]
    return torch.stack(costs).sum() if costs else 0 * (x.sum() + weight.sum())


@pytest.mark.parametrize("n", [0, 1, 7, 20])
@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_it_is_the_definition_with_every_gradient(n, chunk):
    x, weight, targets = drawn(n)
    expected = definition(x, weight, targets)
    found = summed_cross_entropy(x, weight, targets, IGNORED, chunk)
    torch.testing.assert_close(found, expected)
    if n:
        wanted = torch.autograd.grad(3 * expected, (x, weight), materialize_grads=True)
        given = torch.autograd.grad(3 * found, (x, weight), materialize_grads=True)
        for one, other in zip(given, wanted, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("required", [(True, False), (False, True), (False, False)])
def test_only_what_is_requested_gets_a_gradient(required):
    x, weight, targets = drawn(9)
    parts = [
        part.detach().requires_grad_(require)
        for part, require in zip((x, weight), required, strict=True)
    ]
    found = summed_cross_entropy(*parts, targets, IGNORED, 4)
    torch.testing.assert_close(found, definition(x, weight, targets))
    assert found.requires_grad == any(required)
    if any(required):
        found.backward()
    assert [part.grad is not None for part in parts] == [*required]


def test_strided_rows_and_no_label_at_all():
    x, weight, targets = drawn(16)
    strided = x.detach().reshape(4, 4, 6).transpose(0, 1).flatten(0, 1).requires_grad_()
    found = summed_cross_entropy(strided, weight, targets, IGNORED, 3)
    torch.testing.assert_close(found, definition(strided, weight, targets))
    none = torch.full((16,), IGNORED)
    cost = summed_cross_entropy(x, weight, none, IGNORED, 3)
    cost.backward()
    assert cost == 0
    assert not x.grad.any()
    assert not weight.grad.any()


def test_under_autocast_products_are_in_bfloat16_and_sums_in_float32():
    x, weight, targets = drawn(40, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = summed_cross_entropy(x, weight, targets, IGNORED, 16)
        whole = summed_cross_entropy(x, weight, targets, IGNORED)
    assert found.dtype == torch.float32
    given, wanted = (torch.autograd.grad(one, (x, weight)) for one in (found, whole))
    torch.testing.assert_close(found, whole, rtol=1e-6, atol=0)
    for one, other in zip(given, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=2**-6, atol=2**-5)


@pytest.mark.mistyped
def test_shapes_that_do_not_fit_are_refused():
    x, weight, targets = drawn(5)
    with pytest.raises(ValueError, match="cross_entropy"):
        summed_cross_entropy(x, weight[:, :-1], targets)


def test_memory_is_that_of_a_chunk(monkeypatch):
    x, weight, targets = drawn(4096, 16, 2048, torch.float32)

    def step():
        summed_cross_entropy(x, weight, targets, IGNORED).backward()

    whole = peak_bytes(torch.device("cpu"), step)
    monkeypatch.setattr(cross_entropy, "HELD", 2**17)
    chunked = peak_bytes(torch.device("cpu"), step)
    assert whole
    assert chunked
    assert whole > 2 * 4 * 4096 * 2048
    assert chunked < whole / 12


@pytest.mark.parametrize("loss", ["loss", "labels_loss", "masked_loss"])
def test_a_models_losses_are_the_same_in_chunks(loss, monkeypatch):
    config = train_config("model=transformer", "size=tiny", "seq_len=32", "match=none")
    torch.manual_seed(0)
    model = build_model(config, vocab_size=50)[0].double()
    tokens = torch.randint(50, (3, 33))
    masked = torch.rand(3, 33) < 0.3
    labels = torch.where(masked, tokens, NO_LABEL)
    given = {
        "loss": (tokens,),
        "labels_loss": (tokens, labels),
        "masked_loss": (tokens, tokens, masked),
    }
    logits = model(tokens)
    expected = {
        "loss": F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()),
        "labels_loss": F.cross_entropy(logits[masked], tokens[masked]),
        "masked_loss": F.cross_entropy(logits[masked], tokens[masked]),
    }[loss]
    wanted = torch.autograd.grad(expected, [*model.parameters()], allow_unused=True)
    monkeypatch.setattr(cross_entropy, "HELD", 50 * 5)
    found = getattr(model, loss)(*given[loss])
    torch.testing.assert_close(found, expected)
    given_grads = torch.autograd.grad(found, [*model.parameters()], allow_unused=True)
    for one, other in zip(given_grads, wanted, strict=True):
        torch.testing.assert_close(one, other)
