"""Renamed names: stored runs and rows are read, a command line is refused with the new one."""

import importlib
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from zoo.config import stored
from zoo.config.compose import compose, compose_tree, composing, parse
from zoo.config.groups import choices
from zoo.config.introspect import constructor_parameters
from zoo.config.stored import as_before, as_now, refuse_renamed, row_as_now
from zoo.config.validate import plain
from zoo.errors import UserError
from zoo.model.build import build_model
from zoo.runs.claim import claim
from zoo.runs.folder import RunFolder
from zoo.runs.identity import run_name

EXTENDED = ["extension=dca", "finetune=runs/x"]


def test_every_renamed_name_exists_today():
    """And moves nothing to another section, which the tables do not do."""
    for old, new in stored.OPTIONS.items():
        assert old.rpartition(".")[0] == new.rpartition(".")[0]
        assert any(_has(program, new) for program in ("train", "eval")), new
    for new in stored.TARGETS.values():
        module, _, name = new.rpartition(".")
        assert hasattr(importlib.import_module(module), name), new
    for target, names in stored.ARGUMENTS.items():
        assert set(names.values()) <= set(constructor_parameters(target) or []), target
    for group, names in stored.CHOICES.items():
        assert set(names.values()) <= set(choices(group)), group


def test_no_old_name_is_in_use_again():
    for old in stored.OPTIONS:
        assert not any(_has(program, old) for program in ("train", "eval")), old
    for group, names in stored.CHOICES.items():
        assert not set(names) & set(choices(group)), group
    for target, names in stored.ARGUMENTS.items():
        assert not set(names) & set(constructor_parameters(target) or []), target


def _has(program: str, option: str) -> bool:
    """Whether the program has an option, with its group's default or any other choice."""
    group = option.partition(".")[0]
    files = [f"{group}={name}" for name in choices(group)] or [""]
    with composing(program):
        for word in files:
            try:
                needed = [f"{option}=2"] if word == "task=longrope" else []  # has no default
                tree = compose_tree(program, parse([word, *needed] if word else []))
            except UserError:  # this program has no such group, or the choice needs more options
                continue
            if OmegaConf.select(OmegaConf.create(tree), option, default=...) is not ...:
                return True
    return False


@pytest.fixture
def renamed(monkeypatch) -> None:
    """The tables as if an option, a class, its argument and a choice had been renamed."""
    new = "zoo.attention.dual_chunk.DualChunk"
    monkeypatch.setattr(
        stored, "OPTIONS", stored.OPTIONS | {"task.passkey.places": "task.passkey.count"}
    )
    monkeypatch.setattr(stored, "TARGETS", {"zoo.attention.dca.Dual": new})
    monkeypatch.setattr(stored, "TARGETS_BEFORE", {new: "zoo.attention.dca.Dual"})
    monkeypatch.setattr(stored, "ARGUMENTS", {new: {"piece": "chunk"}})
    monkeypatch.setattr(stored, "CHOICES", {"extension": {"dual": "dca"}})


def test_a_configuration_of_before_is_read_under_the_names_of_today(renamed):
    now = plain(compose("train", [*EXTENDED, "extension.attention.chunk=5"]))
    before = as_before(now)
    assert before["extension"]["reach"]["_target_"] == "zoo.attention.dca.Dual"
    assert before["extension"]["reach"]["piece"] == 5
    assert "attention" not in before["extension"]
    assert as_now(before) == now


def test_lists_of_blocks_are_read_too(monkeypatch):
    target = "zoo.mixers.mamba.Mamba"
    monkeypatch.setattr(stored, "ARGUMENTS", {target: {"states": "state_size"}})
    part = {"_target_": target, "states": 4}
    tree = as_now({"model": {"blocks": [{"mixer": part, "feed_forward": None}]}})
    assert tree["model"]["blocks"][0]["mixer"] == {"_target_": target, "state_size": 4}


def test_a_run_keeps_its_name(renamed, tmp_path, monkeypatch):
    """The folder's name is a hash of the options by the names they first had."""
    config = compose("train", [f"runs={tmp_path}", "size=tiny"])
    named = run_name(config)
    monkeypatch.setattr(stored, "OPTIONS", {})
    assert run_name(config) != named


def test_a_run_folder_of_before_opens_and_is_the_same_run(tmp_path):
    config = compose("train", [f"runs={tmp_path}", "size=tiny"])
    folder = RunFolder.create(tmp_path / run_name(config), config, {"id": "x"})
    file = folder.path / "config.yaml"
    body = file.read_text().partition("\n")[2]
    assert "\n  attention:" in body
    file.write_text(body.replace("\n  attention:", "\n  reach:"))
    assert RunFolder.open(folder.path).config == config
    found = claim(config)
    assert (found.path, found.created) == (folder.path, False)


def test_rows_of_before_have_the_names_of_today(renamed):
    row = {
        **{"task": "passkey", "places": 5, "question": ["places", "length"], "length": 64},
        "extension_options": {"reach._target_": "zoo.attention.dca.Dual", "reach.chunk": 3},
    }
    assert row_as_now(row) == {
        **{"task": "passkey", "count": 5, "question": ["count", "length"], "length": 64},
        "extension_options": {
            **{"attention._target_": "zoo.attention.dual_chunk.DualChunk", "attention.chunk": 3},
        },
    }


def test_rows_of_another_task_keep_their_fields(renamed):
    row = {"task": "speed", "places": 5, "question": ["places"]}
    assert row_as_now(row) == row


@pytest.mark.parametrize(
    ("option", "new"),
    {
        "extension.reach.group=16": "extension.attention.group",
        "extension.reach=null": "extension.attention",
        "extension=dual": "extension=dca",
        "extension.attention.piece=4": "extension.attention.chunk",
        "extension.attention._target_=zoo.attention.dca.Dual": "zoo.attention.dual_chunk.DualChunk",
    }.items(),
)
def test_an_old_name_on_a_command_line_is_refused_with_the_new_one(renamed, option, new):
    base = [word for word in EXTENDED if word.partition("=")[0] != option.partition("=")[0]]
    with pytest.raises(UserError) as refused:
        compose("train", [*base, option])
    assert str(refused.value) == f"{option}: renamed. Use {new}."


def test_other_options_are_not_refused(renamed):
    tree: Any = {"extension": {"attention": None}}
    for key in ("extension.attention", "extension.attention.chunk", "extension.reached", "seed"):
        refuse_renamed(key, "dual", tree)


def test_no_file_of_the_project_uses_an_old_name():
    """But the table itself and this test."""
    root = Path(stored.__file__).parents[2]
    files = [*root.glob("zoo/**/*.py"), *root.glob("configs/**/*"), *root.glob("*.md")]
    files += [*root.glob("tests/**/*.py"), *root.glob("Makefile")]
    old = [*stored.OPTIONS, *stored.TARGETS]
    for file in files:
        if file.is_file() and file.name not in ("stored.py", "test_stored.py"):
            text = file.read_text(encoding="utf-8")
            assert not [name for name in old if name in text], file


SCHEMED = ["transformer", "xpos", "alibi", "t5", "nope", "learned", "sinusoidal", "sima", "soft"]


@pytest.mark.parametrize("model", SCHEMED)
def test_position_schemes_that_were_words_are_read_as_the_parts_they_are(model):
    tree = plain(compose("train", [f"model={model}", "seq_len=64"]))
    words = stored.positions_as_before(tree)
    assert isinstance(words["model"]["blocks"][0]["mixer"]["positions"], str)
    assert stored.positions_as_now(words) == stored.positions_as_now(tree) == tree


def test_a_rope_base_and_a_window_that_were_the_mixers_move_into_its_scheme():
    mixer = {"_target_": "zoo.mixers.softmax.SoftmaxAttention", "heads": 4, "positions": "xpos"}
    blocks = [{"mixer": {**mixer, "rope_base": 5e5, "window": 64}, "feed_forward": None}]
    read = stored.positions_as_now({"model": {"blocks": blocks, "max_length": None}})
    part = {"_target_": "zoo.positions.xpos.XPos", "window": 64, "rope_base": 5e5}
    assert read["model"] == {
        "blocks": [{"mixer": {**mixer, "positions": part}, "feed_forward": None}]
    }


def test_weights_under_an_old_name_are_loaded_in_their_order():
    weights = {"model.blocks.0.mixer.bias.weight": 1, "model.blocks.0.mixer.q_proj.weight": 2}
    stored.weights_as_now(weights)
    assert list(weights.items()) == [
        ("model.blocks.0.mixer.positions.bias.weight", 1),
        ("model.blocks.0.mixer.q_proj.weight", 2),
    ]
    model, _ = build_model(compose("train", ["model=t5", "size=tiny", "match=none"]), 32)
    old = {
        name.replace(".positions.bias.", ".bias."): value + 1
        for name, value in model.state_dict().items()
    }
    assert any(name.endswith(".mixer.bias.weight") for name in old)
    model.load_state_dict(old)
    assert (model.sublayers()[0].positions.bias.weight == 1).all()
