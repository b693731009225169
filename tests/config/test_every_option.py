"""Every option with every kind of bad value: refused in one line that names it, or what it says.

The cases are read from the YAML files, the schemas and the constructors, so that a new option is
walked without being listed here.
"""

import copy
import importlib
import itertools
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from building import ARCHITECTURES, MODEL_OF, train_config
from pydantic import BaseModel, ValidationError

from zoo.config.compose import compose_tree, composing, parse
from zoo.config.effects import check_effects
from zoo.config.groups import choices, model_section
from zoo.config.introspect import constructor_parameters, target_parameters
from zoo.config.resolve import reads_both_ways
from zoo.config.schema.eval import EvalConfig
from zoo.config.schema.model import Extension
from zoo.config.schema.sections import MixerPart
from zoo.config.schema.train import TrainConfig
from zoo.config.schema.trainer import Trainer
from zoo.config.tree import leaves
from zoo.config.validate import plain, validate
from zoo.errors import UserError
from zoo.model.build import build_model
from zoo.model.extend import extend
from zoo.runs.folder import RunFolder

ROOT = Path(__file__).parents[2]
HUGE = 10**30
ODD_VALUES = (0, -1, 1, HUGE, 10**12, math.nan, "text", None, True)  # a model is built for each
VALUES = (0, -1, 1, HUGE, -HUGE, 10**12, 0.5, 1e308, math.nan, math.inf, "text", "", None, True, [])
SIZE = {"width": 32, "layers": 2}


def program(name: str):
    return importlib.import_module(f"zoo.cli.{name}")


def composed(name: str, *words: str) -> dict[str, Any]:
    with composing(name):
        return compose_tree(name, parse(words))


def changed(tree: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy of the tree with another value at a dotted path."""
    tree = copy.deepcopy(tree)
    *sections, last = path.split(".")
    section = tree
    for name in sections:
        section = section[name]
    section[last] = value
    return tree


def outcome(call: Callable[[], str], named: str) -> str:
    """What is wrong with an attempt; "" where it was refused as it should be or went well.

    A refusal is a ValueError (UserError is one, and pydantic's) of one line with `named` in it.
    """
    try:
        return call()
    except ValueError as error:
        message = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        if "\n" in message:
            return f"is refused in several lines: {message}"
        named_at_all = named in message or "run folder" in message  # a folder that is not there
        return "" if named_at_all else f"is refused without its name: {message}"
    except Exception as error:
        return f"is a traceback: {error!r}"


def holds(config: BaseModel, path: str, value: Any) -> str:
    """What an accepted value was taken for, where that is another one."""
    held = dict(leaves(plain(config)))
    if path not in held or value in (None, []):  # null: a default, spelled out
        return ""
    same = isinstance(held[path], bool) == isinstance(value, bool)
    same = same and (held[path] == value or held[path] == pytest.approx(value))
    return "" if same else f"was taken as {held[path]!r}"


def walk(check: Callable[..., BaseModel], tree: dict[str, Any], paths: Iterable[str]) -> list[str]:
    """Whatever is wrong with any value at any of the paths."""
    wrong = []
    for path, value in itertools.product(paths, VALUES):
        message = outcome(
            lambda p=path, v=value: holds(check(changed(tree, p, v), [p]), p, v),
            path.rpartition(".")[2],
        )
        wrong += [f"{path}={value!r} {message}"] if message else []
    return wrong


def test_every_option_of_training_is_refused_or_what_it_says(monkeypatch, tmp_path):
    train = program("train")
    monkeypatch.setattr(train, "check_source", lambda _: None)  # a second each
    monkeypatch.chdir(tmp_path)
    tree = composed("train", "size=tiny")
    own = [path for path, _ in leaves(tree) if not path.startswith("model.")]
    trainer = [f"trainer.{name}" for name in Trainer.model_fields]
    paths = sorted({*own, *trainer} - {"data.cache", "changed_code"})
    assert len(paths) > 45
    wrong = walk(train.check, tree, paths)
    assert wrong == []


def test_every_option_of_measuring_is_refused_or_what_it_says(monkeypatch, tmp_path):
    runs = [
        RunFolder.create(tmp_path / data, train_config("size=tiny", f"data={data}"), {})
        for data in ("stdlib", "recall")  # of which each task measures one
    ]
    for task in choices("task"):
        words = ["task.longrope.factor=2"] if task == "longrope" else []
        tree = composed("eval", "run=run", f"task={task}", *words)
        paths = [path for path, _ in leaves(tree) if not path.endswith("_target_")]
        evaluate = program("eval")
        monkeypatch.setattr(evaluate, "find_distinct_runs", lambda *_: runs)
        common = [] if task != "speed" else [path for path in paths if "." not in path]
        paths = [path for path in paths if path.startswith("task.")] + common
        assert walk(evaluate.check, tree, paths) == []


NO_VALUE = {"of": "no", "option": 1}
CONFIGS = {
    "train": (TrainConfig, lambda: plain(train_config("size=tiny"))),
    "eval": (EvalConfig, lambda: composed("eval", "run=x", "task=perplexity")),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_an_option_that_may_be_null_says_so_where_it_refuses_a_value(name):
    """For which it may be is found by giving it."""
    schema, tree = CONFIGS[name][0], CONFIGS[name][1]()
    refused = {}
    for path in sorted({path for path, _ in leaves(tree)} - {"model.blocks"}):
        try:
            validate(schema, changed(tree, path, None))
        except UserError:
            continue  # null is no value of it
        with pytest.raises(UserError) as error:
            validate(schema, changed(tree, path, NO_VALUE))
        if str(error.value).startswith(f"{path}="):  # and not an option of what it would hold
            refused[path] = str(error.value)
    assert len(refused) > 5
    assert [line for line in refused.values() if "null" not in line] == []


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_size_heads_is_the_number_that_a_model_has_or_the_line_says_the_truth(name):
    tree, numbers, line = {"model": model_section(name)}, set(), ""
    for heads in (4, 2):
        config = train_config(f"model={name}", "size=tiny", f"size.heads={heads}")
        numbers.add(str(plain(config.model)))
    mixers = [block.mixer.target for block in config.model.blocks]
    takes = {argument for target in mixers for argument in target_parameters(target) or []}
    try:
        check_effects(config, tree, ["size.heads"])
    except UserError as error:
        line = str(error)
    assert bool(line) == (len(numbers) == 1), line
    assert ("has no heads" in line) == (bool(line) and "heads" not in takes)
    assert ("has a number of its own" in line) == (bool(line) and "heads" in takes)


def parts() -> list[tuple[str, str, dict[str, Any]]]:
    """(model, slot, part) of every architecture."""
    found = []
    for name in ARCHITECTURES:
        block = plain(train_config(f"model={name}", "size=tiny"))["model"]["blocks"][0]
        found += [
            (name, slot, part) for slot, part in block.items() if slot != "short_conv" and part
        ]
    return found


@pytest.mark.parametrize("causal", [True, False])
def test_every_argument_of_every_mixer_is_refused_or_reads_finite_text(causal):
    """What a constructor accepts also computes finite outputs, where it is small enough to try."""
    cases, wrong = 0, []
    for name, slot, part in parts():
        takes = constructor_parameters(part["_target_"]) or []
        if not causal and ("causal" not in takes or not reads_both_ways(name)):
            continue
        place = {**SIZE, "layer": 1} if causal else {**SIZE, "layer": 1, "causal": False}
        for argument, value in itertools.product(
            target_parameters(part["_target_"]) or [], ODD_VALUES
        ):
            cases += 1
            message = outcome(
                lambda p={**part, argument: value}, w=place: reads_finite(p, w), argument
            )
            wrong += [f"{name}: {slot}.{argument}={value!r} {message}"] if message else []
    assert wrong == []
    assert cases > 500


def reads_finite(tree: dict[str, Any], place: dict[str, Any]) -> str:
    """What is wrong with the mixer's outputs; of one too large to try, with its construction."""
    part = MixerPart.model_validate(tree)
    try:
        with torch.device("meta"):
            size = sum(p.numel() for p in part.load()(**place).parameters())
    except (RuntimeError, TypeError) as error:  # more than a tensor can be: the rehearsal says so
        return "" if "overflow" in str(error).lower() else str(error)
    if size > 200_000:
        return ""
    torch.manual_seed(0)
    mixer = part.load()(**place)
    if mixer.min_window > 512:
        return ""  # refused for shorter windows
    tokens = min(24, mixer.max_length or 24)
    with torch.no_grad():
        y = mixer(torch.randn(2, tokens, SIZE["width"]))
    return "" if y.isfinite().all() else "gives outputs that are not finite"


OTHERS = (1, 2, 4, 8, 24, 0.5, 500.0, True, False, "none", "length")
FORMS = {"aft": ("variant=simple", "variant=local", "variant=full"), "soft": ("form=exact",)}
FORMS |= {"linformer": ("positions=none",), "longformer": ("positions=none",)}
PLAINS = [(name, ()) for name in ARCHITECTURES if name != "hybrid"]
PLAINS += [(name, (f"model.mixer.{form}",)) for name, forms in FORMS.items() for form in forms]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "words"), PLAINS, ids=str)
def test_a_mixers_argument_that_changes_nothing_is_refused(name, words):
    config = train_config(f"model={name}", "size=tiny", "match=none", *words)
    part = plain(config.model.blocks[0].mixer)
    reference = computed(part)
    for argument in set(part) - {"_target_", "backend", "positions", "variant", "form"}:
        values = [value for value in OTHERS if value != part[argument]]
        found = [computed({**part, argument: value}) for value in values]
        if all(one in (None, reference) for one in found) and any(found):
            with pytest.raises(UserError, match=rf"^model\.mixer\.{argument}=.*: acts with "):
                check_effects(config, {}, [f"model.mixer.{argument}"])


def computed(tree: dict[str, Any]) -> tuple[int, float] | None:
    """Parameters and outputs of a mixer under one seed; None where it refuses its arguments."""
    torch.manual_seed(0)
    try:
        mixer = MixerPart.model_validate(tree).load()(**SIZE, layer=1)
    except ValueError:
        return None
    x = torch.randn(2, 48, SIZE["width"], generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        try:
            y = mixer(x)
        except ValueError:
            return None
    return sum(p.numel() for p in mixer.parameters()), y.double().abs().sum().item()


def extension_options(trees: dict[str, Any]) -> list[tuple[str, str]]:
    """(extension, dotted path within it) of every argument of every extension."""
    found = []
    for name, tree in trees.items():
        found += [(name, path) for path in ("factor", "original_length")]
        for section in ("scaling", "attention"):
            if isinstance(tree[section], dict):
                arguments = target_parameters(tree[section]["_target_"]) or []
                found += [(name, f"{section}.{argument}") for argument in arguments]
    return found


def test_every_argument_of_every_extension_is_refused_or_reads_finite_text():
    models = {
        kind: build_model(train_config(f"model={kind}", "size=tiny", "seq_len=16"), 32)[0]
        for kind in ("transformer", *MODEL_OF.values())
    }
    tokens, wrong = torch.randint(32, (1, 40)), []

    def reads(tree: dict[str, Any], kind: str) -> str:
        requested = validate(Extension, tree)
        if requested.positions is not None:
            return ""  # a way to train
        model = extend(copy.deepcopy(models[kind]), requested, 16)
        with torch.no_grad():
            return "" if model(tokens).isfinite().all() else "gives logits that are not finite"

    trees = {
        name: composed("eval", "run=run", f"extension={name}", "extension.factor=2")["extension"]
        for name in choices("extension")
    }
    for (name, path), value in itertools.product(extension_options(trees), VALUES):
        kind = MODEL_OF.get(name, "transformer")
        tree = changed(trees[name], path, value)
        message = outcome(lambda t=tree, k=kind: reads(t, k), "")
        wrong += [f"extension={name} {path}={value!r} {message}"] if message else []
    assert wrong == []
