"""A value that must be given is named last: to give it is then enough."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
from building import ARCHITECTURES, train_config, write_checkpoint
from omegaconf import OmegaConf

from zoo.cli.eval import check
from zoo.config import applicability
from zoo.config.applicability import acts_on, position_schemes
from zoo.config.compose import compose_tree, composing, parse
from zoo.config.groups import choices, extensions, inherited, model_section
from zoo.config.resolve import resolve
from zoo.config.schema.train import TrainConfig
from zoo.config.validate import validate
from zoo.errors import UserError
from zoo.runs.folder import RunFolder
from zoo.runs.resume import finetuned

INAPPLICABLE = ("acts on positions=", "its scaling, attention")
DONE = {"status": "done", "step": 1}
EXTENSIONS = {name: tree for name, tree in extensions().items() if name != "none"}


@cache
def tree_of(program: str, *words: str) -> dict[str, Any]:
    with composing(program):
        return compose_tree(program, parse(words))


def refusal(act: Callable[[], object]) -> str:
    try:
        act()
    except UserError as error:
        return str(error)
    return ""


def check_named_last(
    tree: dict[str, Any], given: dict[str, Any], act: Callable[[dict[str, Any]], Any]
) -> str:
    """What is refused of a tree; its value to be given, by the option, alone where with it nothing
    is."""
    first, then = refusal(lambda: act(tree)), refusal(lambda: act({**tree, **given}))
    assert first == then or (not then and "=: must be given" in first), (first, then)
    return first


def test_an_extension_that_does_not_act_on_a_model_is_named_before_its_factor(
    tmp_path, monkeypatch
):
    """Every extension and every architecture in a new run; a model of each kind of positions when
    it is tuned or measured."""
    monkeypatch.setattr(applicability, "_own_schemes", lambda: [])  # words that take a while
    monkeypatch.setattr(applicability, "_applicable", lambda _: "Use none")
    base, measured = tree_of("train", "size=tiny", "size.layers=3"), tree_of("eval", "run=x")
    sections = {name: resolve({"extension": one})["extension"] for name, one in EXTENSIONS.items()}
    kinds = set()
    for name in ARCHITECTURES:
        own: Any = OmegaConf.create({**base, "model": model_section(name)})
        whole: Any = OmegaConf.to_container(own, resolve=True)
        tree: Any = resolve({**whole, "match": "none"})
        config = validate(TrainConfig, tree)
        acting = frozenset(position_schemes(config.model))
        folder = tmp_path / name
        if acting not in kinds:
            write_checkpoint(RunFolder.create(folder, config, DONE), "step=1.ckpt")
        for extension, section in sections.items():
            acts = any(acts_on(section, scheme) for scheme in acting)
            short, given = ({"extension": {**section, "factor": one}} for one in ("???", 4))
            lines = [refusal(partial(validate, TrainConfig, {**tree, **short}))]
            if acting not in kinds:
                new = partial(validate, TrainConfig)
                assert lines == [check_named_last({**tree, **short}, given, new)]
                tuned = {**tree, **short, "finetune": str(folder)}
                lines.append(check_named_last(tuned, given, tune))
                assert acts == lines[1].startswith("extension.factor=: must be given (times the")
                read = {**measured, **short, "run": str(folder)}
                lines.append(check_named_last(read, given, partial(check, given=["run"])))
            for line in lines:
                assert line.startswith(
                    tuple(f"extension={extension}: {one}" for one in INAPPLICABLE)
                ) == (not acts), line
        kinds.add(acting)
    assert len(kinds) > 5


@pytest.mark.parametrize("model", ["alibi", "learned", "sinusoidal", "t5", "xpos", "transformer"])
def test_what_a_refused_extension_advises_acts_on_the_model(model):
    found = position_schemes(train_config(f"model={model}", "size=tiny").model)
    kinds = applicability._applicable(found).removeprefix("extension=").split(", or to train with ")
    advised = [word for kind in kinds for word in kind.split(", ")]
    for words in advised:
        name, *unscaled = words.split(" with ")
        tree = resolve({"extension": extensions()[name]})["extension"]
        assert name == "none" or any(
            acts_on(tree | ({"scaling": None} if unscaled else {}), scheme) for scheme in found
        )
    assert ("pose with extension.scaling=null" in advised) == (
        model in ("alibi", "learned", "sinusoidal")
    )


def tune(tree: dict[str, Any]) -> TrainConfig:
    return finetuned(tree, ["finetune", "extension"])


GIVEN = {
    "task=longrope": ["task.longrope.factor=8"],
    **{
        f"compress={name}": ["compress.by=.", "compress.rate=0.5"]
        for name in choices("compress")
        if inherited(name, "compress").get("by") == "???"
    },
}


@pytest.mark.parametrize("run", ["text", "examples", "masked", "mamba"])
def test_what_a_task_or_a_compression_needs_is_named_where_it_goes_with_the_run(run, tmp_path):
    words = {"text": [], "examples": ["data=parity"], "mamba": ["model=mamba"]}
    words["masked"] = ["model=linformer", "objective=masked"]
    config = train_config(*words[run], "size=tiny", "match=none")
    folder = RunFolder.create(tmp_path / "run", config, DONE)
    write_checkpoint(folder, "step=1.ckpt")
    tasks = {task: tree_of("eval", "run=x", f"task={task}")["task"] for task in choices("task")}
    for word, options in GIVEN.items():
        trees = [tree_of("eval", "run=x", word, *some) for some in ([], options)]
        for task in tasks.values() if word.startswith("compress=") else [None]:
            found = [tree | ({"task": task} if task else {}) for tree in trees]
            first, then = (
                refusal(partial(check, {**tree, "run": str(folder)}, ["run"])) for tree in found
            )
            assert first == then or (not then and "=: must be given" in first), (first, then)
