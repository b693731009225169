"""Command lines drawn at random: each is refused in one line, or a run that is what it says."""

import io
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from building import ARCHITECTURES, train_on_text

from zoo.__main__ import main
from zoo.cli import train, tune
from zoo.config.compose import compose, compose_tree, composing, parse
from zoo.config.groups import choices
from zoo.config.introspect import target_parameters
from zoo.config.schema.train import TrainConfig
from zoo.config.schema.trainer import Trainer
from zoo.config.sizes import read_sizes
from zoo.config.trainer_arguments import TRAINER_OWNED, TRAINER_REFUSED
from zoo.config.tree import flat, leaves, within
from zoo.config.validate import plain
from zoo.errors import FORM

ROOT = Path(__file__).parents[2]
ODD = ("0", "-1", "1", "2", "3", "7", "0.5", "1e9", "1e18", "1e309", "1e308", "-inf", "nan", "inf")
ODD += (
    "null",
    "true",
    "abc",
    "''",
    "[]",
    "[1]",
    "[0,1]",
    "{0:2}",
    "1k",
    "64k",
    "2**99",
    "é",
    "a b",
)
PLAIN = ("1", "2", "3", "4", "8", "16", "64", "256", "0.1", "0.5", "true", "false", "auto", "cpu")
GROUPS = {group: choices(group) for group in ("extension", "data", "size", "logger", "optim")}
LIMIT = 30  # seconds for a refusal, and for a run of a few steps


def options(model: str) -> list[str]:
    """Every option that training with that model has, of the YAML files and of their code."""
    with composing("train"):
        tree = compose_tree("train", parse(["size=tiny", f"model={model}"]))
    found = [path for path, _ in leaves(tree) if not path.endswith("_target_")]
    found += [f"trainer.{name}" for name in Trainer.model_fields]
    refused = random.Random(model).sample(sorted({*TRAINER_REFUSED, *TRAINER_OWNED}), 3)
    found += [f"trainer.{name}" for name in refused]
    for slot in ("mixer", "feed_forward"):
        if isinstance(part := tree["model"].get(slot), dict):
            names = target_parameters(part["_target_"]) or []
            found += [f"model.{slot}.{name}" for name in names]
    return sorted({*found, *GROUPS, "nonsense"})


def lines(count: int, seed: int) -> list[list[str]]:
    """Command lines of one to three odd options each."""
    draw, found = random.Random(seed), []
    known = {model: options(model) for model in ARCHITECTURES}
    while len(found) < count:
        model = draw.choice(ARCHITECTURES)
        keys = draw.sample(known[model], draw.randint(1, 3))
        values = [draw.choice(GROUPS.get(key) or draw.choice((ODD, PLAIN))) for key in keys]
        found.append([f"model={model}", *map("=".join, zip(keys, values, strict=True))])
    return found


def written(folder: Path) -> list[str]:
    """What a program left in the folder beside the tokens it keeps."""
    return [
        str(path.relative_to(folder)) for path in folder.rglob("*") if ".data" not in path.parts
    ]


EVAL = ("weights", "device", "split", "fresh", "threads", "against", "checkpoint")
EVAL += ("data", "data.path")
TASKS = ("generate", "perplexity", "passkey", "stream", "accuracy", "speed", "longrope")
OF_CHAT = ("prompt", "tokens", "temperature", "top_p", "seed", "stop", "device", "weights", "top_k")
OF_EXPORT = {
    "run": ("RUN", "", "nowhere", "é", "."),
    "to": ("out", "RUN", "", ".", "x/..", "a/b/c", "/proc/x", "x" * 300),
    "format": ("auto", "transformers", "zoo", "", "gguf"),
}
OWN = {
    **{"weights": ("int8", "int4", "int2", "null"), "split": ("valid", "test", "train", "all")},
    **{"checkpoint": ("EXPORTED", "nowhere", "RUN"), "against": ("published", "null", "x")},
    **{"device": ("cpu", "auto", "cuda", "cpu:9", "tpu"), "fresh": ("true", "false", "1")},
    **{"data.path": ("nowhere", ".", "null"), "data": ("text", "jsonl", "stdlib", "parity", "x")},
}
TUNED = {"optim.lr": ("1e-3,2e-3", "nan,1e-3", "0,1"), "seed": ("0,1", "-1,0", "a,b")}


def other_lines(count: int, seed: int) -> list[list[str]]:
    """Lines of the programs that read a run, RUN, or a checkpoint, EXPORTED, and of `zoo tune`."""
    draw, found = random.Random(seed), []

    def value(key: str, own: dict[str, tuple[str, ...]]) -> str:
        return f"{key}={draw.choice(own.get(key) or draw.choice((ODD, PLAIN)))}"

    def some(keys: list[str], own: dict[str, tuple[str, ...]] = OWN) -> list[str]:
        return [value(key, own) for key in draw.sample(keys, draw.randint(0, 3))]

    with composing("eval"):
        of_task = {
            task: [
                path
                for path, _ in leaves(compose_tree("eval", parse(["run=x", f"task={task}", *more])))
                if path.startswith("task.") and not path.endswith("_target_")
            ]
            for task in TASKS
            for more in [["task.longrope.factor=4"] if task == "longrope" else []]
        }
    extended = ["extension", "extension.factor", "extension.original_length"]
    while len(found) < count:
        program = draw.choice(("eval", "eval", "eval", "chat", "export", "tune"))
        if program == "eval":
            task = draw.choice(TASKS)
            words = [f"task={task}", *some([*of_task[task], *of_task[task], *EVAL, *extended])]
            words += [] if any(word.startswith("checkpoint=") for word in words) else ["run=RUN"]
        elif program == "chat":
            place = draw.choice(("RUN", "RUN", "EXPORTED", "nowhere"))
            words = [place, *some([*OF_CHAT, *extended])]
        elif program == "export":
            words = [f"{key}={draw.choice(values)}" for key, values in OF_EXPORT.items()]
            words = draw.sample(words, draw.randint(1, 3))
        else:
            known = options(model := draw.choice(ARCHITECTURES))
            words = [f"model={model}", value(draw.choice([*TUNED]), TUNED)]
            words += [word for word in some(known) if word.partition("=")[0] not in TUNED]
        own = dict.fromkeys(word.partition("=")[0] for word in words)
        found += [[program, *words]] if len(own) == len(words) else []
    return found


# What an option changes beside itself, by the beginnings of the paths.
FOLLOWS = {
    "seq_len": ("batch_size", "model.max_length", "model.blocks"),
    "batch_tokens": ("batch_size",),
    "trainer.accelerator": ("trainer.precision",),
    **dict.fromkeys(("size", "model", "hybrid", "objective"), ("model", "size")),
}
SPELLED_OUT = ("hybrid", "model.pattern", "model.positions")  # as blocks


def taken_otherwise(words: list[str], config: TrainConfig, before: TrainConfig) -> list[str]:
    """What a configuration has that its line did not set, and the other way round.

    `before` is that of the same line with the model, size and logger alone.
    """
    with composing("train"):
        requested = {o.key_or_group: o.value() for o in parse(words)}
    is_now, was = flat(plain(config)), flat(plain(before))
    wrong = []
    for key, value in requested.items():
        path = re.sub(r"^model\.(?=mixer|feed_forward)", "model.blocks.0.", key)
        if path not in is_now or value is None or key in (*GROUPS, *SPELLED_OUT):
            continue
        meant, held = read_sizes(value), is_now[path]
        kept = (meant, str(meant), value)  # as it is where the option is a text: name=64k
        if isinstance(held, bool) != isinstance(meant, bool) or held not in kept:
            wrong.append(f"{key}={value} was taken as {held!r}")
    may_change = [path for key in requested for path in (key, *FOLLOWS.get(key.split(".")[0], ()))]
    may_change += [path for key in requested for path in FOLLOWS.get(key, ())]
    for path in {*is_now, *was}:
        if is_now.get(path) != was.get(path) and not within(path, may_change):
            wrong.append(f"{path} became {is_now.get(path)!r}")
    return wrong


@pytest.mark.slow
def test_500_command_lines_in_one_process_are_refused_or_rehearsed(tmp_path, monkeypatch, capfd):
    """Everything but the training itself; what would be trained is counted."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    trained: list[Any] = []
    for name in ("fit", "fit_apart"):
        monkeypatch.setattr(train, name, lambda config, *_: trained.append(config))
    wrong, refused, other_form = [], 0, []
    for words in lines(500, seed=0):
        before, start, count = set(written(tmp_path)), time.monotonic(), len(trained)
        try:
            code = train.main([*words, "size=tiny", "logger=none"] if not named(words) else words)
        except BaseException as error:
            wrong.append((words, f"traceback {error!r}"))
            continue
        said = capfd.readouterr().err
        if time.monotonic() - start > LIMIT:
            wrong.append((words, f"took {time.monotonic() - start:.0f} s"))
        if code == 2:
            refused += 1
            if len(said_by(said)) != 1:
                wrong.append((words, f"said {said!r}"))
            elif not FORM.fullmatch(said_by(said)[0].removeprefix("train.py: ")):
                other_form.append(said_by(said)[0])
            if left := set(written(tmp_path)) - before:
                wrong.append((words, f"left {left}"))
        elif code or (len(trained) == count and "already trained" not in said):
            wrong.append((words, f"exit code {code}: {said[-300:]!r}"))
        elif len(trained) > count:
            chosen = ("model=", "size=", "logger=")
            default = [word for word in words if word.startswith(chosen)]
            default += [] if named(words) else ["size=tiny", "logger=none"]
            other = taken_otherwise(words, trained[-1], compose("train", default))
            wrong += [(words, message) for message in other]
    assert wrong == []
    assert other_form == []
    assert refused > 250
    assert len(trained) > 20


@pytest.mark.slow
def test_200_command_lines_of_the_other_programs(tmp_path, monkeypatch, capfd):
    """Measured, written, exported for real, from a run of two steps; trained is nothing."""
    few = ["model=transformer", "batch_tokens=64", "trainer.max_steps=2"]
    train_on_text(tmp_path, *few, f"runs={tmp_path}", "name=run")
    run, exported = str(tmp_path / "run"), str(tmp_path / "exported")
    assert main(["export", f"run={run}", f"to={exported}"]) == 0
    (here := tmp_path / "here").mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(tune, "tune_arms", lambda arms: 0)
    wrong, codes = [], []
    for words in other_lines(200, seed=0):
        line = [word.replace("RUN", run).replace("EXPORTED", exported) for word in words]
        line += ["report=null", "logger=none"] if words[0] == "eval" else []
        monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
        before, start = set(written(here)), time.monotonic()
        capfd.readouterr()
        try:
            code = main(line)
        except BaseException as error:
            wrong.append((words, f"traceback {error!r}"))
            continue
        said = capfd.readouterr().err
        codes.append(code)
        if time.monotonic() - start > 2 * LIMIT:
            wrong.append((words, f"took {time.monotonic() - start:.0f} s"))
        if "Traceback" in said or code not in (0, 1, 2):
            wrong.append((words, f"exit code {code}: {said[-600:]}"))
        if code == 2:
            last = said_by(said)[-1].removeprefix("eval.py: ").removeprefix(f"zoo {words[0]}: ")
            if not FORM.fullmatch(last):
                wrong.append((words, f"said {said[-600:]!r}"))
            if left := set(written(here)) - before:
                wrong.append((words, f"left {left}"))
        shutil.rmtree(here / "out", ignore_errors=True)
    assert wrong == []
    assert codes.count(2) > 80
    assert codes.count(0) > 20


def said_by(errors: str) -> list[str]:
    """The lines of a program, without those that say what 64k was taken for."""
    return [line for line in errors.splitlines() if not re.search(r"=\S+ means \d+$", line)]


def named(words: list[str]) -> bool:
    """Whether a line chooses its own size or logger: then nothing is added."""
    return any(word.partition("=")[0] in ("size", "logger") for word in words)


@pytest.mark.slow
def test_command_lines_as_programs_end_well(tmp_path):
    """Some dozens for real, of a few steps each: no signal, no traceback, nothing left behind."""
    few = ["size=tiny", "logger=none", "seq_len=32", "batch_size=2", "trainer.max_steps=2"]
    few += ["valid_windows=2", "optim.warmup_steps=1"]
    wrong, done = [], 0
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for words in lines(40, seed=1):
        given = {word.partition("=")[0] for word in words}
        line = [*words, *(word for word in few if word.partition("=")[0] not in given)]
        before, start = set(written(tmp_path)), time.monotonic()
        try:
            found = subprocess.run(
                [sys.executable, str(ROOT / "train.py"), *line],
                **{"cwd": tmp_path, "capture_output": True, "text": True, "timeout": 4 * LIMIT},
                env=environment,
            )
        except subprocess.TimeoutExpired:
            wrong.append((line, "hangs"))
            continue
        done += found.returncode == 0
        if found.returncode not in (0, 1, 2) or "Traceback" in found.stderr:
            wrong.append((line, f"exit code {found.returncode}: {found.stderr[-400:]}"))
        if found.returncode == 2 and len(said_by(found.stderr)) != 1:
            wrong.append((line, f"said {found.stderr[-400:]}"))
        if found.returncode == 2 and (left := set(written(tmp_path)) - before):
            wrong.append((line, f"left {left}"))
        if found.returncode == 2 and time.monotonic() - start > LIMIT:
            wrong.append((line, f"took {time.monotonic() - start:.0f} s"))
    assert wrong == []
    assert not list(tmp_path.rglob(".*.tmp"))
