"""What constructors declare about their arguments is checked early, from their source, and when a
mixer is built; sub-classes keep it."""

import importlib
import re
import shutil
import sys

import pytest
import torch
from building import ARCHITECTURES, ENCODERS, ROOT, train_config

import zoo.mixers
from zoo.config import introspect
from zoo.config.domains import fits
from zoo.config.effects import check_effects
from zoo.config.introspect import arguments, target_parameters
from zoo.config.schema.model import BlockConfig
from zoo.config.schema.sections import MixerPart
from zoo.config.validate import plain
from zoo.errors import UserError
from zoo.model.build import build_model, count_parameters

BAD = (0, -1, 1, 9, 0.0, -0.5, 2**21, 1e4, "text", None, True, [], [0], ["text"])
SIZE = {"width": 32, "layer": 1, "layers": 2}


def parts() -> dict[str, tuple[str, dict]]:
    """(slot, part) of every mixer and feed-forward of the architectures, by target."""
    found = {}
    for name in ARCHITECTURES:
        for block in plain(train_config(f"model={name}", "size=tiny", "match=none").model)[
            "blocks"
        ]:
            slots = [(slot, block[slot]) for slot in ("mixer", "feed_forward")]
            found |= {part["_target_"]: (slot, part) for slot, part in slots if part}
    return found


def test_every_value_outside_an_arguments_domain_is_refused_early_and_by_the_constructor():
    """In the same words: the option, the rule and what to do."""
    cases = 0
    for target, (_, part) in parts().items():
        declared = arguments(target)
        assert declared is not None
        for name in target_parameters(target) or []:
            for value in (value for value in BAD if not fits(value, declared[name].kind)):
                cases += 1
                with pytest.raises(UserError, match=rf"^{name}=.*: must be .*\.$") as early:
                    introspect.check_types(target, {**part, name: value})
                given = {**MixerPart.model_validate(part).options, name: value}
                module, _, cls = target.rpartition(".")
                with pytest.raises(ValueError, match=f"^{name}=") as late:
                    getattr(importlib.import_module(module), cls)(**SIZE, **given)
                assert str(late.value) == str(early.value)
    assert cases > 600


@pytest.mark.parametrize("width", [1, 2, 3])
def test_every_part_is_built_for_the_narrowest_models_or_refuses_the_width(width):
    built, refused = 0, []
    for target, (_, part) in parts().items():
        module, _, cls = target.rpartition(".")
        given = MixerPart.model_validate(part).load().keywords
        given |= {name: 1 for name in ("heads", "gate_blocks") if name in given}
        try:
            one = getattr(importlib.import_module(module), cls)(**{**SIZE, "width": width}, **given)
        except ValueError as error:
            refused.append(str(error))
            continue
        x = torch.randn(1, max(40, one.min_window), width)
        if one.max_length is not None:
            x = x[:, : one.max_length]
        assert one(x).isfinite().all(), target
        built += 1
    assert built > 15
    assert all(re.match(r"\w+=", message) for message in refused), refused


def test_every_argument_of_every_mixer_declares_its_domain():
    for target in parts():
        for name, argument in (arguments(target) or {}).items():
            if name not in introspect.PLACED:
                assert not all(fits(value, argument.kind) for value in BAD), f"{target}: {name}"


@pytest.mark.parametrize(
    ("words", "message"),
    {
        "model=mamba model.mixer.state_size=0": "model.mixer.state_size=0: must be an integer "
        ">= 1. The default is 16.",
        "model=relu model.mixer.kernel=relo": "model.mixer.kernel=relo: must be relu or "
        "squared_relu. Did you mean 'relu'? The default is relu.",
        "model=rwkv4 match=none model.feed_forward.hidden_width=0": "model.feed_forward."
        "hidden_width=0: must be an integer >= 1 or null. The default is null.",
    }.items(),
)
def test_a_bad_value_is_named_as_its_option_before_anything_is_built(words, message):
    with pytest.raises(UserError) as error:
        train_config(*words.split())
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("words", "message"),
    {
        "model=deltanet size.heads=3": "size.heads=3",
        "model=mamba size.heads=3": "size.heads=3",
        "model=deltanet model.mixer.heads=3": "model.mixer.heads=3: must divide width=64.",
        "model=etc model.mixer.labels=90": "model.mixer.labels=90: must be at most window=84.",
        "model=aft model.mixer.variant=full model.mixer.max_length=null": "model.mixer."
        "max_length=null: variant=full learns a weight for each position.",
    }.items(),
)
def test_arguments_that_do_not_go_together_are_named_as_their_option(words, message):
    config = train_config("size=tiny", *words.split())
    with pytest.raises(UserError) as error:
        build_model(config, vocab_size=32)
    assert str(error.value).startswith(message)


@pytest.fixture
def subclassed(tmp_path, monkeypatch):
    """Targets of two sub-classes of every mixer and feed-forward: bare, and with **kwargs."""
    mixers = tmp_path / "zoo" / "mixers"
    for package in ("mixers", "positions"):  # whose sources are read
        shutil.copytree(ROOT / "zoo" / package, tmp_path / "zoo" / package)
    lines, names = ["from zoo.config.domains import Positive", ""], {}
    for index, target in enumerate(parts()):
        module, _, name = target.rpartition(".")
        lines += [f"from {module} import {name} as Base{index}", ""]
        lines += [f"class Bare{index}(Base{index}):", "    pass", ""]
        lines += [f"class More{index}(Bare{index}):"]
        lines += ["    def __init__(self, *, extra: Positive = 1, **options):"]
        lines += ["        super().__init__(**options)", "        self.extra = extra", ""]
        names[target] = (f"zoo.mixers.mine.Bare{index}", f"zoo.mixers.mine.More{index}")
    (mixers / "mine.py").write_text("\n".join(lines))
    monkeypatch.setattr(introspect, "ROOT", tmp_path)
    monkeypatch.setattr(zoo.mixers, "__path__", [*zoo.mixers.__path__, str(mixers)])
    introspect.arguments.cache_clear()
    yield names
    sys.modules.pop("zoo.mixers.mine", None)
    introspect.arguments.cache_clear()


def test_a_subclass_of_any_mixer_keeps_its_arguments_and_their_checks(subclassed):
    for target, (bare, more) in subclassed.items():
        assert arguments(bare) == arguments(target)
        assert {*(arguments(more) or {})} == {*(arguments(target) or {}), "extra"}
        with pytest.raises(UserError, match=r"^extra=0: must be an integer >= 1. The default is 1"):
            introspect.check_types(more, {"extra": 0})
        for name in target_parameters(target) or []:
            with pytest.raises(UserError, match=f"^{name}="):
                introspect.check_types(more, {name: {"a": "dict"}})


def with_parts(config, subclassed, which):
    """The configuration with every mixer and feed-forward replaced by its sub-class."""
    blocks = plain(config.model)["blocks"]
    for block in blocks:
        for part in (block["mixer"], block["feed_forward"]):
            if part:
                part["_target_"] = subclassed[part["_target_"]][which]
    model = config.model.model_copy(
        update={"blocks": [BlockConfig.model_validate(b) for b in blocks]}
    )
    return config.model_copy(update={"model": model})


@pytest.mark.slow  # 12 s
def test_a_subclass_of_any_mixer_is_matched_and_reads_both_ways_as_it(subclassed):
    for name in ARCHITECTURES:
        words = ("objective=masked",) if name in ENCODERS else ()
        config = train_config(f"model={name}", "size=tiny", "seq_len=256", *words)
        with torch.device("meta"):
            plain_model, knobs = build_model(config, vocab_size=32)
        for which in (0, 1):  # bare, and with arguments of its own
            with torch.device("meta"):
                model, same = build_model(with_parts(config, subclassed, which), vocab_size=32)
            assert knobs == same, name
            assert count_parameters(model) == count_parameters(plain_model), name
            assert model.causal == plain_model.causal, name


def test_a_subclass_refuses_options_without_effect_as_its_base(subclassed):
    config = train_config("model=soft", "size=tiny", "model.mixer.form=exact")
    for which in (0, 1):
        with pytest.raises(UserError, match=r"^model.mixer.landmarks=32: acts with form=landmarks"):
            check_effects(with_parts(config, subclassed, which), {}, ["model.mixer.landmarks"])
