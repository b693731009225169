"""The arms of a sweep: composed from a command line and checked before any starts."""

import itertools
import math
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from pydantic import BaseModel

from zoo.config.compose import compose_groups, compose_tree, composing, parse
from zoo.config.schema.train import TrainConfig
from zoo.config.sizes import read_sizes
from zoo.config.tree import leaves
from zoo.config.validate import plain
from zoo.console import say
from zoo.errors import NonFiniteError, RunError, UserError, refuse, refuse_path
from zoo.runs.files import one_line
from zoo.runs.identity import run_name
from zoo.runs.stopping import handled

Config = TypeVar("Config", bound=BaseModel)
Check = Callable[[dict[str, Any], list[str]], Config]  # composed tree, options given -> config
Job = Callable[[Config, "Arm | None"], int]  # config, which arm of a sweep -> exit code

MAX_ARMS = 10_000  # of a sweep: all are composed and checked before the first one starts


@dataclass
class Arm:
    """One of a sweep's runs, and what became of it."""

    number: int
    options: str  # those that not all arms have
    sweep: str  # the same for all arms
    seed: int | None = None
    folder: str | None = None  # noted by the job, like the validation loss
    loss: float | None = None
    failed: str | None = None
    diverged: bool = False  # why it failed
    until: int | None = None  # the step to pause at; None: the last


def run_arm(arm: Arm, work: Callable[[], int]) -> None:
    """Do the work of an arm; `arm.failed` says why it failed. Ctrl-C alone is not caught.

    What no user can mend leaves its traceback on stderr.
    """
    try:
        with handled():
            code = work()
        arm.failed = f"exit code {code}" if code else None
    except Exception as error:
        if not isinstance(error, UserError | RunError):
            traceback.print_exc()
        arm.failed, arm.diverged = one_line(error), isinstance(error, NonFiniteError)


def composed_arms(
    program: str, words: Sequence[str], check: Check[Config]
) -> list[tuple[list[str], Config]]:
    """What a sweep over `words` would run, checked: each arm's options and its configuration."""
    with composing(program):
        overrides = parse(list(words))
        for one in overrides:
            launches = one.is_hydra_override() or one.key_or_group == "launcher"
            if launches and one.key_or_group != "hydra.sweeper.params":
                rule = "acts on a sweep of train.py or eval.py alone"
                refuse_path(str(one.input_line), rule, "Leave it out")
        params = swept_by_experiment(program, overrides, multirun=True)
        arms, configs = compose_arms(program, overrides, params, check)
    lines = [[bare(o.input_line) for o in arm] for arm in arms]
    return [*zip(lines, configs, strict=True)]


def compose_arms(
    program: str, overrides: list[Override], params: dict[str, str], check: Check[Config]
) -> tuple[list[list[Override]], list[Config]]:
    """The arms' options and their configurations, all checked before the first one starts."""
    arms = _arms(overrides, params)
    given = [o.key_or_group for o in overrides if not o.is_hydra_override()]
    configs = [check(compose_tree(program, arm), given) for arm in arms]
    _check_distinct(arms, configs)
    _print_sizes(arms, configs)
    return arms, configs


def swept_by_experiment(program: str, overrides: list[Override], multirun: bool) -> dict[str, str]:
    """What the chosen experiment sweeps over. UserError for several values without -m."""
    swept = [override.input_line for override in overrides if override.is_sweep_override()]
    if swept and not multirun:
        refuse_path(str(swept[0]), "names several values", "Add -m to run each")
    single = [override for override in overrides if not override.is_sweep_override()]
    if not any(override.key_or_group == "experiment" for override in single):
        return {}
    params = compose_groups(program, single, hydra=True).hydra.sweeper.get("params") or {}
    if params and not multirun:
        chosen = next(o.value() for o in single if o.key_or_group == "experiment")
        refuse("experiment", chosen, "is a sweep over several runs", "Add -m to run them")
    return dict(params)


def _arms(overrides: list[Override], params: dict[str, str]) -> list[list[Override]]:
    """The options of each arm; an interval, which other sweepers know, stays at its default."""
    given = [override.key_or_group for override in overrides]
    more = parse([f"{key}={value}" for key, value in params.items() if key not in given])
    every = [*more, *overrides]
    counted = [o for o in every if not o.is_sweep_override() or o.is_discrete_sweep()]
    named = [_words(o) if o.is_sweep_override() else [o] for o in counted]
    if math.prod(map(len, named)) > MAX_ARMS:
        several = " ".join(str(o.input_line) for o in counted if o.is_sweep_override())
        refuse_path(several, f"names over {MAX_ARMS:,} runs", "Split it into several sweeps")
    return [list(arm) for arm in itertools.product(*([*map(_read, each)] for each in named))]


def _read(option: str | Override) -> Override:
    return parse([option])[0] if isinstance(option, str) else option


def _words(override: Override) -> list[str]:
    """The options, one value each, that an option of several values stands for."""
    key, line = override.key_or_group, str(override.input_line)
    override.config_loader = GlobalHydra.instance().config_loader()  # where glob(...) looks
    try:
        values = [*itertools.islice(override.sweep_string_iterator(), MAX_ARMS + 1)]
    except (HydraException, ValueError) as error:
        refuse_path(line, f"cannot be read: {one_line(error)}", "See --hydra-help")
    if not values:
        refuse_path(line, "names no value", "Give one at least")
    return [f"{key}={value}" for value in values]


def _check_distinct(arms: list[list[Override]], configs: list[Any]) -> None:
    """Refuse two arms that are one run, which side by side would share a folder."""
    seen = set()
    for arm, config in zip(arms, configs, strict=True):
        if isinstance(config, TrainConfig) and not config.fresh and not config.name:
            place = config.resume and Path(config.resume).resolve()  # of one name may be several
            name = (place, run_name(config))
            if name in seen:
                label = " ".join(str(override.input_line) for override in arm)
                refuse_path(label, "is given twice", "Give each run once")
            seen.add(name)


def _print_sizes(arms: list[list[Override]], configs: list[Any]) -> None:
    """Say what 64k and 2**16 were taken for."""
    notes = {}
    for arm, config in zip(arms, configs, strict=True):
        values = dict(leaves(plain(config)))
        for override in arm:
            key, given = override.key_or_group, override.value()
            meant = read_sizes(given)
            if meant != given and values.get(key, meant) == meant:
                notes[f"{key}={given} means {meant}"] = None
    for line in notes:
        say(line)


def bare(word: str | None) -> str:
    """An option without Hydra's marks."""
    return (word or "").lstrip("+")
