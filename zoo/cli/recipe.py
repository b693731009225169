"""Carry out a published recipe of several stages: `zoo recipe yarn_twice [option=value ...]`.

A recipe, configs/recipe/<name>.yaml, is a list of command lines of `zoo train` and `zoo eval`; what
they call a run is a folder in `runs=`, by default runs/<recipe>. What is trained already is not
trained twice, so that the same command goes on where it stopped. An option that is given goes

    model, size, match, hybrid, objective, seed, seq_len, data.*    to the first step, as tuned runs
                                                                    keep these
    task.<task>.*                                                   to the steps of that task
    device, report                                                  to the steps of `zoo eval`
    logger, threads, runs                                           to every step
    any other                                                       to the steps of `zoo train`

and takes the place of a step's own; extensions and their settings are the recipe's. All steps are
listed, and their options checked, before the first begins.
"""

import importlib
from collections.abc import Sequence

import yaml

from zoo.cli.guard import run_program
from zoo.config.applicability import check_applies, position_schemes
from zoo.config.compose import compose, composing, parse
from zoo.config.groups import CONFIGS, choices
from zoo.config.measurable import check_measurable
from zoo.config.stages import tuned_length
from zoo.config.tree import within
from zoo.console import say
from zoo.data.sources import check_source
from zoo.devices import check_accelerator, check_deterministic, check_device
from zoo.errors import choose, refuse, refuse_path
from zoo.runs.files import check_report

USAGE = """zoo recipe <name> [option=value ...]    carry out a published recipe of several stages
the stages are listed first, and the same command goes on where it was stopped

  zoo recipe yarn_twice
  zoo recipe dca_over_pi size=tiny trainer.max_steps=20 data=text data.path=<folder of books>

recipes: {recipes}
"""
FIRST = ("model", "size", "match", "hybrid", "objective", "seed", "seq_len", "data")
OF_EVAL = ("device", "report")
OF_BOTH = ("logger", "threads", "runs")
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
    given = [word for word in words if "=" in word]
    found = steps(name, given)
    _check(name, found, given)
    lines = [f"zoo {program} {' '.join(step)}" for program, step in found]
    say(f"{name} has {len(found)} stages:")
    for number, line in enumerate(lines, 1):
        say(f"  {number}. {line}")
    for number, (program, step) in enumerate(found, 1):
        say(f"stage {number} of {len(found)}: {lines[number - 1]}")
        code = importlib.import_module(f"zoo.cli.{program}").main(step)
        if code:
            return code
    return 0


def _check(name: str, found: Sequence[tuple[str, list[str]]], given: Sequence[str]) -> None:
    """Refuse, before the first stage, an option that is none, or that the recipe has no use for."""
    first = [word for word in found[0][1] if within(word.partition("=")[0], FIRST)]
    for word in given:
        key, _, value = word.partition("=")
        if within(key, OF_RECIPE) and not key.startswith("task."):
            refuse(key, value, f"{name} sets it in each of its stages", "Leave it out")
        if not any(word in step for _, step in found):
            refuse(key, value, f"no stage of {name} takes it", "Leave it out")
    with composing("train"):
        several = [one for one in parse(given) if one.is_sweep_override()]
    for one in several:
        value = str(one.input_line).partition("=")[2]
        refuse(one.key_or_group, value, "names several values, and a recipe takes one", "Give one")
    base = compose("train", found[0][1])
    if base.data.task is None:
        check_source(base.data.model_dump())
    for program, step in found:
        keys = {word.partition("=")[0] for word in step}
        of_model = [word for word in first if word.partition("=")[0] not in keys]
        if program == "eval":
            measured = compose("eval", step)
            if measured.report is not None:
                check_report("report", measured.report)
            check_device(measured.device)
            check_applies(measured.extension, position_schemes(base.model))
            check_measurable(measured, [base])
            continue
        config = compose("train", [*step, *of_model])
        check_accelerator(config.trainer.accelerator)
        check_deterministic(config.trainer.accelerator, config.trainer.deterministic)
        check_applies(config.extension, position_schemes(base.model))
        window = tuned_length(config.extension, [], base.seq_len)
        if "batch_tokens" in keys and "seq_len" not in keys and config.batch_tokens < window:
            rule = f"must be at least {window}, the windows of {config.name}"
            refuse("batch_tokens", config.batch_tokens, rule, "Use more, or a smaller seq_len")


def steps(name: str, given: Sequence[str] = ()) -> list[tuple[str, list[str]]]:
    """The programs of a recipe and their words, under the options that are given."""
    file = CONFIGS / "recipe" / f"{name}.yaml"
    lines = yaml.safe_load(file.read_text(encoding="utf-8"))["steps"]
    runs = next((word[5:] for word in given if word.startswith("runs=")), f"runs/{name}")
    found = []
    for number, line in enumerate(lines):
        program, *own = line.split()
        task = next((word[5:] for word in own if word.startswith("task=")), None)
        taken = [word for word in given if _goes_to(word, program, number == 0, task)]
        keys = {word.partition("=")[0] for word in taken}
        kept = [_placed(word, runs) for word in own if word.partition("=")[0] not in keys]
        default = [f"runs={runs}"] + [f"report={runs}-report.html"] * (program == "eval")
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
    return f"{key}={runs}/{value}" if key in ("finetune", "run") else word
