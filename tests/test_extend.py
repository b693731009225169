"""Every extension on a trained rotary model: chunks compose, and what does not apply is refused."""

import copy
import functools
import itertools
import re
from collections.abc import Iterator

import pytest
import torch
from building import MODEL_OF
from pydantic import ValidationError

from zoo.attention.parallel_windows import ParallelWindows
from zoo.config import applicability
from zoo.config.compose import compose
from zoo.config.effects import check_extension
from zoo.config.groups import choices, extensions
from zoo.config.introspect import constructor_parameters, target_parameters
from zoo.config.schema.model import Extension
from zoo.config.validate import plain, validate
from zoo.errors import UserError, shown
from zoo.mixers.base import count_bytes
from zoo.mixers.softmax import SoftmaxAttention
from zoo.model.backbone import Backbone
from zoo.model.build import build_model
from zoo.model.extend import declared_by, extend, places, position_schemes
from zoo.positions.alibi import ALiBi, slopes
from zoo.positions.learned import Learned
from zoo.positions.local_rope import LocalRope
from zoo.positions.none import NoPositions
from zoo.positions.rope import Rope, apply_rope, inverse_frequencies
from zoo.positions.scaling import temperature

TRAINED = 16
EXTENSIONS = [name for name, tree in extensions().items() if not tree.get("positions")]
FACTORS = {name: 4 for name, tree in extensions().items() if tree["factor"] == "???"}
FACTORS |= {"pi": 2, "ntk": 2}
MORE = {
    "lm_infinite": ["extension.attention.sinks=2"],
    "longrope": [
        f"extension.scaling.long_factors={[1, 1, *14 * [3.5]]}",
        "extension.scaling.n_hat=4",
    ],
}
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
ROPED = [name for name in EXTENSIONS if extensions()[name]["scaling"] and name not in MODEL_OF]
BOUNDED = {"streaming_llm", "window", "lm_infinite"}


def extension(name: str, *words: str):
    given = any(word.startswith("extension.factor=") for word in words)
    factor = [f"extension.factor={FACTORS[name]}"] if name in FACTORS and not given else []
    small = MORE.get(name, [])
    return compose("eval", ["run=x", f"extension={name}", *factor, *small, *words]).extension


@pytest.fixture(params=EXTENSIONS)
def name(request) -> str:
    return request.param


def tokens(length: int) -> torch.Tensor:
    return torch.randint(32, (2, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_any_chunking_gives_the_whole_also_across_a_switch_of_the_scaling(name, tiny):
    model = extend(tiny(MODEL_OF.get(name, "transformer")), extension(name), TRAINED)
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
    model = extend(tiny(MODEL_OF.get(name, "transformer")), extension(name), TRAINED)
    text = tokens(3 * TRAINED)
    changed = text.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % 32
    torch.testing.assert_close(model(changed)[:, :20], model(text)[:, :20], rtol=1e-9, atol=1e-10)


def test_within_the_trained_length_a_training_free_method_changes_nothing(name, tiny):
    plain, text = tiny(MODEL_OF.get(name, "transformer")), tokens(TRAINED)
    extended = extend(tiny(MODEL_OF.get(name, "transformer")), extension(name), TRAINED)(text)
    same = torch.allclose(extended, plain(text), rtol=1e-9, atol=1e-10)
    assert same == (name in IDENTITIES)


def test_every_extension_reads_beyond_what_it_was_trained_on(name, tiny):
    plain, text = tiny(MODEL_OF.get(name, "transformer")), tokens(4 * TRAINED)
    extended = extend(tiny(MODEL_OF.get(name, "transformer")), extension(name), TRAINED)(text)
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


@pytest.mark.parametrize("schemes", itertools.permutations([LocalRope, NoPositions]))
def test_embedded_positions_are_those_of_the_layers_that_a_pattern_acts_on(schemes):
    """A layer that has a window of its own, and is left as it is, does not decide for them."""
    model = Backbone(
        vocab_size=32,
        width=8,
        layers=2,
        mixers=[functools.partial(SoftmaxAttention, heads=2, positions=one) for one in schemes],
        feed_forwards=[None],
        positions=Learned(8, max_length=64),
    )
    extend(model, extension("pcw"), TRAINED)
    assert model.positions is not None
    assert isinstance(model.positions.pattern, ParallelWindows)


@pytest.mark.parametrize("model", ["mamba", "nope", "learned"])
def test_a_model_without_distances_is_refused_in_one_line(model, tiny):
    refused = "extension=dca: acts on positions=alibi, rope, t5, and"
    with pytest.raises(UserError, match=refused) as caught:
        extend(tiny(model), extension("dca"), TRAINED)
    assert "\n" not in str(caught.value)
    leave_out = "none, lm_infinite, pcw, streaming_llm, structured, window"  # which leave keys out
    takes = "none" if model == "mamba" else leave_out
    trained = "pose with extension.scaling=null, randomised"
    takes += f", or to train with {trained}" if model == "learned" else ""
    assert str(caught.value).endswith(f". Use extension={takes}.")
    assert extend(tiny(model), extension("none"), TRAINED)


def test_settings_that_do_not_go_together_are_refused(tiny):
    windowed = extension("streaming_llm", "extension.scaling=dynamic_ntk")
    with pytest.raises(UserError, match="scaling cannot depend on the length"):
        extend(tiny("transformer"), windowed, TRAINED)
    all_sinks = extension("streaming_llm", "extension.attention.sinks=16")
    with pytest.raises(UserError, match="sinks=16: must be from 0 to 15"):
        extend(tiny("transformer"), all_sinks, TRAINED)


def dense(mixer, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """Causal attention over tokens at positions `at` (b, t), every score formed on its own."""
    q, k, v = (
        p(x).unflatten(-1, (mixer.heads, -1)) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj)
    )
    apart = (at[:, :, None] - at[:, None]).double()[:, None]  # (b, 1, t, t)
    if isinstance(mixer.positions, Rope):
        theta = torch.tensor(inverse_frequencies(mixer.head_width), dtype=torch.float64)
        q, k = (torch.complex(*y.chunk(2, -1)) for y in (q, k))
        phases = torch.polar(torch.ones(()).double(), apart[..., None] * theta)
        scores = torch.einsum(
            "bihd,bjhd,bhijd->bhij", q, k.conj(), phases.expand(-1, mixer.heads, -1, -1, -1)
        ).real
    else:
        slope = torch.tensor(slopes(mixer.heads), dtype=torch.float64)[:, None, None]
        scores = torch.einsum("bihd,bjhd->bhij", q, k) - slope * apart * mixer.head_width**0.5
    weights = (scores / mixer.head_width**0.5).masked_fill(apart < 0, -torch.inf).softmax(-1)
    return mixer.o_proj(torch.einsum("bhij,bjhd->bihd", weights, v).flatten(-2))


@pytest.mark.parametrize("model", ["transformer", "alibi"])
def test_a_training_windows_tokens_are_where_they_are_placed(model, tiny):
    mixer = tiny(model).sublayers()[0]
    x = torch.randn(2, 9, mixer.q_proj.in_features, dtype=torch.float64)
    at = torch.stack([torch.randperm(999)[:9].sort().values for _ in range(2)])
    torch.testing.assert_close(mixer(x, cross_layer={"positions": at}), dense(mixer, x, at))


def test_interpolated_slopes_are_positions_divided_also_past_a_state(tiny):
    """And nothing but linear biases takes them, alone or under a remap."""
    mixer = extend(tiny("alibi"), extension("alibi_interpolation"), TRAINED).sublayers()[0]
    x = torch.randn(2, 40, mixer.q_proj.in_features, dtype=torch.float64)
    expected = dense(mixer, x, torch.arange(40)[None] / 4)
    one, state = mixer(x[:, :17], mixer.empty_state(2))
    two, _ = mixer(x[:, 17:], state)
    torch.testing.assert_close(torch.cat([one, two], 1), expected)
    torch.testing.assert_close(mixer(x), expected)
    with pytest.raises(UserError, match="acts on positions=alibi, and this") as caught:
        extend(tiny("transformer"), extension("alibi_interpolation"), TRAINED)
    assert re.search(r"Use extension=none, (?!.*alibi).*dca", str(caught.value))
    more = ("extension.scaling=alibi_interpolation", "extension.factor=2")
    both = extend(tiny("alibi"), extension("dca", *more), TRAINED).sublayers()[0].positions
    assert both.slopes() == [slope / 2 for slope in slopes(2)]
    assert both.pattern.chunk == 12
    with pytest.raises(UserError, match="acts on positions=alibi, and this model has"):
        extend(tiny("transformer"), extension("dca", *more), TRAINED)


def test_longrope_reads_by_short_factors_up_to_the_window_and_by_long_ones_strictly_above(tiny):
    def mixer(long: float, short: float):
        words = [f"long_factors={16 * [long]}", f"short_factors={16 * [short]}"]
        words = ["extension.factor=4", *(f"extension.scaling.{word}" for word in words)]
        found = compose("eval", ["run=x", "extension=longrope", *words]).extension
        return extend(tiny("transformer"), found, TRAINED).sublayers()[0]

    both, short, long = mixer(3.5, 1.2), mixer(1.2, 1.2), mixer(3.5, 3.5)
    x = torch.randn(2, 40, both.q_proj.in_features, dtype=torch.float64)
    whole = torch.cat([short(x)[:, :TRAINED], long(x)[:, TRAINED:]], 1)
    assert not torch.allclose(short(x)[:, TRAINED:], long(x)[:, TRAINED:])
    torch.testing.assert_close(both(x), whole)
    state, outs = both.empty_state(2), []
    for piece in x.split([TRAINED - 1, 1, 1, 40 - TRAINED - 1], 1):  # the switch in mid-stream
        out, state = both(piece, state)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), whole)


@pytest.mark.parametrize("window", [None, 8])
def test_a_learned_sink_is_one_more_key_at_no_distance(window, tiny):
    model = tiny("sink")
    if window:
        extend(model, extension("window", f"extension.attention.window={window}"), TRAINED)
    mixer = model.sublayers()[0]
    for learned in (mixer.sink_k, mixer.sink_v):
        torch.nn.init.normal_(learned)
    x = torch.randn(2, 20, mixer.q_proj.in_features, dtype=torch.float64)
    q, k, v = (
        p(x).unflatten(-1, (mixer.heads, -1)) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj)
    )
    sink = torch.einsum("bihd,hd->bhi", q, mixer.sink_k)[..., None]
    q, k = (apply_rope(y, inverse_frequencies(mixer.head_width)) for y in (q, k))
    apart = torch.arange(20)[:, None] - torch.arange(20)
    unseen = (apart < 0) | (apart >= (window or 20))
    scores = torch.einsum("bihd,bjhd->bhij", q, k).masked_fill(unseen, -torch.inf)
    weights = (torch.cat([scores, sink], -1) / mixer.head_width**0.5).softmax(-1)
    v = torch.cat([v, mixer.sink_v.expand(2, 1, -1, -1)], 1)
    expected = mixer.o_proj(torch.einsum("bhij,bjhd->bihd", weights, v).flatten(-2))
    torch.testing.assert_close(mixer(x), expected)
    state, outs = mixer.empty_state(2), []
    for piece in x.split([11, 1, 1, 7], 1):
        out, state = mixer(piece, state)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), expected)
    with pytest.raises(UserError, match="sink=true: cannot be combined with positions=alibi"):
        SoftmaxAttention(width=8, heads=2, positions=ALiBi, sink=True)


def test_placed_tokens_are_rotated_by_the_scaled_frequencies(tiny):
    words = ["finetune=x", "extension=pose", "extension.factor=4"]
    model = extend(tiny("transformer"), compose("train", words).extension, TRAINED)
    mixer, at = model.sublayers()[0], torch.tensor([[0, 1, 2, 40, 41, 63]])
    x = torch.randn(1, 6, mixer.q_proj.in_features, dtype=torch.float64)
    torch.testing.assert_close(mixer(x, cross_layer={"positions": at}), dense(mixer, x, at / 4))


def test_a_window_that_carries_few_keys_sees_these_under_a_scaling_too(tiny):
    mixer = extend(tiny("transformer"), extension("pi", "extension.factor=4"), 16).sublayers()[0]
    x = torch.randn(2, 40, mixer.q_proj.in_features, dtype=torch.float64)
    _, state = mixer(x[:, :28], mixer.empty_state(2))
    found, _ = mixer(x[:, 28:], mixer.truncate_state(state, 16))
    reference = dense(mixer, x[:, 12:], torch.arange(12, 40)[None] / 4)
    torch.testing.assert_close(found, reference[:, 16:])


PLACED = ["transformer", "alibi", "sinusoidal", "learned"]
FAR = 6 * TRAINED  # of the positions


def placed_rows(tokens: int) -> torch.Tensor:
    rows = [torch.randperm(end)[:tokens].sort().values for end in (tokens, FAR // 2, FAR)]
    return torch.stack(rows)


@pytest.mark.parametrize("name", PLACED)
def test_placed_tokens_are_read_alike_whole_in_chunks_and_when_read_again(name, tiny):
    model = tiny(name)
    text, at = torch.randint(32, (3, 20)), placed_rows(20)
    whole, state, outs = model(text, positions=at), model.empty_state(3), []
    for chunk in text.split([6, 1, 4, 9], 1):
        out, state = model(chunk, state, at)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), whole, rtol=1e-9, atol=1e-10)
    found = []
    for again in (False, True, 7):
        model.checkpoint_activations = again
        loss = model.train().labels_loss(text, text, at)
        found.append([loss, *torch.autograd.grad(loss, [*model.parameters()])])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-9, atol=1e-12)


SCALED = [name for name in ROPED if "zoo.positions.scaling" in str(extensions()[name]["scaling"])]


@pytest.mark.parametrize("name", SCALED)
def test_a_placed_row_is_rotated_as_alone_under_every_scaling(name, tiny):
    """Rows end at different positions, by which some scalings act."""
    scaling = plain(extension(name))["scaling"]
    pose = compose("train", ["finetune=x", "extension=pose", "extension.factor=4"]).extension
    under = validate(Extension, {**plain(pose), "scaling": scaling})
    model = extend(tiny("transformer"), under, TRAINED)
    text, at = torch.randint(32, (3, 12)), placed_rows(12)
    alone = [model(text[i : i + 1], positions=at[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(model(text, positions=at), torch.cat(alone), rtol=1e-9, atol=1e-10)


SELECTING = ["extension.attention.top_k=2", "extension.attention.window=8"]


@pytest.mark.parametrize(
    ("name", "words"), [*((name, []) for name in EXTENSIONS), ("lm_infinite", SELECTING)]
)
def test_a_state_that_is_passed_on_stays_as_large_as_it_was(name, words, tiny):
    model = extend(tiny(MODEL_OF.get(name, "transformer")), extension(name, *words), TRAINED)
    state, sizes = model.empty_state(2), []
    for window in tokens(6 * TRAINED).split(TRAINED, 1):
        out, state = model(window, state)
        assert out.isfinite().all()
        state = model.truncate_state(state, TRAINED)
        sizes.append(count_bytes(state))
    assert sizes[2] == sizes[-1]


@pytest.mark.parametrize("model", ["transformer", "alibi", "sinusoidal", "learned", "mamba"])
def test_tokens_placed_at_0_1_2_are_those_of_a_plain_window_and_elsewhere_are_not(model, tiny):
    network, text = tiny(model, "checkpoint_activations=true"), tokens(TRAINED)
    at = torch.arange(TRAINED - 1).expand(2, -1)
    found, plain = network.loss(text, positions=at), network.loss(text)
    torch.testing.assert_close(found, plain, rtol=1e-12, atol=0)
    same = torch.allclose(network.loss(text, positions=3 * at), plain)
    assert same == (model == "mamba")


def test_trained_frequencies_learn_and_read_alike_in_any_chunks(tiny):
    words = ["finetune=x", "extension=clex", "extension.factor=4"]
    model = extend(tiny("transformer"), compose("train", words).extension, TRAINED).double()
    torch.nn.init.normal_(model.frequencies.field.down.weight, std=0.1)
    text, at = tokens(5 * TRAINED), torch.arange(2 * TRAINED - 1).expand(2, -1)
    for loss in (model.loss(text), model.loss(text[:, : 2 * TRAINED], positions=at)):
        grads = torch.autograd.grad(loss, [*model.frequencies.parameters()])
        assert all(grad.isfinite().all() and grad.any() for grad in grads)
    with torch.no_grad():
        whole, state, outs = model(text), model.empty_state(2), []
        for chunk in text.split([TRAINED - 1, 1, 1, 2 * TRAINED, 2 * TRAINED - 1], 1):
            out, state = model(chunk, state)
            outs.append(out)
        torch.testing.assert_close(torch.cat(outs, 1), whole, rtol=1e-8, atol=1e-9)
        plain = tiny("transformer")(text[:, :TRAINED])
        torch.testing.assert_close(whole[:, :TRAINED], plain, rtol=1e-9, atol=1e-10)
        model.frequencies.field.down.weight.mul_(2)  # nothing solved before is read again
        assert not torch.allclose(model(text), whole)
    with pytest.raises(UserError, match="is trained on windows"):
        extend(tiny("transformer"), extension("dca", "extension.scaling=clex"), TRAINED)


def test_what_gives_tokens_their_positions_is_refused_where_it_cannot(tiny):
    words = ["finetune=x", "seq_len=16", "extension.factor=4"]
    pose = compose("train", [*words, "extension=pose", "extension.original_length=16"]).extension
    with pytest.raises(
        UserError, match=r"extension.factor=4: gives positions up to 64, fewer than the 128 tokens"
    ):
        extend(tiny("transformer"), pose, 128)
    randomised = compose("train", ["extension=randomised", "extension.factor=4"]).extension
    with pytest.raises(UserError, match="acts on positions=alibi, learned, rope, sinusoidal"):
        extend(tiny("mamba"), randomised, TRAINED)
    with pytest.raises(
        UserError, match=r"to 1024, and the model has 256. Use model.positions.max_length=1024"
    ):
        extend(tiny("learned"), randomised, 256)
    for more, message in {
        "extension=pi": "acts on a trained model",
        "extension=pose": "acts on a trained model",
        "extension=randomised state_passing=carry": "state_passing=none",
        "extension=randomised objective=masked": "objective=causal",
        "extension=pose extension.attention=null extension.positions.rows=3": "positions.chunks",
    }.items():
        with pytest.raises(UserError, match=message):
            compose("train", ["extension.factor=4", *more.split()])
    with pytest.raises(UserError, match="extension=pose: is a way to train"):
        compose("eval", ["run=x", "extension=pose", "extension.factor=4"])


@pytest.mark.parametrize(
    ("words", "message"),
    {
        "streaming_llm window=-3": "window=-3: must be from 1 to 16, within the trained length.",
        "streaming_llm window=8 sinks=9": "sinks=9: must be from 0 to 7, less than window=8.",
        "streaming_llm window=abc": "window=abc: must be an integer or null",
        "window window=17": "window=17: must be from 1 to 16, within the trained length.",
        "lm_infinite window=8 sinks=-1": "sinks=-1: must be from 0 to 7, less than window=8.",
        "self_extend group=0": "group=0: must be >= 1.",
        "rerope window=0": "window=0: must be from 1 to 16, within the trained length.",
        "dca far_position=16": "far_position=16: must be from chunk=12 to 15, less than the tr",
    }.items(),
)
def test_a_pattern_that_cannot_be_is_reported_by_the_option_as_it_is_typed(words, message, tiny):
    name, *options = words.split()
    requested = [f"extension.attention.{option}" for option in options]
    with pytest.raises(UserError) as caught:
        extend(
            tiny("transformer"),
            compose("eval", ["run=x", f"extension={name}", *requested]).extension,
            TRAINED,
        )
    assert str(caught.value).startswith(f"extension.attention.{message}")


REMAPS = [name for name, tree in extensions().items() if tree["attention"]]


def refusal(tree, model) -> str | None:
    """The message on an extension's settings; None where they are accepted."""
    try:
        extend(model, Extension.model_validate(tree), TRAINED)
    except ValidationError as error:  # a value of the wrong type
        return f"extension.attention.{error.errors()[0]['ctx']['error']}"
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize("remap", REMAPS)
def test_every_setting_of_a_pattern_is_accepted_or_named_in_its_refusal(remap, tiny):
    tree = extensions()[remap]
    given = [None, True, "abc", [1], 1.5, -1, 0, 1, TRAINED, TRAINED + 1, 10**12]
    options = target_parameters(tree["attention"]["_target_"])
    assert options
    for option, value in itertools.product(options, given):
        attention = {**tree["attention"], option: value}
        message = refusal({**tree, "attention": attention}, tiny("transformer"))
        if message is not None:
            named = re.fullmatch(r"extension\.attention\.(\w+)=(\S+): must [^\n]*", message)
            assert named, message
            assert named[1] in options
            assert named[1] != option or named[2] == shown(value)


def test_a_trained_length_too_short_for_a_pattern_is_reported_by_its_option(tiny):
    tree = extensions()["dca"]
    with pytest.raises(UserError, match=r"^extension\.original_length=1: must be >= 2"):
        extend(tiny("transformer"), Extension.model_validate(tree), 1)


@pytest.mark.parametrize(
    ("words", "message"),
    {
        "extension=dcaa": "Did you mean 'dca'?",
        "extension=pi": "extension.factor=: must be given (times the trained length, for scaling).",
        "extension=pi extension.factor=0.5": "extension.factor=0.5: must be greater than",
        "extension=dca extension.scaling=yarnn": "Did you mean 'yarn'?",
        "extension=dca extension.attention.chnk=3": "Did you mean 'extension.attention.chunk'?",
        "extension=yarn extension.factor=2 extension.original_length=0": "original_length=0",
    }.items(),
)
def test_a_mistake_in_an_extension_is_one_clear_line(words, message):
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        compose("eval", ["run=x", *words.split()])
    assert "\n" not in str(caught.value)


def test_what_applies_is_reported_alike_by_a_configuration_and_by_its_model():
    for name in choices("model"):
        words = [f"model={name}", "size=tiny", "match=none", "size.layers=3"]
        config = compose("train", words)  # as many layers as the hybrid's pattern has
        model = build_model(config, 256)[0]
        found = {declared_by(scheme) for scheme in position_schemes(model)}
        assert applicability.position_schemes(config.model) == found, name


@pytest.mark.parametrize(("mscale", "all_dim"), [(1.0, 1.0), (0.707, 0.707), (1.0, 0.5), (1.0, 0)])
def test_scores_have_both_halves_of_deepseeks_temperature(tiny, mscale, all_dim):
    """cos and sin divided by the temperature of all channels, the scores times its square."""
    model, factor = tiny("transformer"), 8.0
    words = [f"extension.scaling.mscale={mscale}", f"extension.scaling.mscale_all_dim={all_dim}"]
    extension = compose("eval", ["run=x", "extension=yarn", f"extension.factor={factor}", *words])
    extend(model, extension.extension, 256)
    mixer = model.sublayers()[0]
    _, magnitude = mixer.positions.pattern.scaling(256)
    rotated = temperature(factor, mscale) / temperature(factor, all_dim)
    assert magnitude**2 == pytest.approx(rotated**2 * temperature(factor, all_dim) ** 2)


CANDIDATES = [1, 2, 3, 5, 7, 12, 0.5, True, False, [1.5] * 16]
CANDIDATES += ["paper", "code", "arith", "harmonic", "su", "yarn", "none"]


def extension_options() -> Iterator[tuple[str, str]]:
    """Every option of every extension: factor, original_length, and what its parts take."""
    for name, tree in extensions().items():
        yield from ((name, key) for key in ("factor", "original_length") if name != "none")
        for slot in ("scaling", "attention", "positions"):
            part = tree.get(slot)
            for option in (
                target_parameters(part["_target_"]) or [] if isinstance(part, dict) else []
            ):
                yield name, f"{slot}.{option}"


@functools.cache
def composed_extension(name: str) -> dict:
    """The tree of an extension by a factor of 3, or 1 where it has no scaling of its own."""
    tree = extensions()[name]
    words = [f"extension={name}", *MORE.get(name, [])]
    own = tree["scaling"] if isinstance(tree["scaling"], dict) else {}
    scaled = own and "factor" in (constructor_parameters(own["_target_"]) or [])
    words += ["extension.factor=3"] if scaled or tree.get("positions") else []
    program = ["train", "finetune=x"] if tree.get("positions") else ["eval", "run=x"]
    return plain(compose(program[0], [*program[1:], *words]).extension)


def outcome(name: str, tree: dict, given: list[str], tiny) -> tuple[float, float] | None:
    """Sums over a model's logits under an extension and its training positions; None: refused."""
    try:
        requested = validate(Extension, tree)
        check_extension(requested, given)
        model = extend(tiny(MODEL_OF.get(name, "transformer")), requested, TRAINED)
        torch.manual_seed(0)
        for parameter in model.frequencies.parameters() if model.frequencies else ():
            torch.nn.init.normal_(parameter, std=0.3)
        draw = places(requested, TRAINED)
        drawn = draw(2, TRAINED, torch.Generator().manual_seed(0)) if draw else torch.zeros(0)
        with torch.no_grad():
            logits = model(tokens(6 * TRAINED))
    except ValueError:
        return None
    weights = torch.linspace(1, 2, logits.numel(), dtype=torch.float64).view_as(logits)
    return float((logits * weights).sum()), float((drawn * drawn).sum())


@pytest.mark.parametrize(("name", "option"), [*extension_options()], ids=str)
def test_an_option_of_an_extension_acts_or_is_refused(name, option, tiny):
    tree = copy.deepcopy(composed_extension(name))
    if "truncate" in (tree["scaling"] or {}) and tree["scaling"]["ramp"] == "code":
        tree["scaling"]["truncate"] = option == "scaling.truncate"  # ends between two pairs
    without, accepted = outcome(name, tree, [], tiny), 0
    assert without is not None
    for value in CANDIDATES:
        changed = copy.deepcopy(tree)
        *above, last = option.split(".")
        section = changed[above[0]] if above else changed
        before = section.get(last)
        if before == value and isinstance(before, bool) == isinstance(value, bool):
            continue
        section[last] = value
        found = outcome(name, changed, [f"extension.{option}"], tiny)
        if found not in (None, without):
            return
        accepted += found is not None
    assert not accepted, f"extension.{option} changes nothing under extension={name}"


@pytest.mark.parametrize("name", ["dynamic_ntk", "dynamic_yarn"])
def test_a_scaling_by_the_length_may_change_at_every_token(name, tiny):
    """Row t is attention under the frequencies of a text of t + 1 tokens: s = l / L."""
    mixer = extend(tiny("transformer"), extension(name, "extension.step=1"), TRAINED).sublayers()[0]
    x = torch.randn(1, 3 * TRAINED, mixer.q_proj.in_features, dtype=torch.float64)
    rows = []
    for t in range(x.shape[1]):
        static = tiny("transformer")
        if t >= TRAINED:
            factor = f"extension.factor={(t + 1) / TRAINED}"
            extend(static, extension(name.removeprefix("dynamic_"), factor), TRAINED)
        rows.append(static.sublayers()[0](x[:, : t + 1])[:, -1:])
    expected = torch.cat(rows, 1)
    torch.testing.assert_close(mixer(x), expected, rtol=1e-8, atol=1e-9)
    one, state = mixer(x[:, :21], mixer.empty_state(1))
    two, _ = mixer(x[:, 21:], state)
    torch.testing.assert_close(torch.cat([one, two], 1), expected, rtol=1e-8, atol=1e-9)
    for other in ("pi", "dca"):
        with pytest.raises(UserError, match=r"extension\.step=1: extension=") as error:
            extend(tiny("transformer"), extension(other, "extension.step=1"), TRAINED)
        assert "\n" not in str(error.value)
