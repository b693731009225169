"""Every extension on a trained rotary model: chunks compose, and what does not apply is refused."""

import re

import pytest
import torch

from zoo.config import choices, compose
from zoo.errors import UserError
from zoo.extend import extend
from zoo.mixers.base import count_bytes

TRAINED = 16
FACTORS = {"pi": 2, "ntk": 2, "ntk_by_parts": 4, "yarn": 4, "llama3": 4}
EXTENSIONS = choices("extension")
# Nothing of these differs from the model within the trained length.
IDENTITIES = {
    "none",
    "dca",
    "streaming_llm",
    "window",
    "lm_infinite",
    "dynamic_ntk",
    "dynamic_yarn",
}
BOUNDED = {"streaming_llm", "window", "lm_infinite"}


def extension(name: str, *words: str):
    factor = [f"extension.factor={FACTORS[name]}"] if name in FACTORS else []
    small = ["extension.reach.sinks=2"] if name == "lm_infinite" else []
    return compose("eval", ["run=x", f"extension={name}", *factor, *small, *words]).extension


@pytest.fixture(params=EXTENSIONS)
def name(request) -> str:
    return request.param


def tokens(length: int) -> torch.Tensor:
    return torch.randint(32, (2, length), generator=torch.Generator().manual_seed(1))


def test_any_chunking_gives_the_whole_also_across_a_switch_of_the_scaling(name, tiny):
    model = extend(tiny("transformer"), extension(name), TRAINED)
    text = tokens(5 * TRAINED + 3)
    whole = model(text)
    for sizes in ([1] * text.shape[1], [TRAINED - 1, 2, 3 * TRAINED, TRAINED + 2]):
        state, outs = model.empty_state(2), []
        for chunk in text.split(sizes, 1):
            out, state = model(chunk, state)
            outs.append(out)
        torch.testing.assert_close(torch.cat(outs, 1), whole, rtol=1e-8, atol=1e-9)
        assert count_bytes(state) == model.state_bytes(text.shape[1], 2)
    if name in BOUNDED:
        assert model.state_bytes(10**6) == model.state_bytes(10**5)


def test_the_past_is_safe_from_the_future_under_every_extension(name, tiny):
    model = extend(tiny("transformer"), extension(name), TRAINED)
    text = tokens(3 * TRAINED)
    changed = text.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % 32
    torch.testing.assert_close(model(changed)[:, :20], model(text)[:, :20], rtol=1e-9, atol=1e-10)


def test_within_the_trained_length_a_training_free_method_changes_nothing(name, tiny):
    plain, text = tiny("transformer"), tokens(TRAINED)
    extended = extend(tiny("transformer"), extension(name), TRAINED)(text)
    same = torch.allclose(extended, plain(text), rtol=1e-9, atol=1e-10)
    assert same == (name in IDENTITIES)


def test_every_extension_reads_beyond_what_it_was_trained_on(name, tiny):
    plain, text = tiny("transformer"), tokens(4 * TRAINED)
    extended = extend(tiny("transformer"), extension(name), TRAINED)(text)
    assert extended.isfinite().all()
    assert torch.allclose(extended, plain(text)) == (name == "none")


@pytest.mark.parametrize("scaling", ["pi", "ntk", "yarn", "dynamic_ntk"])
def test_dual_chunk_attention_composes_with_a_scaling(scaling, tiny):
    words = [f"extension.scaling={scaling}", "extension.factor=2"]
    both = extend(tiny("transformer"), extension("dca", *words), TRAINED)
    alone = extend(tiny("transformer"), extension("dca"), TRAINED)
    text = tokens(4 * TRAINED)
    assert not torch.allclose(both(text), alone(text))
    one, state = both(text[:, :30], both.empty_state(2))
    two, _ = both(text[:, 30:], state)
    torch.testing.assert_close(torch.cat([one, two], 1), both(text), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("model", ["mamba", "alibi", "nope", "learned"])
def test_a_model_without_rotary_positions_is_refused_in_one_line(model, tiny):
    with pytest.raises(UserError, match="extension=dca acts on rotary positions") as caught:
        extend(tiny(model), extension("dca"), TRAINED)
    assert "\n" not in str(caught.value)
    assert extend(tiny(model), extension("none"), TRAINED)


def test_settings_that_do_not_go_together_are_refused(tiny):
    windowed = extension("streaming_llm", "extension.scaling=dynamic_ntk")
    with pytest.raises(UserError, match="do not depend on the length"):
        extend(tiny("transformer"), windowed, TRAINED)
    with pytest.raises(UserError, match="sinks=16 < window=16"):
        extend(tiny("transformer"), extension("streaming_llm", "extension.reach.sinks=16"), TRAINED)
    tuned = extend(tiny("transformer"), extension("yarn"), TRAINED)
    with pytest.raises(UserError, match="fine-tuned under an extension of its own"):
        extend(tuned, extension("dca"), TRAINED)


@pytest.mark.parametrize(
    ("words", "told"),
    {
        "extension=dcaa": "did you mean 'dca'?",
        "extension=pi": "extension.factor= is needed: times the trained length",
        "extension=pi extension.factor=0.5": "extension.factor=0.5: must be greater than",
        "extension=dca extension.scaling=yarnn": "did you mean 'yarn'?",
        "extension=dca extension.reach.chnk=3": "did you mean 'extension.reach.chunk'?",
        "extension=yarn extension.factor=2 extension.original_length=0": "original_length=0",
    }.items(),
)
def test_a_mistake_in_an_extension_is_one_clear_line(words, told):
    with pytest.raises(UserError, match=re.escape(told)) as caught:
        compose("eval", ["run=x", *words.split()])
    assert "\n" not in str(caught.value)
