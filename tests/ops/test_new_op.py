"""CONTRIBUTING.md's op with a kernel costs three places, and the tests of all ops find it."""

import os
import subprocess
import sys

import pytest
from building import carry_out, recipe

TITLE = "Add an op with kernels"
RECIPE = recipe(TITLE)


def test_the_recipe_has_a_kernel_its_op_and_its_tests():
    assert [path.split("/")[0] for path in RECIPE] == ["kernels", "zoo", "tests"]


@pytest.mark.slow
def test_it_passes_its_own_tests_and_those_of_every_op(tmp_path):
    carry_out(TITLE, tmp_path, "tests", "pyproject.toml")
    files = [*(path for path in RECIPE if path.startswith("tests/"))]
    files += ["tests/ops/test_fuzz.py", "tests/ops/test_native.py"]
    words = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", "squared_relu", *files]
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert int(done.stdout.split(" passed")[0].split()[-1]) > 5
