"""`--help` explains every option of the schemas once, in lines that fit a terminal."""

import importlib
from pathlib import Path

import pytest
import yaml

from zoo.cli.help import SECTIONS, WIDTH, describe, help_text
from zoo.config.compose import SCHEMAS
from zoo.config.groups import groups
from zoo.config.schema.data import DataPlace
from zoo.config.schema.model import Lora
from zoo.config.schema.optim import Optim
from zoo.config.schema.train import Distil
from zoo.config.schema.trainer import Trainer

ROOT = Path(__file__).parents[2]
PROGRAMS = ("train", "eval")
NOT_FOR_USERS = {"optim.name", "optim.continued_at", "optim.continued_from"}  # written by a run
MADE_BY_PROGRAMS = {"train": {"checkpoint", "stages", "shrunk"}, "eval": set()}


def shown(program: str) -> str:
    return help_text(program, importlib.import_module(f"zoo.cli.{program}").USAGE)


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_option_has_a_place_and_an_explanation(program):
    keys = [key for section in SECTIONS[program].values() for key in section]
    assert len(keys) == len({*keys})
    sections = {
        "train": {"distil": Distil, "lora": Lora, "optim": Optim, "trainer": Trainer},
        "eval": {"data": DataPlace},
    }[program]
    own = {key for key in SCHEMAS[program].model_fields if key not in {*groups(program), *sections}}
    inner = {f"{name}.{key}" for name, part in sections.items() for key in part.model_fields}
    assert {*keys} - {"hybrid"} == own - MADE_BY_PROGRAMS[program] | inner - NOT_FOR_USERS
    for key in keys:
        assert len(describe(program, key)) > 10, key


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_text_has_examples_choices_defaults_and_fits_the_terminal(program):
    text = shown(program)
    assert text.count(f"\n  python {program}.py ") >= 4
    assert all(len(line) <= WIDTH for line in text.splitlines())
    assert "--list" in text
    assert "None" not in text
    named = {"train": ["mamba", "[small]", "seq_len=512", "optim.lr=0.001"]}
    named["eval"] = ["[extrapolation]", "report=report.html", "data.path=null"]
    assert all(name in text for name in named[program])


def test_the_options_of_every_task_are_shown():
    text = shown("eval")
    for file in ROOT.glob("configs/task/*.yaml"):
        for task, tree in yaml.safe_load(file.read_text()).items():
            if isinstance(tree, dict):
                assert all(f"task.{task}.{name}=" in text for name in tree if name[0] != "_")


def test_what_a_run_does_not_carry_through_is_not_offered():
    assert "max_epochs" not in shown("train")
