"""The audit finds every kind of leak, however small, and none in an honest architecture."""

import math

import numpy as np
import pytest
import torch
from building import ENCODERS, train_config
from torch import nn

from zoo.errors import UserError
from zoo.mixers.base import Mixer, linear
from zoo.mixers.feed_forward import SwiGLU
from zoo.mixers.parts import shifted
from zoo.mixers.softmax import SoftmaxAttention
from zoo.model.audit import Audit, audit
from zoo.model.backbone import Backbone
from zoo.model.build import build_model

LENGTH, VOCABULARY = 32, 64
TINY = 1e-7  # a leak so small that float32 can hardly hold it beside what it is added to


class Honest(Mixer):
    """Two tokens, and nothing else; `leak`, of what it should not see, is added below."""

    size = 1.0

    def __init__(self, *, width: int, layer: int = 0, layers: int = 1) -> None:
        super().__init__()
        self.now, self.before = linear(width, width), linear(width, width)

    def forward(self, x, state=None):
        y = self.now(x) + self.before(shifted(x, state[0] if state else None))
        y = y + self.size * self.leak(x, state)
        return y if state is None else (y, (x[:, -1], state[1] + x.shape[1]))

    def leak(self, x, state):
        return 0 * x

    def empty_state(self, batch):
        return self.now.weight.new_zeros(batch, self.now.in_features), 0


def ahead(x, by: int = 1):
    """The token `by` places later, zeros where there is none."""
    return nn.functional.pad(x, (0, 0, 0, by))[:, by:]


class ReadsOneAhead(Honest):
    def leak(self, x, state):
        return ahead(x)


class ReadsSevenAhead(Honest):
    def leak(self, x, state):
        return ahead(x, 7)


class ReadsTheLastTokenOfAll(Honest):
    def leak(self, x, state):
        return x[:, -1:].expand_as(x)


class CentresOverTheWindow(Honest):
    def leak(self, x, state):
        return x - x.mean(1, keepdim=True)


class ScalesOverTheWindow(Honest):
    def leak(self, x, state):
        return x / x.std(1, keepdim=True) if x.shape[1] > 1 else 0 * x


class CentresOverTheRows(Honest):
    def leak(self, x, state):
        return x - x.mean(0)


class ReadsTheNextRow(Honest):
    def leak(self, x, state):
        return x.roll(1, 0)


class AttendsBothWaysInBlocks(Honest):
    def leak(self, x, state):
        blocks = nn.functional.pad(x, (0, 0, 0, -x.shape[1] % 16)).unflatten(1, (-1, 16))
        return blocks.mean(2, keepdim=True).expand_as(blocks).flatten(1, 2)[:, : x.shape[1]]


class LeaksAtTheEndsOfBlocks(Honest):
    def leak(self, x, state):
        ends = (torch.arange(x.shape[1]) % 16 == 15)[:, None]
        return ahead(x) * ends


class LeaksBeyondTheTrainingLength(Honest):
    def leak(self, x, state):
        return ahead(x) * (x.shape[1] > LENGTH)


class LeaksWithoutAState(Honest):
    def leak(self, x, state):
        return ahead(x) * (state is None)


class LeaksWithAState(Honest):
    def leak(self, x, state):
        return ahead(x) * (state is not None)


class LeaksInTraining(Honest):
    def leak(self, x, state):
        return ahead(x) * self.training


class SumsFromTheEnd(Honest):
    def leak(self, x, state):
        return x.flip(1).cumsum(1).flip(1) / x.shape[1]


class KnowsTheLength(Honest):
    def leak(self, x, state):
        return x * x.shape[1]


class RemembersOtherTexts(Honest):
    def leak(self, x, state):
        before, self.last = getattr(self, "last", x.mean((0, 1))), x.mean((0, 1))
        return 10 * before.expand_as(x)


class ForgetsBetweenChunks(Honest):
    def forward(self, x, state=None):
        return super().forward(x, state and (self.size * 0 + state[0] * (1 - self.size), state[1]))


LEAKS = Honest.__subclasses__()


class FourierConvolution(Mixer):
    """An honest mixer whose rounding is spread over all tokens: a long convolution by FFT."""

    def __init__(self, *, width: int, layer: int = 0, layers: int = 1) -> None:
        super().__init__()
        self.decay = nn.Parameter(torch.linspace(0.5, 4.0, width))
        self.proj = linear(width, width)

    def forward(self, x):
        t = x.shape[1]
        kernel = torch.exp(-self.decay * torch.arange(t, device=x.device)[:, None].to(x))
        wide = torch.fft.rfft(x, 2 * t, 1) * torch.fft.rfft(kernel, 2 * t, 0)
        return self.proj(torch.fft.irfft(wide, 2 * t, 1)[:, :t].to(x))


class InnerFloat32(FourierConvolution):
    """One that computes in float32 whatever it is given."""

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            proj = nn.functional.linear(self._mixed(x.float()), self.proj.weight.float())
        return proj.to(x)

    def _mixed(self, x):
        t = x.shape[1]
        kernel = torch.exp(-self.decay.float() * torch.arange(t)[:, None])
        wide = torch.fft.rfft(x, 2 * t, 1) * torch.fft.rfft(kernel, 2 * t, 0)
        return torch.fft.irfft(wide, 2 * t, 1)[:, :t]


class Draws(Honest):
    """Honest dropout: it draws random numbers in training."""

    def leak(self, x, state):
        return nn.functional.dropout(x, 0.3, self.training)


def model_of(kind: type[Mixer], size: float = 1.0) -> Backbone:
    """Attention above and below the mixer in question."""
    torch.manual_seed(0)

    def mixer(layer: int, **place):
        if layer != 1:
            return SoftmaxAttention(heads=2, layer=layer, **place)
        made = kind(layer=layer, **place)
        made.size = size
        return made

    return Backbone(vocab_size=VOCABULARY, width=16, layers=3, mixers=[mixer], feed_forwards=[None])


def some_text(length: int = 2 * LENGTH) -> torch.Tensor:
    return torch.randint(VOCABULARY, (length,), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("size", "autocast"), [(1.0, None), (TINY, torch.bfloat16)])
@pytest.mark.parametrize("kind", LEAKS, ids=lambda kind: kind.__name__)
def test_every_kind_of_leak_is_reported(kind, size, autocast):
    found = audit(model_of(kind, size), some_text(), autocast=autocast)
    assert not found.ok
    assert found.worst > 4
    assert len(found.reason.splitlines()) == 1


def test_the_reason_says_what_was_seen():
    def reason(kind):
        return audit(model_of(kind), some_text()).reason

    assert reason(ReadsOneAhead).startswith("it reads the future: ")
    assert reason(CentresOverTheRows).startswith("it mixes the rows of a batch: ")
    assert reason(KnowsTheLength).startswith("it depends on how much text follows: ")
    assert reason(ForgetsBetweenChunks).startswith("reading in chunks differs")
    assert f"of {2 * LENGTH} tokens" in reason(LeaksBeyondTheTrainingLength)
    assert "in training" in reason(LeaksInTraining)
    assert "with a state" in reason(LeaksWithAState)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", [Honest, FourierConvolution, InnerFloat32, Draws])
def test_an_honest_model_passes_whatever_its_rounding(kind, autocast):
    found = audit(model_of(kind), some_text(), autocast=autocast)
    assert (found.ok, found.reason) == (True, None)
    assert found.worst < 0.5
    assert found.lengths == (LENGTH, 2 * LENGTH)
    assert found.state == (kind in (Honest, Draws))


def test_every_architecture_passes(architecture, tiny):
    model = tiny(architecture, dtype=torch.float32)
    found = audit(model, some_text(192) % 32, lengths=[96], autocast=torch.bfloat16)
    assert found.ok, found.reason
    assert found.worst < 0.5
    assert found.state


def test_a_model_after_an_audit_is_as_before():
    model = model_of(Honest).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    drawn = torch.random.get_rng_state()
    audit(model, some_text())
    assert model.training
    assert model.head.weight is model.embedding.weight
    assert torch.equal(torch.random.get_rng_state(), drawn)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert model(some_text()[None]).shape[-1] == VOCABULARY


@pytest.mark.parametrize("name", ENCODERS[:2])
def test_an_encoder_is_exempt_by_what_it_declares(name, tiny):
    assert audit(tiny(name, "objective=masked"), some_text()) == Audit(ok=True)


def test_no_longer_text_is_read_than_the_model_can(tiny):
    model = tiny("learned", dtype=torch.float32)
    assert audit(model, some_text(1024) % 32).lengths == (model.max_length,)


def test_text_comes_as_numbers_of_any_kind():
    model, text = model_of(ReadsOneAhead), some_text()
    wanted = audit(model, text)
    assert audit(model, text[None]) == wanted
    assert audit(model, text.numpy().astype(np.uint8)) == wanted


class BreaksBeyond(Honest):
    """Gives no numbers for texts of more than `LENGTH` tokens."""

    def forward(self, x, *args):
        y, *rest = super().forward(x, *args) if args else (super().forward(x),)
        y = y * math.nan if x.shape[1] > LENGTH else y
        return (y, *rest) if args else y


def test_a_length_without_finite_outputs_is_left_out_of_what_was_read():
    found = audit(model_of(BreaksBeyond), some_text())
    assert found.ok
    assert found.lengths == (LENGTH,)
    assert set(found.tokens.values()) == {LENGTH}


@pytest.mark.parametrize(("count", "why"), [(2 * LENGTH, "not finite"), (1, "a single token")])
def test_an_audit_that_could_compare_nothing_is_none(count, why):
    model = model_of(Honest)
    if count > 1:
        nn.init.constant_(model.norm.weight, math.nan)
    with pytest.raises(ValueError, match=f"^nothing could be compared: .*{why}"):
        audit(model, some_text(count))


def test_the_record_is_plain():
    record = audit(model_of(ReadsOneAhead), some_text()).record()
    assert record["ok"] is False
    assert isinstance(record["reason"], str)
    assert record["lengths"] == [LENGTH, 2 * LENGTH]
    assert record["tokens"] == {"float64": 2 * LENGTH, "float32": 2 * LENGTH}


def test_how_far_it_read_in_each_arithmetic_is_recorded(monkeypatch):
    monkeypatch.setattr("zoo.model.audit.SHARP", LENGTH)
    found = audit(model_of(Honest), some_text())
    assert found.tokens == {"float64": LENGTH, "float32": 2 * LENGTH}


def test_a_model_that_declares_to_read_both_ways_is_not_trained_left_to_right(monkeypatch):
    monkeypatch.setattr(SwiGLU, "causal", False)
    with pytest.raises(UserError, match="SwiGLU declares causal=False, so it cannot be trained"):
        build_model(train_config("size=tiny", "match=none"), 64)
