"""The backbone's own options, beside what the contract checks of every architecture."""

import pytest
import torch
from building import train_config

from zoo.config.compose import compose
from zoo.errors import UserError
from zoo.mixers.base import count_bytes
from zoo.model.build import build_model
from zoo.model.extend import extend

VOCABULARY, L = 32, 16  # of the fixture `tiny`; the trained length of the extensions
MORE = {"learned": ["model.positions.max_length=300"]}


def with_and_without(tiny, name: str, extension: str = "none"):
    """A model with a sink token, and one whose vocabulary has that token as its last."""
    words = [f"extension={extension}"]
    words += ["extension.attention.sinks=1"] if extension == "streaming_llm" else []
    chosen = compose("eval", ["run=x", *words]).extension
    more = ["match=none", *MORE.get(name, [])]
    own, plain = (tiny(name, f"model.sink_token={one}", *more) for one in ("true", "false"))
    weights = own.state_dict()
    sink = weights.pop("sink")
    weights["embedding.weight"] = torch.cat([weights["embedding.weight"], sink[None]])
    weights["head.weight"] = weights["embedding.weight"]
    plain.embedding = torch.nn.Embedding(VOCABULARY + 1, plain.width, dtype=torch.float64)
    plain.head.weight = plain.embedding.weight
    plain.load_state_dict(weights)
    return [extend(model.requires_grad_(False), chosen, L) for model in (own, plain)]


CASES = [("transformer", "none"), ("transformer", "streaming_llm"), ("transformer", "dca"),
         ("learned", "none"), ("sinusoidal", "none"), ("alibi", "lm_infinite"), ("mamba", "none"),
         ("rwkv7", "none"), ("longformer", "none")]  # fmt: skip


@pytest.mark.parametrize(("name", "extension"), CASES)
def test_a_sink_token_is_a_token_before_every_text_that_nobody_predicts_from(name, extension, tiny):
    own, plain = with_and_without(tiny, name, extension)
    text = torch.randint(VOCABULARY, (2, 3 * L))
    ahead = torch.full((2, 1), VOCABULARY)
    expected = plain(torch.cat([ahead, text], 1))[:, 1:, :VOCABULARY]
    torch.testing.assert_close(own(text), expected, rtol=1e-9, atol=1e-10)
    state, outs = own.empty_state(2), []
    assert count_bytes(state) == own.state_bytes(0, 2)
    for piece in text.split([1, L, 2, 2 * L - 3], 1):
        out, state = own(piece, state)
        assert count_bytes(state) == own.state_bytes(state.tokens_seen, 2)
        outs.append(out)
    assert state.tokens_seen == 3 * L
    torch.testing.assert_close(torch.cat(outs, 1), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ["transformer", "learned"])
def test_a_sink_token_learns_and_has_position_0_where_windows_are_placed(name, tiny):
    own = tiny(name, "model.sink_token=true", "match=none", *MORE.get(name, []))
    text = torch.randint(VOCABULARY, (2, L))
    at = torch.arange(L - 1).expand(2, -1)
    plain = own.loss(text)
    torch.testing.assert_close(own.loss(text, positions=at), plain, rtol=1e-12, atol=0)
    plain.backward()
    assert own.sink.grad.any()
    if name == "learned":  # one position is the token's
        assert own.max_length == 299


def test_a_window_as_long_as_all_learned_positions_leaves_none_for_a_sink_token():
    words = ["model=learned", "size=tiny", "model.sink_token=true", "match=none", "seq_len=64"]
    config = train_config(*words)
    advice = r"reads at most 63 tokens\. Use model\.sink_token=false"
    with pytest.raises(UserError, match=advice):
        build_model(config, VOCABULARY)
