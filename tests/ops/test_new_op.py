"""CONTRIBUTING.md's ops with kernels cost three places, and the tests of all ops find them."""

import os
import subprocess
import sys

import pytest
from building import carry_out, recipe

TITLES = {"squared_relu": "Add an op with kernels", "leaky_sum": "Add an op with a state"}


@pytest.mark.parametrize("op", TITLES)
def test_the_recipe_has_a_kernel_its_op_and_its_tests(op):
    paths = [f"kernels/{op}/{op}.c", f"zoo/ops/{op}.py", f"tests/ops/test_{op}.py"]
    assert [*recipe(TITLES[op])] == paths


@pytest.mark.slow
@pytest.mark.parametrize("op", TITLES)
def test_it_passes_its_own_tests_and_those_of_every_op(op, tmp_path):
    carry_out(TITLES[op], tmp_path, "tests", "pyproject.toml")
    files = [path for path in recipe(TITLES[op]) if path.startswith("tests/")]
    files += ["tests/ops/test_fuzz.py", "tests/ops/test_native.py"]
    words = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", op, *files]
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert int(done.stdout.split(" passed")[0].split()[-1]) > 5
