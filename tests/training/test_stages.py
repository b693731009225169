"""Stages: what was tuned under an extension is tuned, measured and searched under another."""

import functools
import itertools
import json
import math
import random
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from building import MODEL_OF, train_config, write_text

import zoo
from zoo.config.compose import compose
from zoo.config.groups import extensions
from zoo.config.schema.model import Extension
from zoo.config.stages import original_length, scalings, stages_of, trained_length
from zoo.errors import UserError
from zoo.mixers.base import count_bytes
from zoo.model import checkpoint
from zoo.model.extend import extend, places, rotary_positions
from zoo.runs.claim import claim
from zoo.runs.folder import RunFolder
from zoo.tasks.identity import stages_in_words
from zoo.training import fit

L, PAIRS = 16, 16  # tokens of the base's windows; rotary pairs of a head at size tiny
SHORT = [
    "trainer.max_steps=2",
    "batch_tokens=256",
    "valid_windows=2",
    "trainer.log_every_n_steps=1",
]
LAMBDAS = [1 + 0.2 * pair for pair in range(PAIRS)]
MORE = {
    "longrope": [f"extension.scaling.long_factors={LAMBDAS}"],
    "lm_infinite": ["extension.attention.sinks=2"],
}
PI, ON_TOP = "extension=pi extension.factor=2", "extension.composition=on_top"
SEARCHED = "task.longrope.composition=on_top"
NAMES = [name for name in extensions() if name not in MODEL_OF]


def words(name: str, factor: float = 2, composition: str = "replace") -> list[str]:
    """The options of an extension, as train.py and eval.py take them."""
    tree = extensions()[name]
    found = [f"extension={name}", *MORE.get(name, [])]
    if tree["factor"] == "???":
        found.append(f"extension.factor={factor}")
    return found + ["extension.composition=on_top"] * (composition == "on_top")


@functools.cache
def composed(name: str, factor: float = 2, composition: str = "replace") -> Extension:
    program = "train" if extensions()[name].get("positions") else "eval"
    about = ["finetune=x"] if program == "train" else ["run=x"]
    return compose(program, [*about, *words(name, factor, composition)]).extension


def under(model, *stages: tuple[Extension, int]):
    """The model after these stages and no others."""
    model.stages, model.frequencies = (), None
    for rope in rotary_positions(model):
        rope.pattern = None
    for extension, seq_len in stages:
        extend(model, extension, seq_len)
    return model


# ---- the angles of every composition, by formulas of this file alone


def scaled_by_hand(name: str, theta: np.ndarray, s: float, window: float, length: float):
    """(frequencies, attention factor) of a text of `length` under the paper's own definition."""
    d, i = 2 * len(theta), np.arange(len(theta), dtype=np.float64)
    if name == "pi":
        return theta / s, 1.0
    if name == "ntk":
        return theta * s ** (-2 * i / (d - 2)), 1.0
    if name == "dynamic_ntk":
        grown = max(1.0, length / window)
        return theta * grown ** (-2 * i / (d - 2)), 1.0
    if name == "longrope":
        rescale = np.ones(len(theta)) if length <= window else np.array(LAMBDAS)
        return theta / rescale, math.sqrt(1 + math.log(s) / math.log(window))
    if name == "llama3":
        gamma = np.clip((window * theta / (2 * np.pi) - 1) / (4 - 1), 0, 1)
        return theta * ((1 - gamma) / s + gamma), 1.0
    if name == "ntk_by_parts":
        gamma = np.clip((window * theta / (2 * np.pi) - 1) / (32 - 1), 0, 1)
        return theta * ((1 - gamma) / s + gamma), 1.0
    if name == "dynamic_yarn":
        s = max(1.0, length / window)
    # YaRN's program: the ramp runs over the pairs' indices, between those that turn 32 and 1 times
    turns = np.log(window * theta / (2 * np.pi))
    ends = []
    for beta in (32.0, 1.0):  # log turns are linear in the index between two pairs, and beyond
        at = int(np.clip(np.searchsorted(-turns, -np.log(beta)), 1, len(turns) - 1))
        ends.append(at - 1 + (turns[at - 1] - np.log(beta)) / (turns[at - 1] - turns[at]))
    low, high = (min(max(end, 0), d - 1) for end in (math.floor(ends[0]), math.ceil(ends[1])))
    gamma = 1 - np.clip((i - low) / max(high - low, 0.001), 0, 1)
    return theta * ((1 - gamma) / s + gamma), 0.1 * math.log(s) + 1


SCALINGS = ["pi", "ntk", "ntk_by_parts", "yarn", "llama3", "longrope", "dynamic_ntk"]
SCALINGS += ["dynamic_yarn"]


@pytest.mark.parametrize("first", SCALINGS)
def test_the_angles_of_every_two_scalings_are_those_of_their_composition(first, tiny):
    base = 10000.0 ** (-np.arange(PAIRS) / PAIRS)
    model = tiny("transformer")
    for second, composition in itertools.product(SCALINGS, ("replace", "on_top")):
        under(
            model,
            (composed("none"), L),
            (composed(first, 4), 4 * L),
            (composed(second, 2, composition), 4 * L),
        )
        rope = rotary_positions(model)[0]
        assert rope.pattern is not None
        for length in (4, L, 2 * L, 4 * L, 8 * L, 16 * L):
            found, factor = rope.pattern.scaling(length)
            s, window, theta, m = 2.0, float(L), base, 1.0
            if composition == "on_top":  # of the frequencies of before, at the length tuned at
                theta, m = scaled_by_hand(first, base, 4.0, L, length)
                window = 4 * L
            expected, own = scaled_by_hand(second, theta, s, window, length)
            message = f"{first}, then {second} {composition} at {length}"
            np.testing.assert_allclose(found, expected, rtol=1e-12, err_msg=message)
            assert factor == pytest.approx(m * own, rel=1e-12), message


@pytest.mark.parametrize("first", ["dynamic_ntk", "dynamic_yarn", "longrope"])
def test_on_top_each_scaling_changes_in_its_own_steps(first, tiny):
    """Within the length tuned at a model reads as it was tuned, whichever multiple that is."""
    tuned, text = 5 * L // 2, torch.randint(32, (1, 4 * L))
    stages = [(composed("none"), L), (composed(first, 4), tuned)]
    plain = under(tiny("transformer"), *stages)(text)
    on_top = under(tiny("transformer"), *stages, (composed("dynamic_ntk", 2, "on_top"), tuned))
    torch.testing.assert_close(on_top(text)[:, :tuned], plain[:, :tuned], rtol=1e-9, atol=1e-10)
    scaling = rotary_positions(on_top)[0].pattern.scaling
    assert scaling(tuned + 1) == scaling(3 * L)
    assert not torch.allclose(on_top(text), plain)


def test_three_stages_compose_from_the_left_and_a_replacement_forgets_what_was_before(tiny):
    base = 10000.0 ** (-np.arange(PAIRS) / PAIRS)
    stages = [(composed("pi", 2), 2 * L), (composed("ntk", 4, "on_top"), 8 * L)]
    model = under(tiny("transformer"), (composed("none"), L), *stages)
    extend(model, composed("pi", 3, "on_top"), 24 * L)
    found, _ = rotary_positions(model)[0].pattern.scaling(1)
    i = np.arange(PAIRS)
    np.testing.assert_allclose(found, base / 6 * 4.0 ** (-2 * i / (2 * PAIRS - 2)), rtol=1e-12)
    extend(model, composed("pi", 5), 24 * L)
    found, _ = rotary_positions(model)[0].pattern.scaling(1)
    np.testing.assert_allclose(found, base / 5, rtol=1e-12)
    assert [one.name for one in scalings(model.stages)] == ["pi"]


def test_positions_kept_by_longrope_are_scaled_by_what_goes_on_top(tiny):
    first = Extension.model_validate(
        {**composed("longrope", 4).model_dump(by_alias=True)}
        | {
            "scaling": {
                "_target_": "zoo.positions.scaling.longrope",
                "long_factors": LAMBDAS,
                "n_hat": 3,
            }
        }
    )
    model = under(tiny("transformer"), (composed("none"), L), (first, 4 * L))
    extend(model, composed("pi", 2, "on_top"), 4 * L)
    found, _ = rotary_positions(model)[0].pattern.scaling(8 * L)
    base = 10000.0 ** (-np.arange(PAIRS) / PAIRS)
    at = found(torch.arange(6)).numpy()
    np.testing.assert_allclose(at[:3], np.tile(base / 2, (3, 1)), rtol=1e-12)
    np.testing.assert_allclose(at[3:], np.tile(base / np.array(LAMBDAS) / 2, (3, 1)), rtol=1e-12)


def test_a_remap_goes_over_the_scaling_it_finds_at_the_length_tuned_at(tiny):
    tuned = [(composed("none"), L), (composed("pi", 4), 4 * L)]
    model = under(tiny("transformer"), *tuned, (composed("dca"), 4 * L))
    pattern = rotary_positions(model)[0].pattern
    assert (pattern.chunk, pattern.last) == (3 * L, 4 * L - 1)
    base = 10000.0 ** (-np.arange(PAIRS) / PAIRS)
    np.testing.assert_allclose(pattern.scaling(0)[0], base / 4, rtol=1e-12)
    # Beneath a remap that stays, the scaling is exchanged.
    extend(model, composed("ntk", 8), 4 * L)
    pattern = rotary_positions(model)[0].pattern
    assert pattern.chunk == 3 * L
    i = np.arange(PAIRS)
    np.testing.assert_allclose(pattern.scaling(0)[0], base * 8.0 ** (-i / (PAIRS - 1)), rtol=1e-12)


def test_slopes_are_divided_by_the_product_on_top_and_by_the_last_factor_in_its_place(tiny):
    for composition, factor in (("on_top", 6), ("replace", 3)):
        model = under(tiny("alibi"), (composed("none"), L), (composed("alibi_interpolation", 2), L))
        extend(model, composed("alibi_interpolation", 3, composition), L)
        scheme = model.sublayers()[0].positions
        assert scheme.slopes() == [2 ** (-8 * (h + 1) / 2) / factor for h in range(2)]


# ---- every pair of extensions


def check_computes(model, extension: Extension, text: torch.Tensor) -> None:
    """Any chunks of a text give the whole, and every weight gets a gradient."""
    with torch.no_grad():
        whole, state, outs = model(text), model.empty_state(2), []
        for chunk in text.split([L - 1, 2, 4 * L, text.shape[1] - 5 * L - 1], 1):
            out, state = model(chunk, state)
            outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), whole, rtol=1e-8, atol=1e-9)
    assert count_bytes(state) == model.state_bytes(text.shape[1], 2)
    model.zero_grad()
    draw = places(extension.model_copy(update={"original_length": L}), 2 * L)
    drawn = draw(2, 2 * L, torch.Generator().manual_seed(0)) if draw else None
    model.loss(text[:, : 2 * L + 1], positions=drawn).backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


REASONS = (
    "keeps a window of the text, so its scaling cannot depend on the length",
    "is of two scalings, and",
    "learns from the model's own frequencies on",
    "scales the model's own frequencies alone",
    "scales frequencies, and the model's were dropped",
    "would hide the trained frequencies of extension=clex from their gradient",
    "chooses positions, and the model was trained under a pattern of attention",
    "is trained on windows with positions of a longer text",
)


@pytest.mark.parametrize("first", NAMES)
def test_every_pair_of_extensions_composes_or_is_refused_for_a_true_reason(first, tiny, request):
    text = torch.randint(32, (2, 6 * L + 3), generator=torch.Generator().manual_seed(1))
    ran, draw = tiny("transformer"), random.Random(first)
    for second, composition in itertools.product(NAMES, ("replace", "on_top")):
        one, two = composed(first), composed(second, 2, composition)
        under(ran, (composed("none"), L), (one, 2 * L))
        try:
            extend(ran, two, 2 * L if two.positions else 4 * L)
        except UserError as error:
            message = str(error)
            assert "\n" not in message
            assert any(reason in message for reason in REASONS), message
            if "chooses positions" in message:
                assert one.attention
                assert two.positions
            if "two scalings" in message:
                assert composition == "on_top"
                assert not (one.scaling and two.scaling)
            if "were dropped" in message:
                assert (first, composition) == ("drope", "on_top")
            if "own frequencies alone" in message:
                assert (second, composition) == ("drope", "on_top")
            if "depend on the length" in message:
                assert {first, second} & {"dynamic_ntk", "dynamic_yarn", "clex", "longrope"}
            continue
        if (
            draw.random() < 0.02 and "clex" not in (first, second)
        ) or request.config.option.markexpr == "slow":
            check_computes(ran.double(), two, text)


# ---- whole runs


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The working directory of a run, runs/base, trained on windows of L tokens."""
    place = tmp_path_factory.mktemp("work")
    data = ["data=text", f"data.path={write_text(place)}", f"data.cache={place / 'cache'}"]
    size = ["size=tiny", "match=none", f"seq_len={L}", "logger=none", "name=base"]
    config = train_config(*data, *size, f"runs={place}/runs", *SHORT)
    fit.train(config, claim(config))
    return place


def measured(program, run: str, *options: str) -> set[str]:
    """The labels of what is measured of a run, all of whose rows must have numbers."""
    lengths = f"task.perplexity.lengths=[{L},{8 * L}]"
    code, error = program(
        "eval", f"run=runs/{run}", "task=perplexity", lengths, "report=null", *options
    )
    assert code == 0, error
    rows = RunFolder.open(f"runs/{run}").rows()
    assert {row["status"] for row in rows} == {"ok"}
    return {row["arm"] for row in rows}


def test_a_chain_of_stages_is_trained_resumed_and_measured_and_its_label_says_it(program):
    code, error = program("train", "finetune=runs/base", *words("pi", 4), "name=one", *SHORT)
    assert code == 0, error
    stage = ["finetune=runs/one", *words("yarn", 2, "on_top"), "name=two"]
    code, error = program("train", *stage, *SHORT)
    assert code == 0, error
    two = RunFolder.open("runs/two")
    assert two.config.seq_len == 8 * L
    assert [stage.run for stage in two.config.stages] == ["runs/one"]
    assert [seq_len for _, seq_len in stages_of(two.config)] == [4 * L, 8 * L]
    assert two.config.extension.original_length == 4 * L
    code, error = program("train", "resume=runs/two", "trainer.max_steps=3")
    assert code == 0, error
    assert two.info["step"] == 3
    chain = "transformer tuned with pi x4 (16 to 64), then yarn x2 on top of pi (64 to 128)"
    assert measured(program, "two") == {chain}
    assert measured(program, "two", *words("dca")) == {chain, f"{chain} + dca"}
    more = words("ntk", 3, "on_top")
    assert f"{chain} + ntk x3 on top of yarn" in measured(program, "two", *more)
    rest = words("ntk", 3)
    assert f"{chain} + ntk x3 in place of pi and yarn" in measured(program, "two", *rest)

    # The second stage's first step read the first stage's weights under both scalings.
    before = extend(checkpoint.load(RunFolder.open("runs/one")), two.config.extension, 8 * L)
    after = checkpoint.load(two)
    text = torch.randint(256, (1, 8 * L))
    before.load_state_dict(checkpoint.trained_weights(two))
    assert torch.equal(before(text), after(text))


def test_stages_without_an_extension_are_named_by_their_lengths():
    none = Extension.model_validate(extensions()["none"])
    first, second = (none.model_copy(update={"original_length": n}) for n in (L, 2 * L))
    pi = composed("pi", 4).model_copy(update={"original_length": L})
    assert not stages_in_words([(first, L)])
    assert stages_in_words([(first, 2 * L), (second, 4 * L)]) == " (16 to 32), then (32 to 64)"
    assert (
        stages_in_words([(pi, 4 * L), (none, 4 * L)]) == " with pi x4 (16 to 64), then (64 to 64)"
    )


def test_a_stage_that_replaces_has_the_bases_length_and_one_on_top_the_tuned_one(program):
    code, error = program("train", "finetune=runs/base", *words("yarn", 2), "name=y2", *SHORT)
    assert code == 0, error
    code, error = program("train", "finetune=runs/y2", *words("yarn", 4), "name=y4", *SHORT)
    assert code == 0, error
    y4 = RunFolder.open("runs/y4").config
    assert (y4.seq_len, y4.extension.original_length) == (4 * L, L)
    assert original_length(composed("yarn", 2, "on_top"), stages_of(y4), 0) == 4 * L
    assert original_length(composed("yarn", 8), stages_of(y4), 0) == L
    pose = composed("pose", 4).model_copy(update={"original_length": L})
    assert trained_length(pose, L) == 4 * L


@pytest.mark.parametrize(
    ("options", "message"),
    {
        f"eval run=runs/base {PI} {ON_TOP}": f"{ON_TOP}: is of two scalings, and the model was "
        "trained under none.",
        f"train finetune=runs/base {PI} {ON_TOP}": f"{ON_TOP}: is of two scalings, and the model "
        "was trained under none.",
        "eval run=runs/base extension=dca extension.composition=replace": "extension.composition="
        "replace: is of two scalings, and extension=dca has none.",
        "train finetune=runs/base model.mixer.window=4": "model.mixer.window=4: model=transformer "
        "has no window.",
        "train finetune=runs/base model.mixer.heads=2": "keeps the run's model: model.mixer.heads "
        "cannot change. Leave them out (model.mixer.window can change), or train a new run.",
        f"eval run=runs/base task=longrope task.longrope.factor=2 {SEARCHED}": f"{SEARCHED}: is of "
        "two scalings, and the run was trained under none.",
    }.items(),
)
def test_a_composition_of_nothing_is_refused_in_one_line(options, message, program):
    name, *rest = options.split()
    code, error = program(name, *rest)
    assert code == 2
    assert message in error


def test_a_tuned_run_is_searched_again_on_top_of_what_it_was_tuned_under(program):
    search = ["population=4", "mutations=2", "crossovers=2", "parents=3", "texts=2"]
    search = [f"task.longrope.{word}" for word in (*search, "generations=1", "factor=2")]
    search += ["task=longrope", "report=null"]
    code, error = program("train", "finetune=runs/base", *words("pi", 2), "name=p2", *SHORT)
    assert code == 0, error
    code, error = program("eval", "run=runs/p2", *search, "task.longrope.composition=on_top")
    assert code == 0, error
    found = json.loads(Path("runs/p2/longrope-on-top-x2.json").read_text())["found"]
    row = RunFolder.open("runs/p2").rows()[-1]
    assert (row["length"], row["composition"]) == (4 * L, "on_top")
    read = ["extension=longrope", "extension.factor=2", "extension.composition=on_top"]
    arms = measured(program, "p2", *read)
    assert "transformer tuned with pi x2 + longrope x2 on top of pi" in arms
    model = checkpoint.load(RunFolder.open("runs/p2"))
    tree = composed("longrope", 2, "on_top").model_dump(by_alias=True)
    tree["scaling"] |= found
    extend(model, Extension.model_validate(tree), 2 * L)
    base = 10000.0 ** (-np.arange(PAIRS) / PAIRS)
    inv_freq, factor = rotary_positions(model)[0].pattern.scaling(4 * L)
    if not found["n_hat"]:
        np.testing.assert_allclose(inv_freq, base / 2 / np.array(found["long_factors"]), rtol=1e-12)
    assert factor == pytest.approx(math.sqrt(1 + math.log(2) / math.log(2 * L)))
    code, error = program("eval", "run=runs/p2", *search)  # in place of pi: from 2 L, as the base
    assert code == 0, error
    assert RunFolder.open("runs/p2").rows()[-1]["length"] == 2 * L


def test_a_search_on_top_of_dropped_frequencies_is_refused_in_one_line(program):
    code, error = program("train", "finetune=runs/base", "extension=drope", "name=dropped", *SHORT)
    assert code == 0, error
    search = ["task=longrope", "task.longrope.factor=2", SEARCHED, "report=null"]
    code, error = program("eval", "run=runs/dropped", *search)
    assert code == 2
    assert f"{SEARCHED}: the run's frequencies were dropped (extension=drope), which no" in error


@pytest.mark.parametrize("magnitude", ["su", "none"])
@pytest.mark.parametrize("composition", ["replace", "on_top"])
def test_the_refusal_names_the_search_and_the_search_the_options_that_read_it(
    composition, magnitude, program, capfd
):
    name = f"read-{composition}-{magnitude}"
    code, error = program("train", "finetune=runs/base", *words("pi", 2), f"name={name}", *SHORT)
    assert code == 0, error
    given = ["extension=longrope", "extension.factor=2", f"extension.composition={composition}"]
    with pytest.raises(UserError) as error:
        zoo.load(f"runs/{name}", *given, f"extension.scaling.magnitude={magnitude}", device="cpu")
    advised = str(error.value).rpartition("Use python eval.py run=<run> ")[2].removesuffix(".")
    small = ["population=2", "mutations=1", "crossovers=1", "parents=2", "texts=1"]
    small = [f"task.longrope.{word}" for word in (*small, "generations=1")]
    capfd.readouterr()
    search = [f"run=runs/{name}", *advised.split(), *small, "report=null", "logger=none"]
    assert import_module("zoo.cli.eval").main(search) == 0
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "reads under them" in line]
    options = line.rpartition("; ")[2].removesuffix(" reads under them").split()
    assert zoo.load(f"runs/{name}", *options, device="cpu").train_length == 2 * L


def test_a_stage_may_widen_a_window_of_attention(program, trained):
    write = ["model=longformer", "model.mixer.window=4", "size=tiny", "match=none", "data=text"]
    write += [f"data.path={trained}/text", f"data.cache={trained}/cache", f"seq_len={L}"]
    code, error = program("train", *write, "name=narrow", *SHORT)
    assert code == 0, error
    wider = ["finetune=runs/narrow", "model.mixer.window=8", f"seq_len={2 * L}", "name=wide"]
    code, error = program("train", *wider, *SHORT)
    assert code == 0, error
    config = RunFolder.open("runs/wide").config
    assert [block.mixer.options["window"] for block in config.model.blocks] == [8]
    model = checkpoint.load(RunFolder.open("runs/wide"))
    assert {mixer.window for mixer in model.sublayers() if hasattr(mixer, "window")} == {8}


@pytest.mark.slow  # half an hour
@pytest.mark.parametrize("first", NAMES)
def test_every_pair_of_stages_trains_resumes_and_is_measured_or_is_refused(first, program):
    code, error = program("train", "finetune=runs/base", *words(first), f"name={first}", *SHORT)
    assert code == 0, error
    for second, composition in itertools.product(NAMES, ("replace", "on_top")):
        name = f"{first}-{second}-{composition}"
        two = words(second, 2, composition)
        code, error = program("train", f"finetune=runs/{first}", *two, f"name={name}", *SHORT)
        if code == 0:
            code, error = program("train", f"resume=runs/{name}", "trainer.max_steps=3")
            assert code == 0, error
            (label,) = measured(program, name)
            assert ", then " in label
        else:
            assert code == 2, error
            assert any(reason in error for reason in REASONS), error
            assert not Path(f"runs/{name}").exists()
