"""Every experiment trains; its header says what it measures, after whom, how, at what cost."""

import itertools
import re
from pathlib import Path

import pytest
import yaml
from building import ARCHITECTURES, write_text

from zoo.cli.arms import composed_arms
from zoo.cli.train import check

EXPERIMENTS = sorted((Path(__file__).parents[2] / "configs/experiment").glob("*.yaml"))


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_its_header_has_the_claim_its_source_the_command_the_cost_and_what_to_expect(path):
    header = [line for line in path.read_text().splitlines() if line.startswith("# ")]
    assert re.fullmatch(r"# [A-Z].*\.", header[1]), "a sentence says what it does"
    parts = re.findall(r"^# ([A-Z]\w+)  +\S", "\n".join(header[2:]), re.MULTILINE)
    assert parts[:4] == ["Claim", "Command", "Cost", "Expected"]
    text = " ".join(line.removeprefix("#").strip() for line in header)
    assert re.search(r"\b(19|20)\d\d\b|survey|configs/claims", text.partition("Command ")[0])


@pytest.mark.slow  # 40 s: short_conv alone has 288 runs
@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_it_composes_into_arms_in_a_folder_of_its_own(path):
    arms = composed_arms("train", [f"experiment={path.stem}"], check)
    assert arms
    assert {config.runs for _, config in arms} == {f"runs/{path.stem}"}


def swept(path: Path) -> dict[str, list[str]]:
    """What an experiment sweeps: option -> its values."""
    tree = yaml.safe_load(path.read_text())
    params = tree.get("hydra", {}).get("sweeper", {}).get("params", {})
    return {option: re.findall(r"[^,\s]+", str(values)) for option, values in params.items()}


def train_two_steps(path: Path, folder: Path, *words: str) -> None:
    """Train the one arm that `words` leave of an experiment; a text is a small one."""
    from zoo.cli.train import job  # heavy: seconds
    from zoo.runs.metrics import read_metrics

    data, text = [], folder / "text"
    if not re.search(r"override /data: (?!stdlib)", path.read_text()):
        place = text if text.exists() else write_text(folder)
        data = ["data=text", f"data.path={place}", f"data.cache={folder / 'cache'}"]
    few = ["trainer.max_steps=2", "valid_every=1", "valid_windows=2", "optim.warmup_steps=1"]
    here = [f"runs={folder / 'runs'}", "logger=none", "threads=1", "trainer.accelerator=cpu"]
    options = [f"experiment={path.stem}", *words, *data, *few, *here]
    ((_, config),) = composed_arms("train", options, check)
    assert job(config, None) == 0
    (run,) = (folder / "runs").iterdir()
    rows = [row for row in read_metrics(run / "metrics.csv") if row["valid_loss"]]
    first, second = (float(row["valid_loss"]) for row in rows)
    assert first != second, "a step changes the model"
    run.rename(folder / run.name)  # the next has the folder for itself


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_its_first_arm_trains_two_steps(path, tmp_path):
    words = [f"{option}={values[0]}" for option, values in swept(path).items()]
    small = ["size.width=96", "size.layers=1", "batch_size=1", "seq_len=64"]
    train_two_steps(path, tmp_path, *words, *small)


@pytest.mark.slow  # 8 min: every arm of every experiment, as large as it is
@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_each_of_its_arms_trains_two_steps(path, tmp_path):
    options = {k: v[:1] if k in ("optim.lr", "seed") else v for k, v in swept(path).items()}
    for values in itertools.product(*options.values()):
        words = [f"{k}={v}" for k, v in zip(options, values, strict=True)]
        train_two_steps(path, tmp_path, *words)


def test_the_states_that_mqar_state_compares_agree_within_a_tenth():
    from zoo.model.build import build_model  # heavy: seconds

    makefile = (Path(__file__).parents[2] / "Makefile").read_text()
    lines = makefile.partition("define STATE_ARMS\n")[2].partition("endef")[0].splitlines()
    common = ["experiment=mqar_state", "optim.lr=1e-3", "seed=0"]
    states = {}
    for line in lines:
        ((_, config),) = composed_arms("train", [*common, *line.split()], check)
        states[line] = build_model(config, vocab_size=64)[0].state_bytes(8 * config.seq_len)
    attention = states.pop("model=transformer_conv")
    assert len(states) == 7
    assert max(states.values()) < 1.12 * min(states.values())
    assert all(abs(b / states["model=deltanet"] - 1) < 0.1 for b in states.values())
    assert attention > 2 * max(states.values())


@pytest.mark.parametrize("name", ["zoo", "extrapolation"])
def test_what_compares_every_architecture_has_every_architecture(name):
    path = next(path for path in EXPERIMENTS if path.stem == name)
    assert sorted(swept(path)["model"]) == ARCHITECTURES
