"""Run the arms of a sweep by Hydra's launcher; one that fails does not stop the others."""

import functools
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig

from zoo.cli.arms import Arm, Check, Job, bare, run_arm
from zoo.cli.guard import log_plainly
from zoo.config.compose import compose_tree, composing, parse
from zoo.config.groups import groups
from zoo.config.schema.train import TrainConfig
from zoo.console import label, say
from zoo.errors import RunError, refuse, refuse_path
from zoo.runs.folder import RunFolder
from zoo.runs.identity import run_name
from zoo.runs.stopping import PREEMPTED, is_job, requeue


def sweep(
    program: str,
    words: list[str],
    arms: list[list[Override]],
    configs: list[Any],
    check: Check,
    job: Job,
) -> int:
    """Run the arms by Hydra's sweeper and launcher, then list them; returns the exit code.

    Args:
        program: train or eval.
        words: the command line, as Hydra reads it.
        arms: the options of each arm.
        configs: their configurations.
        check: turns a composed tree into a configuration.
        job: carries one configuration out.
    """
    names = [c.name for c in configs if isinstance(c, TrainConfig) and c.name and not c.resume]
    if len(set(names)) < len(names):
        refuse("name", names[0], "names one folder, and these are several runs", "Leave it out")
    common = set.intersection(*({bare(o.input_line) for o in arm} for arm in arms))
    task = functools.partial(_arm, program, len(configs), common, check, job)
    front = GlobalHydra.instance().hydra
    assert front is not None
    try:
        with _announced(Path(configs[0].runs)):
            returned = front.multirun(config_name=program, task_function=task, overrides=words)
    except HydraException as error:
        refuse_path(_label(words), str(error).splitlines()[0], "See --hydra-help")
    except Exception as error:  # an arm raises nothing: this is the launcher's own
        if program == "train":
            pairs = enumerate(zip(arms, configs, strict=True), 1)
            say(_table([_as_recorded(number, *pair, common) for number, pair in pairs]))
        raise RunError(f"the sweep's launcher failed: {str(error).splitlines()[0]}") from error
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


def _as_recorded(
    number: int, overrides: list[Override], config: TrainConfig, common: set[str]
) -> Arm:
    """An arm whose job has not said what became of it, as its run folder has it."""
    options = [bare(one.input_line) for one in overrides]
    arm = Arm(number, " ".join(one for one in options if one not in common), "", config.seed)
    path = Path(config.resume or Path(config.runs) / run_name(config))
    if not path.is_dir():
        arm.failed = "not begun"
        return arm
    folder = RunFolder.open(path)
    arm.folder, arm.loss = str(folder), folder.last_metric("valid_loss")
    arm.failed = None if folder.info["status"] == "done" else folder.info["status"]
    return arm


@contextmanager
def _announced(runs: Path) -> Iterator[None]:
    """Say where the jobs that a cluster's launcher (submitit) submits meanwhile keep their logs."""
    pattern, done = ".sweeps/*/.submitit/*", threading.Event()
    known = {*runs.glob(pattern)}

    def report() -> None:
        for job in sorted({*runs.glob(pattern)} - known):
            known.add(job)
            if "%" in job.name:  # the pattern of names, as a folder
                continue
            say(f"job {job.name}: logs in {job}")

    def watch() -> None:
        while not done.wait(1):
            report()

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    try:
        yield
    finally:
        done.set()
        watching.join()
        report()


def for_hydra(program: str, override: Override, params: dict[str, str]) -> str:
    """The option as Hydra takes it although the YAML files may not hold its key."""
    line, key = (override.input_line or "").lstrip("+"), override.key_or_group
    plain_key = override.is_hydra_override() or key in groups(program) or key in params
    return line if plain_key else f"++{line}"


def _arm(
    program: str, count: int, common: set[str], check: Check, job: Job, _composed: DictConfig
) -> Arm:
    """One arm, wherever the launcher put it; its options are composed as those of a single run."""
    words, number = list(HydraConfig.get().overrides.task), HydraConfig.get().job.num + 1
    given = [word.lstrip("+").partition("=")[0] for word in words]
    options = " ".join(word for word in map(bare, words) if word not in common)
    arm = Arm(number, options, Path(HydraConfig.get().sweep.dir).name)
    log_plainly()
    label(f"[{number}/{count}] ")

    def work() -> int:
        HydraConfig.instance().cfg = None  # a further rank must not compose the sweep's own
        with composing(program):
            tree = compose_tree(program, parse([word.lstrip("+") for word in words]))
        arm.seed = tree.get("seed")
        return job(check(tree, given), arm)

    try:
        say(_label(words))
        run_arm(arm, work)
        if arm.failed:
            say("failed")  # why is printed once, when all are done
    except KeyboardInterrupt as stop:
        if PREEMPTED is not None and is_job() and PREEMPTED.name in str(stop):
            say(str(stop))
            requeue()  # does not return
        raise  # a cluster that has sent SIGTERM itself returns the job to its queue, or ends it
    finally:
        label("")
    return arm


def _label(words: Sequence[str]) -> str:
    return " ".join(map(bare, words))
