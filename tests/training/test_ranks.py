"""Several processes and micro-batches train what one does: the same weights, whoever reads what.

`pytest -m slow` walks every architecture and every way to train one.
"""

import csv
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from building import ARCHITECTURES, ENCODERS, ROOT, write_text
from grid import SHARED, TAUGHT, Layout, goes_on, layouts_of, run_name

from zoo.config.groups import extensions
from zoo.model.checkpoint import read_file
from zoo.runs.folder import RunFolder

Layouts = list[
    Layout
]  # processes, micro-batches, processes to a window, strategy; first the plain run
ALONE: Layout = (1, 1, 1, "auto")
PARTS = 8  # of the longest walk, each of some minutes
# How far apart rounding may leave figures (relative) and weights, which move by 1e-2 a step. A step
# amplifies it: initial weights of GLA that differ in their last bit have gradient norms 3e-4 apart
# at the fourth step, in one process too. So every architecture is walked in float64.
LIMITS = {"float32": (2e-5, 5e-6), "float64": (1e-12, 1e-12)}
KINDS = {
    "carry": ["model=hybrid", "model.pattern=[mamba,transformer]", "state_passing=carry"],
    "masked": ["objective=masked", "checkpoint_activations=true"],
    # by how far each row reaches:
    "late": ["model=star", "state_passing=carry", "seq_len=128"],  # parameters unused at first
    "placed": ["finetune=runs/base", "extension=pose", "extension.scaling=dynamic_ntk"],
}
KINDS["placed"].append("extension.factor=4")
KINDS["labels"] = ["data=mqar", "model=relu", "seq_len=64"]  # whose layers add to the loss
KINDS["taught"] = ["model=mamba", *TAUGHT]
KINDS["labels"] += ["model.mixer.normalise=root", "model.mixer.norm_loss=0.1"]


def every_kind() -> Iterator[tuple[str, list[str]]]:
    """Every architecture under each objective and state passing; every way to place tokens
    and every task."""
    for model in ARCHITECTURES:
        for state in ("none", "carry") if model != "learned" else ("none",):  # it has an end
            words = [f"model={model}", f"state_passing={state}", "seq_len=128"]
            words += ["size.layers=3"] * (model == "hybrid")  # its pattern
            yield f"{model}-{state}", words
    for model in ENCODERS:
        yield f"{model}-masked", [f"model={model}", "objective=masked", "seq_len=128"]
    for extension, tree in extensions().items():
        if tree.get("positions"):
            words = ["finetune=runs/base", f"extension={extension}", "extension.factor=4"]
            yield extension, words
            if extension != "clex":
                yield f"{extension}-scaled", [*words, "extension.scaling=dynamic_yarn"]
    for path in sorted((ROOT / "configs/data").glob("*.yaml")):
        if "\ntask:" in path.read_text():
            yield path.stem, [f"data={path.stem}", "seq_len=64"]
    yield "passkeys", ["data.passkey=0.5", "seq_len=128"]


def figures(folder: RunFolder) -> dict[str, list[float]]:
    with open(folder.path / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    names = ("step", "tokens", "train_loss", "valid_loss", "grad_norm", "learning_rate")
    return {name: [float(row[name]) for row in rows if row[name]] for name in names}


def weights(folder: RunFolder) -> dict[str, torch.Tensor]:
    file = folder.checkpoint()
    assert file is not None
    return read_file(file)["state_dict"]


def differences(folder: RunFolder, plain: RunFolder, dtype: str) -> list[str]:
    """In what a run is not the plain one, beyond the rounding of its weights' type."""
    found = []
    relative, absolute = LIMITS[dtype]
    for name, values in figures(plain).items():
        if figures(folder)[name] != pytest.approx(values, rel=relative):
            found.append(f"{folder.name} {name}: {figures(folder)[name]}, not {values}")
    theirs = weights(folder)
    for name, weight in weights(plain).items():
        assert theirs[name].dtype == weight.dtype == getattr(torch, dtype), name
        apart = float((theirs[name] - weight).abs().max())
        if not apart < absolute:
            found.append(f"{folder.name} {name}: {apart:.1e} apart")
    return found


def check(
    folder: Path, kinds: dict[str, list[str]], layouts: Layouts, dtype: str = "float32"
) -> None:
    write_text(folder)
    command = [sys.executable, str(Path(__file__).with_name("grid.py"))]
    done = subprocess.run(
        [*command, json.dumps([kinds, layouts, dtype])], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    for run in re.split(r"\[1/1\] (?=size=|resume=)", done.stderr):
        assert "find_unused" not in run or "-carry" in run or "late-" in run, run
    found = []
    for kind, words in kinds.items():
        names = [run_name(kind, layout) for layout in layouts_of(words, layouts)]
        plain, *others = (RunFolder.open(folder / "runs" / one) for one in names)
        halves = [RunFolder.open(path) for path in (folder / "runs").glob(f"{kind}-half-*")]
        assert len(halves) == goes_on(words) * len(names), kind
        for other in [*others, *halves]:
            assert other.info["status"] == plain.info["status"] == "done"
            assert other.info["tokens_seen"] == plain.info["tokens_seen"]
            found += differences(other, plain, dtype)
    assert not found, "\n".join(found)


def test_processes_and_micro_batches_train_what_one_does(tmp_path):
    few = {name: KINDS[name] for name in ("carry", "placed", "taught")}  # 10 s each; below, all
    check(tmp_path, few, [ALONE, (2, 2, 2, "fsdp"), (2, 2, 1, "sharded")])


@pytest.mark.slow
def test_any_number_of_either_trains_what_one_does(tmp_path):
    whole = [(2, 2, 1), (4, 1, 1), (1, 4, 1), (2, 1, 1), (1, 2, 1)]
    layouts = [(*one, "ddp") for one in [*whole, (4, 1, 2), (4, 2, 4), (2, 1, 2), (3, 1, 3)]]
    sharded = [(*one, "fsdp") for one in [(1, 2, 1), (4, 1, 1), (4, 1, 2), (2, 2, 2), (2, 1, 1)]]
    check(tmp_path, KINDS, [ALONE, *layouts, (4, 1, 1, "sharded"), *sharded])


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_every_architecture_trains_the_same_in_any_number_of_processes(part, tmp_path):
    several = [(2, 2, 1, "ddp"), (2, 2, 2, "ddp"), (2, 2, 1, "fsdp"), (2, 2, 2, "fsdp")]
    kinds = [*every_kind()]
    first, end = (len(kinds) * at // PARTS for at in (part, part + 1))
    check(tmp_path, dict(kinds[first:end]), [ALONE, *several], "float64")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_to_four_processes_learn_from_data_and_from_a_teacher_what_one_does(strategy, tmp_path):
    """And half a run of four goes on in any number."""
    kinds = {"plain": ["model=relu"], "taught": ["model=mamba", *TAUGHT]}
    kinds = {name: [*words, SHARED] for name, words in kinds.items()}
    check(tmp_path, kinds, [ALONE, *((n, 1, 1, strategy) for n in (2, 3, 4))], "float64")
