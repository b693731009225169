"""README's recipe for a new architecture, carried out as it is written there."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COPIED = (
    "configs",
    "kernels",
    "tests",
    "zoo",
    "README.md",
    "eval.py",
    "pyproject.toml",
    "train.py",
)


def recipe() -> dict[str, str]:
    """file -> what README says it holds, or is added to it."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.partition("### Add one in ten lines")[2].partition("\n## ")[0]
    return dict(re.findall(r"`([^`]+)`:\n\n```\w+\n(.*?)```", section, re.DOTALL))


@pytest.fixture(scope="module")
def followed(tmp_path_factory) -> Path:
    """A copy of the project in which the recipe was followed to the letter."""
    copy = tmp_path_factory.mktemp("recipe")
    for name in COPIED:
        place = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        place(ROOT / name, copy / name)
    for name, text in recipe().items():
        with open(copy / name, "a", encoding="utf-8") as file:
            file.write(text)
    readme = copy / "README.md"
    line = "| `mean` | what it is | source | O(1) | O(t) |"
    readme.write_text(readme.read_text().replace("| `mamba` |", f"{line}\n| `mamba` |"))
    experiment = copy / "configs/experiment/zoo.yaml"
    experiment.write_text(re.sub(r"(\bmamba,)", r"mean,\1", experiment.read_text(), count=1))
    return copy


def run(folder: Path, *words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


def test_the_recipe_writes_two_files_and_adds_to_one():
    new, *_ = (name for name in recipe() if not (ROOT / name).exists())
    assert new == "zoo/mixers/mean.py"
    assert [*recipe()][1:] == ["configs/model/mean.yaml", "tests/mixers/initialisations.py"]


def test_the_recipes_architecture_is_composed_and_sized_as_written(followed):
    code = (
        "import sys; sys.path.insert(0, '.'); import torch, zoo; "
        "from zoo.config.compose import compose; from zoo.model.build import build_model; "
        "assert zoo.__file__.startswith(sys.argv[1]);"
        "model, _ = build_model(compose('train', ['model=mean', 'size=tiny']), 256);"
        "print(model(torch.zeros(2, 9, dtype=torch.int64)).shape)"
    )
    done = run(followed, "-c", code, str(followed))
    assert done.stdout.strip() == "torch.Size([2, 9, 256])", done.stderr


@pytest.mark.slow
def test_the_recipes_architecture_passes_every_test_that_finds_it(followed):
    words = ["-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider"]
    words += ["-k", "(mean and not window_mean) or test_table"]
    files = [
        "test_contract.py",
        "test_table.py",
        "test_config.py",
        "mixers/test_initialisations.py",
    ]
    done = run(followed, *words, *(f"tests/{name}" for name in files))
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 20  # type: ignore[index]


@pytest.mark.slow
def test_the_recipes_architecture_trains(followed):
    words = ("model=mean", "size=tiny", "trainer.max_steps=2", "logger=none", "seq_len=64")
    done = run(followed, "train.py", *words, "batch_tokens=256")
    assert done.returncode == 0, done.stderr[-3000:]
