"""What every measurement rests on: exact sums, failures that keep their place."""

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fakes import Remembers, make_context, random_text, text_store
from torch.utils._python_dispatch import TorchDispatchMode

from zoo.errors import UserError
from zoo.tasks import context as scoring
from zoo.tasks.context import NotApplicableError, in_buckets, position_edges, run_guarded, score


@pytest.mark.parametrize("architecture", ["transformer", "alibi", "mamba", "hybrid"])
@pytest.mark.parametrize("chunk", [7, 64, 1000])
def test_text_read_in_chunks_costs_what_it_costs_at_once(architecture, chunk, tiny, tmp_path):
    model = tiny(architecture).eval()
    context = make_context(model, tmp_path, text_store(random_text(400)))
    tokens = random_text(2 * 151).reshape(2, 151)
    with context.arithmetic():
        logits = model(torch.as_tensor(tokens)[:, :-1])
        at_once = F.cross_entropy(logits.mT, torch.as_tensor(tokens)[:, 1:], reduction="none")
        found, state = score(context, tokens, chunk=chunk)
    assert found.dtype == np.float64
    assert state.tokens_seen == 150
    np.testing.assert_allclose(found, at_once.numpy(), rtol=1e-9)


def test_scores_go_on_from_a_given_state(tmp_path):
    model, tokens = Remembers(memory=5), random_text(41)[None]
    context = make_context(model, tmp_path, text_store(tokens[0]))
    whole, _ = score(context, tokens, chunk=8)
    first, state = score(context, tokens[:, :21], chunk=8)
    second, _ = score(context, tokens[:, 20:], state, chunk=8)
    np.testing.assert_array_equal(np.concatenate([first, second], 1), whole)
    np.testing.assert_allclose(whole[0], model.costs(tokens[0]), rtol=1e-12)


def test_a_state_that_is_not_as_large_as_declared_is_an_error(tmp_path):
    model = Remembers(memory=5)
    model.state_bytes = lambda tokens, batch=1: 1  # type: ignore[method-assign]
    context = make_context(model, tmp_path, text_store(random_text(9)))
    with pytest.raises(RuntimeError, match="holds 40 bytes and declares 1"):
        score(context, random_text(9)[None], chunk=4)


def test_a_broken_model_gives_no_number(tmp_path):
    model = Remembers(memory=5)
    model.logits[:] = torch.nan
    context = make_context(model, tmp_path, text_store(random_text(9)))
    with pytest.raises(ArithmeticError, match="not finite"):
        score(context, random_text(9)[None], chunk=4)


def test_a_large_vocabulary_shortens_the_chunk(tmp_path):
    store = text_store(random_text(9))
    assert scoring.chunk_tokens(make_context(Remembers(1), tmp_path, store), 4096) == 4096
    large = Remembers(1)
    large.vocab_size = 2**18
    assert scoring.chunk_tokens(make_context(large, tmp_path, store), 4096) == 2**8


@pytest.mark.parametrize(
    ("precision", "dtype"), [("32-true", "float32"), ("bf16-mixed", "bfloat16")]
)
def test_the_arithmetic_is_the_runs_own_and_takes_no_gradients(precision, dtype, tmp_path):
    store = text_store(random_text(9))
    context = make_context(Remembers(1), tmp_path, store, precision=precision)
    a = torch.ones(2, 2, requires_grad=True)
    with context.arithmetic():
        product = a @ a
    assert product.dtype == getattr(torch, dtype)
    assert not product.requires_grad


def test_costs_are_formed_in_float32_whatever_the_models_type():
    """A token that all but fills the softmax costs little; bfloat16 knows no such little number."""
    logits = torch.zeros(1, 1, 16, dtype=torch.bfloat16)
    logits[..., 3] = 9.0
    found = scoring.nats(logits, torch.tensor([[3]]))
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(np.log1p(15 * np.exp(-9.0)), rel=1e-4)


def test_a_state_of_another_size_than_declared_is_refused(tmp_path):
    class Declares(Remembers):
        def state_bytes(self, tokens, batch=1):
            return super().state_bytes(tokens, batch) + 1

    context = make_context(Declares(3), tmp_path, text_store(random_text(9)))
    with pytest.raises(RuntimeError, match="the state holds 24 bytes and declares 25"):
        score(context, random_text(9)[None], chunk=4)


class Casts(TorchDispatchMode):
    """Counts the casts of tensors as large as the weights of a layer."""

    def __init__(self, shapes):
        super().__init__()
        self.shapes, self.count = shapes, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        cast = func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.to)
        self.count += cast and args[0].shape in self.shapes
        return func(*args, **(kwargs or {}))


def test_weights_are_cast_once_for_all_chunks(tiny, tmp_path):
    model = tiny("transformer", dtype=torch.float32).eval().requires_grad_(False)
    shapes = {p.shape for name, p in model.named_parameters() if "mixer.q_proj" in name}
    layers = len(model.blocks)
    text = random_text(257)[None]
    context = make_context(model, tmp_path, text_store(random_text(9)), precision="bf16-mixed")
    with context.arithmetic(), Casts(shapes) as casts:
        score(context, text, chunk=16)
    assert layers <= casts.count <= 4 * layers  # q and what is as large, not once for each chunk
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("length", [1, 2, 3, 100, 512, 16384, 2**20])
def test_buckets_cover_every_position_once_and_agree_between_lengths(length):
    edges = position_edges(length)
    assert edges[0] == 1
    assert edges[-1] == length + 1
    assert (np.diff(edges) > 0).all()
    assert len(edges) <= 81
    assert set(edges[:-1]) <= set(position_edges(4 * length))


@pytest.mark.parametrize("length", [1, 2, 3, 16, 64, 100, 128, 500, 512, 513, 16384, 2**20])
def test_the_last_bucket_is_no_sliver(length):
    widths = np.diff(position_edges(length))
    assert len(widths) == 1 or 2 * widths[-1] >= widths[-2]


def test_buckets_sum_what_lies_in_them():
    edges = position_edges(100)
    summed = in_buckets(np.arange(1.0, 101.0), edges)
    direct = [sum(range(low, high)) for low, high in pairwise(edges)]
    assert summed.tolist() == direct


def fail_with(error: BaseException):
    def measurement():
        raise error

    return run_guarded(measurement)


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (
            NotApplicableError("reads at most 64 tokens"),
            "not_applicable",
            "reads at most 64 tokens",
        ),
        (UserError("no such text"), "failed", "no such text"),
        (MemoryError(), "out_of_memory", "MemoryError"),
        (torch.OutOfMemoryError("2 GiB"), "out_of_memory", "OutOfMemoryError: 2 GiB"),
        (KeyError("x"), "failed", "KeyError: 'x'"),
        (ValueError("one\ntwo"), "failed", "ValueError: one"),
    ],
)
def test_what_goes_wrong_becomes_a_status_and_one_line(error, status, reason):
    outcome = fail_with(error)
    assert (outcome.row["status"], outcome.row["reason"]) == (status, reason)
    assert not outcome.ok
    assert outcome.value is None


def test_the_cpu_allocators_refusal_is_out_of_memory():
    outcome = run_guarded(lambda: torch.empty(2**60, dtype=torch.uint8))
    assert outcome.row["status"] == "out_of_memory"


def test_an_interrupt_is_not_a_result():
    with pytest.raises(KeyboardInterrupt):
        fail_with(KeyboardInterrupt())
