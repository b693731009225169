"""A run that is killed and goes on is the unbroken run, bit for bit, wherever it is killed."""

import csv
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from building import write_text

from zoo.runs.checkpoints import SEAL_BYTES
from zoo.runs.folder import RunFolder

HYBRID = ["model=hybrid", "model.pattern=[mamba,transformer]"]
KINDS = {
    "carry": [*HYBRID, "state_passing=carry", "trainer.accumulate_grad_batches=2"],
    "masked": ["objective=masked", "trainer.accumulate_grad_batches=4"],
}


def drawn(seed: int) -> list[str]:
    """Options of a run, drawn at random from the ways to train one."""
    draw = random.Random(seed)
    words = [f"trainer.accumulate_grad_batches={draw.choice([1, 2, 4])}", f"seed={seed}"]
    words += [f"trainer.devices={draw.choice([1, 1, 2])}"]
    if words[0].endswith("4"):
        words[-1] = "trainer.devices=1"
    kind = draw.choice(["plain", "carry", "masked", "finetune"])
    if kind == "finetune":
        way = draw.choice(["pose", "randomised", "clex"])
        return [*words, "finetune=runs/base", f"extension={way}", "extension.factor=4"]
    model = draw.choice(["transformer", "mamba", "rwkv4", "gla", "hawk", "alibi"])
    models = HYBRID if draw.random() < 0.3 else [f"model={model}"]
    if kind == "masked":
        return [*words, "objective=masked", "model=transformer"]
    return [*words, *models, *(["state_passing=carry"] if kind == "carry" else [])]


def rows(folder: RunFolder) -> list[tuple[str, ...]]:
    """metrics.csv as it spells them: equal text, equal bits. Speeds differ."""
    with open(folder.path / "metrics.csv") as file:
        names = ("step", "tokens", "train_loss", "valid_loss", "grad_norm", "learning_rate")
        return [tuple(row[name] for name in names) for row in csv.DictReader(file)]


def weights(folder: RunFolder) -> dict[str, torch.Tensor]:
    file = folder.checkpoint()
    assert file is not None
    return torch.load(file, weights_only=True)["state_dict"]


def check(folder: Path, seed: int, kinds: dict[str, list[str]]) -> None:
    write_text(folder)
    command = [sys.executable, str(Path(__file__).with_name("kills.py")), str(seed)]
    done = subprocess.run([*command, json.dumps(kinds)], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kills = [int(n) for n in re.findall(r"(\d+) kills", done.stdout)]
    assert len(kills) == len(kinds)
    assert min(kills) >= 2, "killed too late to show anything"
    for kind in kinds:
        whole, killed = (RunFolder.open(folder / f"runs/{kind}-{x}") for x in ("whole", "killed"))
        assert whole.info["status"] == killed.info["status"] == "done"
        assert whole.info["tokens_seen"] == killed.info["tokens_seen"]
        assert rows(killed) == rows(whole), kind
        theirs = weights(killed)
        for name, weight in weights(whole).items():
            assert torch.equal(theirs[name], weight), (kind, name)
        files = [folder.checkpoint() for folder in (whole, killed)]
        content = [file.read_bytes()[:-SEAL_BYTES] for file in files if file is not None]
        assert content[0] == content[1], kind  # the seal has the run's id


def test_killed_and_resumed_is_bit_equal_to_unbroken(tmp_path):
    check(tmp_path, 1, {"carry": KINDS["carry"]})


@pytest.mark.slow  # 20 s
def test_an_encoder_killed_and_resumed_is_bit_equal_too(tmp_path):
    check(tmp_path, 1, {"masked": KINDS["masked"]})


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_any_way_to_train_survives_kills(seed, tmp_path):
    check(tmp_path, seed, {f"kind{i}": drawn(100 * seed + i) for i in range(8)})
