"""Carry out a published recipe of several stages: `zoo recipe yarn_twice [option=value ...]`.

A recipe, configs/recipe/<name>.yaml, is a list of command lines of `zoo train` and `zoo eval`; what
they call a run is a folder in `runs=`, by default runs/<recipe>. What is trained already is not
trained twice, so that the same command goes on where it stopped. An option that is given goes

    model, size, match, hybrid, objective, seed, seq_len, data.*    to the first step, as tuned runs
                                                                    keep these
    task.<task>.*                                                   to the steps of that task
    device, report, split, kv_cache and the like of `zoo eval`       to its steps
    logger, threads, runs                                           to every step
    any other                                                       to the steps of `zoo train`

and takes the place of a step's own; extensions and their settings are the recipe's. All steps are
listed, and their options checked, before the first begins.
"""

import importlib
import json
import re
import shlex
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from zoo.cli.arms import bare
from zoo.cli.guard import run_program
from zoo.cli.launch import spelt
from zoo.config.compose import check_key, compose_groups, compose_tree, composing, parse
from zoo.config.groups import CONFIGS, choices, groups
from zoo.config.schema.eval import EvalConfig
from zoo.config.schema.train import TrainConfig
from zoo.config.tree import within
from zoo.config.validate import check_option, plain
from zoo.console import say
from zoo.errors import UserError, choose, refuse, refuse_path
from zoo.runs.claim import changed_code, check_same_run
from zoo.runs.files import check_place
from zoo.runs.folder import RunFolder
from zoo.runs.identity import run_name

USAGE = """zoo recipe <name> [option=value ...]    carry out a published recipe of several stages
the stages are listed first, and the same command goes on where it was stopped

  zoo recipe yarn_twice
  zoo recipe dca_over_pi size=tiny trainer.max_steps=20 data=text data.path=<folder of books>

recipes: {recipes}
"""
FIRST = ("model", "size", "match", "hybrid", "objective", "seed", "seq_len", "data")
OF_EVAL = tuple({*EvalConfig.model_fields} - {*TrainConfig.model_fields})
OF_BOTH = ("logger", "threads", "runs")
SIZES = ("batch_size", "batch_tokens")  # one option in two units: either takes the other's place
OF_SWEEPS = ("experiment", "launcher", "hydra")
OF_RECIPE = ("name", "finetune", "resume", "run", "checkpoint", "task", "extension")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: that of the first step that fails."""
    usage = USAGE.format(recipes=", ".join(choices("recipe")))
    return run_program("zoo recipe", usage, argv, recipe)


def recipe(words: Sequence[str]) -> int:
    """Carry the command out; see the module."""
    named = [word for word in words if "=" not in word]
    if len(named) != 1:
        refuse_path(" ".join(named) or "no name", "must be one recipe", "See zoo recipe --help")
    name = choose("recipe", named[0], choices("recipe"))
    given = [bare(word) for word in words if "=" in word]
    _check_given(name, given)
    found = steps(name, given)
    _check(name, found, given)
    lines = [f"zoo {program} {' '.join(map(_in_shell, step))}" for program, step in found]
    say(f"{name} has {len(found)} stages:")
    for number, line in enumerate(lines, 1):
        say(f"  {number}. {line}")
    for number, (program, step) in enumerate(found, 1):
        say(f"stage {number} of {len(found)}: {lines[number - 1]}")
        own = f"zoo recipe {name}, stage {number}"
        code = importlib.import_module(f"zoo.cli.{program}").main(step, own)
        if code:
            return code
    return 0


def _check_given(name: str, given: Sequence[str]) -> None:
    """Refuse an option that is none of a recipe's, by the name that was given."""
    with composing("train"):
        overrides = parse(given)
        known = _known()
        for one in overrides:
            key, value = one.key_or_group, str(one.input_line).partition("=")[2]
            if within(key.replace("/", "."), OF_SWEEPS):
                refuse(key, value, "is of a sweep, and a stage is one run", "Leave it out")
            if key == "fresh":
                refuse(key, value, "begins runs that no later stage reads", "Use another runs=")
            if within(key, OF_RECIPE) and not key.startswith("task."):
                refuse(key, value, f"{name} sets it in each of its stages", "Leave it out")
            if one.is_sweep_override():
                rule = "names several values, and a recipe takes one"
                refuse(key, value, rule, f"Give one; one with a comma is \"{key}='{value}'\"")
            if key.partition(".")[0] not in {*known, "task"}:
                check_key(key, one.value(), OmegaConf.create(known), ())
            if key == "runs":
                check_option(TrainConfig, "runs", one.value())


def _known() -> dict[str, Any]:
    """The trees of what can be given to a stage, by their first names."""
    known: dict[str, Any] = {}
    for program in ("eval", "train"):
        tree: Any = OmegaConf.to_container(compose_groups(program, []))
        known |= {**dict.fromkeys(groups(program)), **tree}
    others = (*OF_RECIPE, *OF_SWEEPS, "fresh")
    return {key: tree for key, tree in known.items() if key not in others}


def _check(name: str, found: Sequence[tuple[str, list[str]]], given: Sequence[str]) -> None:
    """Refuse, before the first stage, what any of them would, and an option that the recipe has no
    use for."""
    for word in given:
        if not any(word in step for _, step in found):
            key, _, value = word.partition("=")
            refuse(key, value, f"no stage of {name} takes it", "Leave it out")
    runs = next(_value(word) for word in found[0][1] if word.startswith("runs="))
    check_place("runs", runs)
    if Path(runs).is_file():
        refuse("runs", runs, "is a file", "Name a folder, which need not be there")
    with tempfile.TemporaryDirectory() as trained, composing("train"):
        for number, (program, step) in enumerate(found, 1):
            words = [_moved(word, runs.rstrip("/"), trained) for word in step]
            try:
                _check_stage(program, words, trained, runs.rstrip("/"))
            except UserError as error:
                said = str(error).replace(trained, runs)
                if number > 1:
                    said = f"{said.removesuffix('.')} (stage {number} of {name})."
                raise UserError(said) from None


def _check_stage(program: str, step: Sequence[str], trained: str, runs: str) -> None:
    """Refuse what the stage's program would, where the runs of the stages before are folders of
    `trained`, which will be in `runs`; leave one of its own, as if it were trained."""
    words = spelt(program, step)
    check = importlib.import_module(f"zoo.cli.{program}").check
    tree = compose_tree(program, parse(words))
    config = check(tree, [word.partition("=")[0] for word in words])
    if program == "train":
        _check_folder(config, trained, runs)
        done = {"status": "done", "step": config.trainer.max_steps}
        folder = RunFolder.create(Path(trained) / run_name(config), config, done)
        weights = folder.path / f"checkpoints/step={config.trainer.max_steps}.ckpt"
        zipfile.ZipFile(weights, "w").close()


def _check_folder(config: TrainConfig, trained: str, runs: str) -> None:
    """Refuse a stage whose folder holds another run, or one that other code has trained.

    What a search finds for the base is not known before: the stage compares it when it begins.
    """
    path = Path(runs) / run_name(config)
    if not path.exists():
        return
    folder = RunFolder.open(path)
    text = json.dumps(plain(config)).replace(trained, json.dumps(runs)[1:-1])
    there = TrainConfig.model_validate(json.loads(text))
    advice = "Use another runs=<folder>"
    check_same_run(folder, _without_found(there), advice, _without_found(folder.config))
    if there.changed_code == "refuse" and changed_code(folder, there):
        advice = "Use another runs=<folder>, or changed_code=accept to go on with it"
        refuse_path(path, "was trained by other code", advice)


def _without_found(config: TrainConfig) -> TrainConfig:
    """A configuration without the factors of its extensions that a search may have found."""

    def without(one: Any) -> Any:
        searched = one.extension.name == "longrope"
        extension = one.extension.model_copy(update={"scaling": None} if searched else {})
        return one.model_copy(update={"extension": extension})

    return without(config.model_copy(update={"stages": [*map(without, config.stages)]}))


def _moved(word: str, runs: str, trained: str) -> str:
    """A word with the run that it names in another place."""
    key = word.partition("=")[0]
    if key not in ("finetune", "run"):
        return word
    return _word(key, f"{trained}{_value(word).removeprefix(runs)}")


def steps(name: str, given: Sequence[str] = ()) -> list[tuple[str, list[str]]]:
    """The programs of a recipe and their words, under the options that are given."""
    file = CONFIGS / "recipe" / f"{name}.yaml"
    lines = yaml.safe_load(file.read_text(encoding="utf-8"))["steps"]
    runs = next((_value(word) for word in given if word.startswith("runs=")), f"runs/{name}")
    placed = runs.rstrip("/")
    found = []
    for number, line in enumerate(lines):
        program, *own = line.split()
        task = next((word[5:] for word in own if word.startswith("task=")), None)
        taken = [word for word in given if _goes_to(word, program, number == 0, task)]
        keys = {word.partition("=")[0] for word in taken}
        keys |= {*SIZES} if keys & {*SIZES} else set()
        kept = [_placed(word, placed) for word in own if word.partition("=")[0] not in keys]
        default = [_word("runs", runs)]
        default += [_word("report", f"{placed}-report.html")] * (program == "eval")
        default = [word for word in default if word.partition("=")[0] not in keys]
        found.append((program, [*kept, *taken, *default]))
    return found


def _goes_to(word: str, program: str, first: bool, task: str | None) -> bool:
    key = word.partition("=")[0]
    if key.startswith("task."):
        return key.startswith(f"task.{task}.")
    if within(key, OF_BOTH):
        return True
    if within(key, OF_EVAL):
        return program == "eval"
    return program == "train" and (first or not within(key, FIRST))


def _placed(word: str, runs: str) -> str:
    """A word with the run that it names as a path."""
    key, _, value = word.partition("=")
    return _word(key, f"{runs}/{value}") if key in ("finetune", "run") else word


def _value(word: str) -> str:
    """The value of an option that is one text, without the quotes that it may need."""
    return str(_parsed(word))


def _parsed(word: str) -> Any:
    with composing("train"):
        return parse([word])[0].value()


def _word(key: str, value: str) -> str:
    """The option of this value, in quotes where a comma, a space or another sign needs them."""
    plain = f"{key}={value}"
    if re.fullmatch(r"[a-zA-Z0-9_./+@%*:-]+", value) and _parsed(plain) == value:
        return plain
    escaped = re.sub(r"(\\*)('|$)", lambda one: 2 * one[1] + (one[2] and "\\'"), value)
    return f"{key}='{escaped}'"


def _in_shell(word: str) -> str:
    return shlex.quote(word) if "'" in word else word
