"""Whatever is given beside resume= takes effect or is refused: every option, every group's file."""

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
from building import train_config, write_checkpoint

from zoo.config.compose import compose_tree, composing, parse
from zoo.config.groups import choices, groups
from zoo.config.resolve import resolve
from zoo.config.schema.train import TrainConfig
from zoo.config.schema.trainer import Trainer
from zoo.config.tree import flat, leaves, within
from zoo.config.validate import plain
from zoo.errors import FORM, UserError
from zoo.runs.folder import RunFolder
from zoo.runs.resume import CHANGED_CODE, LAUNCHER, RESUMABLE, finetuned, resumed

STEPS = 100
VALUES = (None, True, 2, 300, "text", "sharded", "fsdp", "cpu", "constant", "offline", "accept")
VALUES += ("00:01:00:00", [0, 1])
TEXT = ("data=text", "data.path=books")
RUN = (*TEXT, "size=tiny", "trainer=fsdp", f"trainer.max_steps={STEPS}")


@pytest.fixture(params=["finished", "stopped"])
def folder(request, tmp_path) -> RunFolder:
    """A run whose steps are all trained, or one that was stopped."""
    return run(tmp_path / request.param, "wandb")


def run(path: Path, logger: str) -> RunFolder:
    folder = RunFolder.create(path, train_config(*RUN, f"logger={logger}"), {})
    status, step = ("done", STEPS) if path.name == "finished" else ("stopped", 7)
    write_checkpoint(folder, f"step={step:08d}.ckpt")
    folder.update(status=status, step=step)
    return folder


@functools.cache
def tree_of(*words: str) -> dict[str, Any]:
    with composing("train"):
        return compose_tree("train", parse(["resume=folder", *words]))


def composed(folder: RunFolder, *words: str) -> dict[str, Any]:
    return {**copy.deepcopy(tree_of(*words)), "resume": str(folder)}


def recorded(folder: RunFolder) -> dict[str, Any]:
    return {**flat(plain(folder.config)), "resume": str(folder)}


def changes(folder: RunFolder, tree: dict[str, Any], *given: str) -> dict[str, Any] | None:
    """What the options change of the run's configuration; None where one line refuses them."""
    line, before, after = "", recorded(folder), {}
    try:
        after = flat(plain(resumed(tree, ["resume", *given])))
    except UserError as error:
        line = str(error)
    if line:
        assert FORM.fullmatch(line), f"{given}: {line}"
        assert given[-1].rpartition(".")[2] in line, f"{given}: {line}"
        return None
    return {key: after.get(key) for key in {**before, **after} if before.get(key) != after.get(key)}


def test_every_option_beside_resume_takes_effect_or_is_refused(folder):
    tree, before = composed(folder, *TEXT), recorded(folder)
    paths = {path for path, _ in leaves(tree) if not path.startswith(("model.", "resume"))}
    paths |= {f"trainer.{name}" for name in Trainer.model_fields} | {"data.cache"}
    effective = set()
    for path in sorted(paths - {LAUNCHER}):
        *sections, last = path.split(".")
        for value in (value for value in VALUES if value != before.get(path)):
            given = section = copy.deepcopy(tree)
            for name in sections:
                section = section[name]
            section[last] = value
            found = changes(folder, given, path)
            if found is not None:
                effective.add(path)
                also = {"optim.continuation", "optim.continued_at", "optim.continued_from"}
                assert {*found} - also == {path}, f"{path}={value}: {found}"
                assert found[path] == value, f"{path}={value}: {found}"
    goes_on = {CHANGED_CODE, "trainer.max_steps"}  # whatever else is given then acts
    assert {*filter(lambda path: not within(path, RESUMABLE), effective)} == set()
    assert effective == goes_on if folder.name == "finished" else effective > goes_on


def test_every_file_of_a_group_takes_effect_or_is_refused(folder):
    tree = composed(folder)
    defaults = dict(leaves(tree))
    assert changes(folder, tree, LAUNCHER) == {}  # of the sweep, not of its runs
    may_change = {"trainer", "logger"}
    for one in {*groups("train")} - may_change - {LAUNCHER}:
        assert changes(folder, tree, one) is None, one
    for group, name in [(one, name) for one in may_change for name in choices(one)]:
        tree = composed(folder, f"{group}={name}")
        found = changes(folder, tree, group)
        assert folder.name == "stopped" or not found, f"{group}={name}"
        if found is not None:
            values = {**recorded(folder), **found}
            own = {path: value for path, value in leaves(tree) if path.startswith(f"{group}.")}
            own = {path: value for path, value in own.items() if defaults.get(path) != value}
            assert {path: values.get(path) for path in own} == own, f"{group}={name}"


def test_an_option_beside_more_steps_acts_on_a_finished_run(tmp_path):
    folder = run(tmp_path / "finished", "none")
    given = {"trainer.max_steps": 200, "trainer.checkpoint": "whole", "logger": "wandb"}
    tree = composed(folder, *(f"{key}={value}" for key, value in given.items()))
    found = changes(folder, tree, *given)
    assert found is not None
    assert (found["trainer.max_steps"], found["trainer.checkpoint"]) == (200, "whole")
    with pytest.raises(UserError, match=r"logger\.mode=offline: the run has logger=none"):
        resumed(composed(folder, "logger.mode=offline"), ["resume", "logger.mode"])


def test_an_option_of_the_run_is_kept_beside_another_of_its_group(tmp_path):
    folder = run(tmp_path / "stopped", "wandb")
    config: TrainConfig = folder.config
    config.logger.project = "mine"
    folder.save_config(config)
    tree = composed(folder, "logger.mode=offline")
    assert changes(folder, tree, "logger.mode") == {"logger.mode": "offline"}


@pytest.mark.parametrize(
    "data", ["data=text data.path=books", "data=jsonl data.path=x", "data=recall"]
)
def test_an_option_of_data_beside_finetune_is_of_the_base_s_text_or_refused(data, tmp_path):
    """Without data= no other text takes its place, whatever the default is."""
    base = RunFolder.create(tmp_path / "base", train_config(*data.split(), "size=tiny"), {})
    write_checkpoint(base, "step=1.ckpt")
    before, task = plain(base.config)["data"], "task" in plain(base.config)["data"]
    more = {"text": ("bos_token=3", "end_token=7"), "jsonl": ("field=body",)}.get(
        before["name"], ()
    )
    words = ("tokenizer=other.json", "passkey=0.5", "eval_documents=joined", "cache=else", *more)
    for word in words:
        name, _, value = word.partition("=")
        with composing("train"):
            tree = resolve(compose_tree("train", parse([f"finetune={base}", f"data.{word}"])))
        given = ["finetune", f"data.{name}"]
        if task:
            with pytest.raises(UserError, match=rf"data\.{word}: data=recall has no such option"):
                finetuned(tree, given)
        else:
            after = plain(finetuned(tree, given))["data"]
            kinds = {"passkey": float, "bos_token": int, "end_token": int}
            assert after == {**before, name: kinds.get(name, str)(value)}
