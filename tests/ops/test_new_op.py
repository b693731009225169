"""CONTRIBUTING.md's op with a kernel costs three places, and the tests of all ops find it."""

import os
import shutil
import subprocess
import sys

import pytest
from building import ROOT, recipe

RECIPE = recipe("Add an op with kernels")


def test_the_recipe_has_a_kernel_its_op_and_its_tests():
    assert [path.split("/")[0] for path in RECIPE] == ["kernels", "zoo", "tests"]


@pytest.mark.slow
def test_it_passes_its_own_tests_and_those_of_every_op(tmp_path):
    for folder in ("zoo", "configs", "kernels", "tests"):
        skip = shutil.ignore_patterns("__pycache__", "results")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=skip)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for path, text in RECIPE.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    files = [*(path for path in RECIPE if path.startswith("tests/"))]
    files += ["tests/ops/test_fuzz.py", "tests/ops/test_native.py"]
    words = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", "squared_relu", *files]
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert int(done.stdout.split(" passed")[0].split()[-1]) > 5
