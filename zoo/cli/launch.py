"""The front of train.py and eval.py: help, checks and sweeps around Hydra.

Every arm is composed and checked before the first one starts. A mistake is refused in one line with
exit code 2 and nothing written; an arm that fails later does not stop the others.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import NoReturn

import hydra
import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf
from pydantic import BaseModel

from zoo.cli.arms import Check, Job, compose_arms, swept_by_experiment
from zoo.cli.guard import explains, guarded
from zoo.cli.help import help_text
from zoo.cli.sweep import for_hydra, sweep
from zoo.config.compose import composing, parse
from zoo.config.groups import CONFIGS, choices
from zoo.config.schema.train import TrainConfig
from zoo.config.tree import within
from zoo.config.validate import plain
from zoo.errors import choose, refuse, refuse_path


def launch(
    program: str,
    argv: Sequence[str] | None,
    *,
    usage: str,
    check: Check,
    job: Job,
    name: str | None = None,
) -> int:
    """Run `program` on command line `argv` (None: the process's own); returns its exit code.

    `check` turns a composed tree into a configuration without importing anything heavy; `job`
    carries one configuration out. `name` begins the line of a refusal; None: the program's.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    return guarded(name or f"{program}.py", lambda: _launch(program, words, usage, check, job))


def _launch(program: str, argv: list[str], usage: str, check: Check, job: Job) -> int:
    if {"-h", "--help"} & {*argv} and explains(argv, help_text(program, usage)):
        return 0
    flags = _flags().parse_intermixed_args(argv)
    if flags.shell_completion or flags.info or flags.hydra_help or flags.cfg in ("hydra", "all"):
        before, sys.argv = sys.argv, [f"{program}.py", *argv]  # where Hydra reads its words
        try:
            hydra.main(str(CONFIGS), program, version_base="1.3")(lambda _: None)()
        finally:
            sys.argv = before
        return 0
    if flags.explain and program != "train":
        refuse_path("--explain", "says what a training run costs", "Use it with train.py")
    with composing(program):
        overrides = parse(spelt(program, flags.words))
        check_launcher(overrides, flags.multirun)
        check_hydra(program, overrides, flags.multirun)
        params = swept_by_experiment(program, overrides, flags.multirun)
        arms, configs = compose_arms(program, overrides, params, check)
        if flags.cfg:
            sys.stdout.write("---\n".join(_yaml(config) for config in configs))
            return 0
        if flags.explain:
            _explain(program, configs)
            return 0
        if len(arms) > 1 or flags.multirun:
            words = [for_hydra(program, override, params) for override in overrides]
            return sweep(program, words, arms, configs, check, job)
    return job(configs[0], None)


def spelt(program: str, words: Sequence[str]) -> list[str]:
    """The words with `data=text` as `data.name=text` for eval.py, where data is no group of files:
    all that a run has of it is known, and a checkpoint's tokenizer is its own."""
    if program != "eval":
        return [*words]
    return [f"data.name={w.removeprefix('data=')}" if w.startswith("data=") else w for w in words]


# Hydra's launchers that are packages of their own, and what these are called.
PLUGINS = {"joblib": "joblib", "submitit_slurm": "submitit", "submitit_local": "submitit"}
PRESETS = {"none": "basic", "local": "joblib", "slurm": "submitit_slurm"}


def check_launcher(overrides: Sequence[Override], multirun: bool) -> None:
    """Refuse a launcher of runs that is not installed, has no cluster here or nothing to launch."""
    given = {o.key_or_group: o.value() for o in overrides}
    preset, launcher = str(given.get("launcher", "none")), given.get("hydra/launcher")
    choose("launcher", preset, choices("launcher"))
    option, value = ("hydra/launcher", launcher) if launcher else ("launcher", preset)
    plugin = PLUGINS.get(str(launcher or PRESETS.get(preset)))
    if plugin is None:
        return
    if not multirun:
        refuse(option, value, "launches the runs of a sweep", "Add -m, also for one run")
    if not _installed(f"hydra_plugins.hydra_{plugin}_launcher"):
        rule = f"needs the package hydra-{plugin}-launcher"
        refuse(option, value, rule, "Run pip install 'zoo[cluster]'")
    if plugin == "submitit" and launcher != "submitit_local":
        if shutil.which("srun") is None:
            refuse(option, value, "there is no SLURM on this machine", "Use launcher=local")
        if given.get("fresh") is True:
            rule = "begins a job that returns to the queue anew"
            refuse("fresh", True, rule, "Leave it out, and use another runs=<folder>")


def check_hydra(program: str, overrides: Sequence[Override], multirun: bool) -> None:
    """Refuse an option of Hydra's own, such as `hydra.launcher.n_jobs`, that it would not take or
    that does nothing: Hydra runs sweeps alone, and without -m an experiment's may be taken away."""
    acts = ["hydra.sweeper.params"] * any(o.key_or_group == "experiment" for o in overrides)
    front = GlobalHydra.instance().hydra
    assert front is not None
    chosen = [o.input_line for o in overrides if o.key_or_group in ("launcher", "hydra/launcher")]
    for one in overrides:
        if not one.is_hydra_override() or one.input_line in chosen:
            continue
        if one.is_sweep_override() and not multirun:
            continue  # refused as such
        if one.key_or_group == "hydra.sweep.dir":
            rule = "a sweep's records are in the folder of its runs"
            refuse("hydra.sweep.dir", one.value(), rule, "Use runs=<folder>")
        if within(one.key_or_group, ("hydra.run",)):
            rule = "acts on no run: a run's folder is its record"
            refuse(one.key_or_group, one.value(), rule, "Use runs=<folder> and name=<name>")
        if not multirun and not within(one.key_or_group, acts):
            refuse_path(str(one.input_line), "acts on a sweep alone", "Add -m, or leave it out")
        words = [str(word) for word in [*chosen, one.input_line]]
        try:
            composed = front.compose_config(program, words, RunMode.MULTIRUN)
        except HydraException as error:
            cause = str(error.__cause__ or error).splitlines()[0]
            refuse_path(str(one.input_line), cause, "See --hydra-help")
        jobs = OmegaConf.select(composed, "hydra.launcher.n_jobs")
        if jobs == 0:
            rule = "must be a number of runs side by side, or -1 for one on each core"
            refuse("hydra.launcher.n_jobs", jobs, rule)


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the package that it is in
        return False


def _explain(program: str, configs: Sequence[BaseModel]) -> None:
    """Print what each run would cost."""
    from zoo.cli.explain import explain  # torch

    for place, config in enumerate(configs):
        assert isinstance(config, TrainConfig)
        sys.stdout.write("\n" * bool(place) + explain(config))
        sys.stdout.flush()


class _Flags(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        flag, _, rule = message.partition(": ")
        if rule and flag.startswith("argument "):
            refuse_path(flag.removeprefix("argument "), rule, "See --help")
        refuse_path(message.rpartition(": ")[2], "unknown flag", "See --help")


def _flags() -> argparse.ArgumentParser:
    flags = _Flags(add_help=False, allow_abbrev=False)
    flags.add_argument("-m", "--multirun", action="store_true")
    flags.add_argument("-c", "--cfg", choices=["job", "hydra", "all"])
    flags.add_argument("--explain", action="store_true")
    for tool in (["-sc", "--shell-completion"], ["--hydra-help"]):  # answered by Hydra
        flags.add_argument(*tool, action="store_true")
    flags.add_argument("-i", "--info", nargs="?", const="all")
    flags.add_argument("words", nargs="*")
    return flags


def _yaml(config: BaseModel) -> str:
    return yaml.safe_dump(plain(config), sort_keys=False, default_flow_style=None)
