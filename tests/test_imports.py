"""Imports go one way, and the light modules stay light: the architecture, enforced."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*ROOT.glob("zoo/**/*.py"), ROOT / "train.py", ROOT / "eval.py"])

# A module may import from its own layer and from lower ones.
LAYERS = [
    {"errors", "paths", "devices", "measurement", "console", "locks"},
    {"config"},
    {"data", "report", "ops"},
    {"runs", "parallel"},
    {"positions", "attention", "pretrained"},
    {"mixers"},
    {"model"},
    {"training", "compression"},
    {"tasks"},
    {"api"},
    {"cli"},
    {"__main__"},
    {"train", "eval"},
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
COLUMNS = {"data", "report"}  # know nothing of the rest but the first layer
OPTIONAL = {
    "mamba_ssm",
    "causal_conv1d",
    "xformers",
    "fla",
    "datasets",
    "tokenizers",
    "transformers",
    "optuna",
    "safetensors",
    "gguf",
    "lm_eval",
}


def part(path: Path) -> str:
    """The folder or file of `zoo` a source belongs to; `train`/`eval` for the programs."""
    relative = path.relative_to(ROOT).parts
    return Path(relative[1] if relative[0] == "zoo" else relative[0]).stem


def imported(path: Path, top_level_only: bool = False) -> set[str]:
    """Dotted names a source imports, `from a import b` counted as a.b."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downwards(path):
    if path == ROOT / "zoo/__init__.py":
        return
    own = part(path)
    assert own in RANK, f"{path}: {own} has no place in LAYERS"
    used = {name.split(".")[1] for name in imported(path) if name.startswith("zoo.")}
    for name in used - {own}:
        assert RANK[name] <= RANK[own], f"{path.name} imports zoo.{name}, which is above it"
        if own in COLUMNS:
            assert RANK[name] == 0, f"{own} knows nothing of zoo.{name}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_optional_packages_are_never_needed_to_import(path):
    roots = {name.split(".")[0] for name in imported(path, top_level_only=True)}
    assert not roots & OPTIONAL


def test_kernels_is_not_a_package():
    assert not list((ROOT / "kernels").rglob("__init__.py"))


LIGHT = ["zoo.config.compose", "zoo.runs.folder", "zoo.errors", "zoo.data.corpora"]


@pytest.mark.parametrize("module", LIGHT)
def test_what_runs_before_the_check_is_light(module):
    heavy = "{'torch', 'lightning', 'wandb', 'pandas', 'altair'}"
    code = f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"


def test_report_draws_without_the_models():
    code = "import sys, zoo.report; print('torch' in sys.modules)"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "False"


def test_no_two_test_files_have_one_name():
    """pytest imports them by name alone, and a second one ends the run of a whole suite."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
