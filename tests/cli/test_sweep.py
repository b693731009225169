"""Sweeps: an arm is the run that its options make alone."""

import functools
import shutil
from pathlib import Path

import pytest
from building import ARCHITECTURES, ROOT, train_config

from zoo.cli.arms import Arm
from zoo.cli.launch import launch
from zoo.cli.train import check
from zoo.config import compose, groups
from zoo.config.schema.train import TrainConfig
from zoo.runs.folder import RunFolder


def swept(*words: str) -> list[TrainConfig]:
    """The configurations with which a sweep over `words` starts its arms."""
    started: list[TrainConfig] = []

    def job(config: TrainConfig, _arm: Arm | None) -> int:
        started.append(config)
        return 0

    assert launch("train", ["-m", *words], usage="", check=check, job=job) == 0
    return started


@pytest.fixture
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("in_empty_folder")
@pytest.mark.parametrize(
    ("option", "values", "beside"),
    [
        ("model", ["aft", "hybrid", "mamba", "xpos"], ["size=tiny", "seq_len=512"]),
        ("model.positions", ["alibi", "none", "rope", "t5"], []),
        ("hybrid", ["[mamba]", "[gla,transformer]"], []),
        ("optim", groups.choices("optim"), []),
        ("model.short_conv", ["null", "4"], ["model=aft"]),
        ("seq_len", ["64", "1k"], ["model.positions=alibi", "match=none"]),
    ],
)
def test_an_arm_of_a_sweep_is_the_run_that_its_options_make_alone(option, values, beside):
    arms = swept(f"{option}={','.join(values)}", *beside)
    alone = [train_config(f"{option}={value}", *beside) for value in values]
    assert [arm.model_dump() for arm in arms] == [one.model_dump() for one in alone]


@pytest.mark.usefixtures("in_empty_folder")
def test_runs_of_the_same_options_go_on_side_by_side_and_one_only_once(capsys):
    """As fresh=true makes them: x, and x-2 beside it."""
    for name in ("x", "x-2"):
        RunFolder.create(Path(name), train_config("size=tiny"), {})
    assert [one.resume for one in swept("resume=x,x-2")] == ["x", "x-2"]
    assert launch("train", ["-m", "resume=x,./x"], usage="", check=check, job=pytest.fail) == 2
    assert "resume=./x: is given twice" in capsys.readouterr().err


@pytest.mark.usefixtures("in_empty_folder")
@pytest.mark.parametrize(
    ("word", "values"),
    [
        ("model=glob(trans*)", ["transformer", "transformer_conv"]),
        ("model=glob([mamba*,alibi],exclude=mamba2)", ["alibi", "mamba"]),
        ("seed=range(0,3)", [0, 1, 2]),
        ("seed=choice(4,2)", [4, 2]),
        ("seed=sort(4,2)", [2, 4]),
        ("seed=tag(few,choice(4,2))", [4, 2]),
        ("optim.lr=range(1e-3,4e-3,1e-3)", [0.001, 0.002, 0.003]),
    ],
)
def test_every_way_to_name_several_values_sweeps_over_these(word, values):
    found = swept(word, "size=tiny")
    names = word.partition("=")[0].split(".")
    names += ["name"] * (names == ["model"])
    assert [functools.reduce(getattr, names, arm) for arm in found] == values


@pytest.mark.usefixtures("in_empty_folder")
@pytest.mark.parametrize(
    "name",
    [
        name if name in ("aft", "mamba") else pytest.param(name, marks=pytest.mark.slow)
        for name in ARCHITECTURES
    ],
)
def test_what_a_models_yaml_leaves_out_a_sweep_completes_too(name, tmp_path, monkeypatch):
    configs = tmp_path / "configs"
    shutil.copytree(ROOT / "configs", configs)
    for module in (compose, groups):
        monkeypatch.setattr(module, "CONFIGS", configs)
    section = groups.inherited(name)
    if "mixer" not in section:
        pytest.skip("a pattern of other models")
    target = section["mixer"]["_target_"]
    (configs / "model/smallest.yaml").write_text(f"mixer:\n  _target_: {target}\n")
    words = ("size=tiny", "match=none")
    (arm,) = swept("model=smallest", *words)
    assert arm.model_dump() == train_config("model=smallest", *words).model_dump()
    assert arm.model.name == "smallest"
