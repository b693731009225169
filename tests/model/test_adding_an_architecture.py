"""CONTRIBUTING.md's architecture: a mixer and a YAML of two lines; everything else finds it."""

import json
import os
import subprocess
import sys

import pytest
import torch
from building import carry_out, recipe, train_config

import zoo.mixers
from zoo.config import compose, groups, introspect
from zoo.config.groups import completed
from zoo.model.build import TOLERANCE, build_model, count_parameters

TITLE = "Add an architecture"
RECIPE = recipe(TITLE)
NAME = "leaky_average"


def test_the_smallest_yaml_is_two_lines_and_its_model_is_matched(tmp_path, monkeypatch):
    assert [len(text.splitlines()) for path, text in RECIPE.items() if "yaml" in path] == [2]
    carry_out(TITLE, tmp_path)
    mixers = [*zoo.mixers.__path__, str(tmp_path / "zoo/mixers")]
    monkeypatch.setattr(zoo.mixers, "__path__", mixers)
    monkeypatch.setattr(introspect, "ROOT", tmp_path)
    for module in (compose, groups):
        monkeypatch.setattr(module, "CONFIGS", tmp_path / "configs")
    try:
        config = train_config(f"model={NAME}", "size=tiny", "seq_len=256")
        assert (config.model.name, config.model.match) == (NAME, ["feed_forward.hidden_width"])
        with torch.device("meta"):
            mine = count_parameters(build_model(config, vocab_size=32)[0])
            reference = train_config("size=tiny", "seq_len=256")
            goal = count_parameters(build_model(reference, vocab_size=32)[0])
        assert abs(mine - goal) <= TOLERANCE * goal
    finally:
        sys.modules.pop("zoo.mixers.leaky_average", None)


def test_without_a_feed_forward_its_layers_are_matched():
    part = {"mixer": {"_target_": "zoo.mixers.mamba.Mamba"}, "feed_forward": None}
    assert completed(NAME, part)["match"] == ["layers"]
    assert completed(NAME, {**part, "match": ["mixer.inner_width"]})["match"] == [
        "mixer.inner_width"
    ]


@pytest.mark.slow
def test_it_is_trained_measured_reported_and_kept_to_the_contract(tmp_path):
    folder = carry_out(TITLE, tmp_path, "tests", "train.py", "eval.py", "pyproject.toml")
    (folder / "texts").mkdir()
    for name in ("one", "two", "three"):
        (folder / f"texts/{name}.txt").write_text(f"a leaky average of all, {name}. " * 2000)

    def python(*words: str) -> str:
        call = [sys.executable, *words]
        env = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(call, cwd=folder, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run = ("size=tiny", "seq_len=64", "batch_tokens=256", "trainer.max_steps=2", "logger=none")
    data = ("data=text", "data.path=texts", "valid_every=2", "valid_windows=2")
    python("train.py", f"model={NAME}", "name=first", *run, *data)
    length = "task.perplexity.lengths=[64]"
    python("eval.py", "run=runs/first", "task=perplexity", length, "report=report.html")
    lines = (folder / "runs/first/results.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert rows
    assert all(row["status"] == "ok" for row in rows)
    assert {row["model"] for row in rows} == {NAME}
    assert NAME in (folder / "report.html").read_text()
    output = python("-m", "pytest", "tests/test_contract.py", f"--model={NAME}", "-p", "no:xdist")
    assert "failed" not in output
    assert int(output.split(" passed")[0].split()[-1]) > 30
