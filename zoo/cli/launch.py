"""The front of both programs: help, checks and sweeps around Hydra.

Every arm is composed and checked before the first one starts. A mistake is told in one line with
exit code 2 and nothing written; an arm that fails later does not stop the others.
"""

import argparse
import functools
import itertools
import json
import logging
import re
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import hydra
import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf
from pydantic import BaseModel

from zoo.config.compose import SCHEMAS, compose_groups, compose_tree, composing, parse
from zoo.config.groups import CONFIGS, choices, groups
from zoo.config.schema import TrainConfig, Trainer
from zoo.config.sizes import read_sizes
from zoo.config.tree import leaves
from zoo.config.validate import plain
from zoo.console import label
from zoo.console import say as say
from zoo.errors import RunError, UserError, refuse, refuse_path
from zoo.runs.files import one_line
from zoo.runs.identity import run_name
from zoo.runs.stopping import STOPPED, handled

Config = TypeVar("Config", bound=BaseModel)
Check = Callable[[dict[str, Any], list[str]], Config]  # composed tree, options given -> config
Job = Callable[[Config, "Arm | None"], int]  # config, which arm of a sweep -> exit code


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
    until: int | None = None  # the step to pause at; None: the last


class _Lines(logging.Handler):
    """What the modules tell, in the program's own plain lines."""

    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage())


SHOWN = {  # of the options inside groups, those that --help explains
    "train": ("optim.lr", "trainer.max_steps", "trainer.precision", "trainer.devices"),
    "eval": ("data.path",),
}


def launch(program: str, argv: Sequence[str] | None, *, usage: str, check: Check, job: Job) -> int:
    """Run `program` on command line `argv` (None: the process's own); returns its exit code.

    `check` turns a composed tree into a configuration without importing anything heavy; `job`
    carries one configuration out.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    return guarded(f"{program}.py", lambda: _launch(program, words, usage, check, job))


def guarded(program: str, work: Callable[[], int]) -> int:
    """The exit code of `work`; what the user can mend and a stop are told in one line."""
    _log()
    try:
        with handled():
            return work()
    except (UserError, OSError) as error:
        say(f"{program}: {one_line(error)}")
        return 2
    except RunError as error:
        say(f"{program}: {one_line(error)}")
        return 1
    except KeyboardInterrupt as stop:
        say(f"{program}: {str(stop) or 'stopped'}")
        return STOPPED


def _log() -> None:
    log = logging.getLogger("zoo")
    if not log.handlers:
        log.addHandler(_Lines())
        log.setLevel(logging.INFO)


def _launch(program: str, argv: list[str], usage: str, check: Check, job: Job) -> int:
    flags = _flags().parse_intermixed_args(argv)
    if flags.help:
        sys.stdout.write(_help(program, usage))
        return 0
    if flags.shell_completion or flags.info or flags.hydra_help or flags.cfg in ("hydra", "all"):
        hydra.main(str(CONFIGS), program, version_base="1.3")(lambda _: None)()
        return 0
    with composing(program):
        overrides = parse(flags.words)
        params = _sweep_params(program, overrides, flags.multirun)
        arms, configs = _composed(program, overrides, params, check)
        if flags.cfg:
            sys.stdout.write("---\n".join(_yaml(config) for config in configs))
            return 0
        if len(arms) > 1 or flags.multirun:
            words = [_for_hydra(program, override, params) for override in overrides]
            lines = [{_label([o.input_line or ""]) for o in arm} for arm in arms]
            return _sweep(program, words, configs, set.intersection(*lines), check, job)
    return job(configs[0], None)


def composed_arms(
    program: str, words: Sequence[str], check: Check[Config]
) -> list[tuple[list[str], Config]]:
    """What a sweep over `words` would run, checked: each arm's options and its configuration."""
    with composing(program):
        overrides = parse(list(words))
        params = _sweep_params(program, overrides, multirun=True)
        arms, configs = _composed(program, overrides, params, check)
    lines = [[_bare(o.input_line or "") for o in arm] for arm in arms]
    return [*zip(lines, configs, strict=True)]


def _composed(
    program: str, overrides: list[Override], params: dict[str, str], check: Check[Config]
) -> tuple[list[list[Override]], list[Config]]:
    """The arms' options and their configurations, all checked before the first one starts."""
    arms = _arms(overrides, params)
    given = [o.key_or_group for o in overrides if not o.is_hydra_override()]
    configs = [check(compose_tree(program, arm), given) for arm in arms]
    _check_distinct(arms, configs)
    _tell_sizes(arms, configs)
    return arms, configs


class _Flags(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        flag, _, rule = message.partition(": ")
        if rule and flag.startswith("argument "):
            refuse_path(flag.removeprefix("argument "), rule, "See --help")
        refuse_path(message.rpartition(": ")[2], "unknown flag", "See --help")


def _flags() -> argparse.ArgumentParser:
    flags = _Flags(add_help=False, allow_abbrev=False)
    flags.add_argument("-h", "--help", action="store_true")
    flags.add_argument("-m", "--multirun", action="store_true")
    flags.add_argument("-c", "--cfg", choices=["job", "hydra", "all"])
    for tool in (["-sc", "--shell-completion"], ["--hydra-help"]):  # answered by Hydra
        flags.add_argument(*tool, action="store_true")
    flags.add_argument("-i", "--info", nargs="?", const="all")
    flags.add_argument("words", nargs="*")
    return flags


def _sweep_params(program: str, overrides: list[Override], multirun: bool) -> dict[str, str]:
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
    return [list(arm) for arm in itertools.product(*map(_values, counted))]


def _values(override: Override) -> list[Override]:
    if not override.is_sweep_override():
        return [override]
    key = override.key_or_group
    return [parse([f"{key}={value}"])[0] for value in override.sweep_string_iterator()]


def _check_distinct(arms: list[list[Override]], configs: list[Any]) -> None:
    """Refuse two arms that are one run, which side by side would share a folder."""
    seen = set()
    for arm, config in zip(arms, configs, strict=True):
        if isinstance(config, TrainConfig) and not config.fresh and not config.name:
            name = run_name(config)
            if name in seen:
                label = " ".join(str(override.input_line) for override in arm)
                refuse_path(label, "is given twice", "Give each run once")
            seen.add(name)


def _tell_sizes(arms: list[list[Override]], configs: list[Any]) -> None:
    """Say what 64k and 2**16 were taken for."""
    told = {}
    for arm, config in zip(arms, configs, strict=True):
        values = dict(leaves(plain(config)))
        for override in arm:
            key, given = override.key_or_group, override.value()
            meant = read_sizes(given)
            if meant != given and values.get(key, meant) == meant:
                told[f"{key}={given} means {meant}"] = None
    for line in told:
        say(line)


def _sweep(
    program: str,
    words: list[str],
    configs: list[Any],
    common: set[str],
    check: Check,
    job: Job,
) -> int:
    """Run the arms by Hydra's sweeper and launcher, then list them, and again those that failed.

    `common` are the options that all arms have.
    """
    names = [c.name for c in configs if isinstance(c, TrainConfig) and c.name and not c.resume]
    if len(set(names)) < len(names):
        refuse("name", names[0], "names one folder, and these are several runs", "Leave it out")
    task = functools.partial(_arm, program, len(configs), common, check, job)
    front = GlobalHydra.instance().hydra
    assert front is not None
    with _announced(Path(configs[0].runs)):
        returned = front.multirun(config_name=program, task_function=task, overrides=words)
    batches = returned if isinstance(returned, list) else []  # an optimiser's sweeper keeps them
    results = [result for batch in batches for result in batch]
    if program == "train" and len(results) > 1:
        say(_table([result.return_value for result in results]))
    failed = [r for r in results if r.return_value.failed]
    if failed:
        say(f"{program}.py: {len(failed)} of {len(results)} arms failed:")
        for result in failed:
            say(f"  {_label(result.overrides)}: {result.return_value.failed}")
    return 1 if failed else 0


def _table(arms: list[Arm]) -> str:
    """The arms of a sweep with their validation losses, a line each."""
    rows = [("arm", "options", "seed", "valid loss", "folder")]
    for arm in arms:
        options = " ".join(o for o in arm.options.split() if not o.startswith("seed="))
        loss = "" if arm.loss is None else f"{arm.loss:.4f}"
        seed = "" if arm.seed is None else str(arm.seed)
        result = "failed" if arm.failed else loss
        rows.append((str(arm.number), options, seed, result, arm.folder or ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "\n".join(lines)


@contextmanager
def _announced(runs: Path) -> Iterator[None]:
    """Say where the jobs that a cluster's launcher (submitit) submits meanwhile keep their logs."""
    pattern, done = ".sweeps/*/.submitit/*", threading.Event()
    known = {*runs.glob(pattern)}

    def tell() -> None:
        for job in sorted({*runs.glob(pattern)} - known):
            known.add(job)
            say(f"job {job.name}: logs in {job}")

    def watch() -> None:
        while not done.wait(1):
            tell()

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    try:
        yield
    finally:
        done.set()
        watching.join()
        tell()


def _for_hydra(program: str, override: Override, params: dict[str, str]) -> str:
    """The option as Hydra takes it although the YAML files may not hold its key."""
    line, key = (override.input_line or "").lstrip("+"), override.key_or_group
    plain_key = override.is_hydra_override() or key in groups(program) or key in params
    return line if plain_key else f"++{line}"


def _label(words: Sequence[str]) -> str:
    return " ".join(map(_bare, words))


def _arm(
    program: str, count: int, common: set[str], check: Check, job: Job, composed: DictConfig
) -> Arm:
    """One arm, wherever the launcher put it."""
    words, number = list(HydraConfig.get().overrides.task), HydraConfig.get().job.num + 1
    given = [word.lstrip("+").partition("=")[0] for word in words]
    options = " ".join(word for word in map(_bare, words) if word not in common)
    arm = Arm(number, options, Path(HydraConfig.get().sweep.dir).name)
    _log()
    label(f"[{number}/{count}] ")
    try:
        say(_label(words))
        HydraConfig.instance().cfg = None  # a further rank must not compose the sweep's own
        tree: Any = OmegaConf.to_container(composed, resolve=True)
        arm.seed = tree.get("seed")
        with handled():
            code = job(check(tree, given), arm)
        arm.failed = f"exit code {code}" if code else None
    except Exception as error:
        if not isinstance(error, UserError | RunError):
            traceback.print_exc()
        say(f"{program}.py: {one_line(error)}")
        arm.failed = one_line(error)
    finally:
        label("")
    return arm


def _bare(word: str) -> str:
    return word.lstrip("+")


def _yaml(config: BaseModel) -> str:
    return yaml.safe_dump(plain(config), sort_keys=False, default_flow_style=None)


def _help(program: str, usage: str) -> str:
    lines = [usage.strip(), "", "groups: group=name chooses a file of configs/<group>/"]
    defaults = groups(program)
    for group, chosen in defaults.items():
        names = (f"[{name}]" if name == chosen else name for name in choices(group))
        lines.append(f"  {group:<11}{' '.join(names)}")
    lines += ["", "options (any other key of the YAML files likewise):"]
    tree = yaml.safe_load((CONFIGS / f"{program}.yaml").read_text(encoding="utf-8"))
    for group, chosen in defaults.items():
        file = CONFIGS / group / f"{chosen}.yaml"
        tree[group] = yaml.safe_load(file.read_text(encoding="utf-8")) if file.exists() else None
    values = dict(leaves(tree))
    schema = SCHEMAS[program]
    defaults = {**defaults, "data": None}  # a section, not an option
    for key in [*(k for k in schema.model_fields if k not in defaults), *SHOWN[program]]:
        section, _, last = key.rpartition(".")
        owner: Any = schema.model_fields[section].annotation if section else schema
        lines.append(f"  {_option(key, values[key]):<30}{owner.model_fields[last].description}")
    if program == "eval":
        lines += ["", "options of what task= chooses, whose YAML files say more:", *_task_options()]
    if program == "train":
        lines.append(
            f"  {'hybrid=null':<30}models by layer, as in [3*mamba,transformer]: model=hybrid"
        )
        more = [name for name in Trainer.model_fields if f"trainer.{name}" not in SHOWN["train"]]
        lines += ["", f"of Lightning's Trainer, trainer.<argument>= takes {', '.join(more)}"]
    return "\n".join(lines) + "\n"


def _task_options() -> Iterator[str]:
    """Each task's options with their values, and what its YAML file says beside them."""
    for name in choices("task"):
        text = (CONFIGS / "task" / f"{name}.yaml").read_text(encoding="utf-8")
        for key, value, words in re.findall(
            r"^  ([a-z]\w*): ([^#\n]*?)(?: *# (.*))?$", text, re.MULTILINE
        ):
            option = f"task.{name}.{key}={'' if value == '???' else value}"
            yield f"  {option:<38}{words}".rstrip()


def _option(key: str, value: Any) -> str:
    value = json.dumps(value) if value is None or isinstance(value, bool) else value
    return f"{key}=" if value == "???" else f"{key}={value}"
