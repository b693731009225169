"""What is installed from a wheel works away from the checkout: sources, YAML files, programs."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHIPPED = (
    *("zoo", "configs", "kernels"),
    *("pyproject.toml", "README.md", "LICENSE"),
)
BUILD = "import setuptools.build_meta as b; print(b.build_wheel('.'))"


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The wheel of this checkout, unpacked."""
    pytest.importorskip("setuptools", minversion="77")
    copy, site = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("site")
    for name in SHIPPED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy)
    built = run(copy, "-c", BUILD)
    zipfile.ZipFile(copy / built.splitlines()[-1]).extractall(site)
    return site


def run(folder: Path, *words: str, **environment: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | environment
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def contents(folder: Path, *patterns: str) -> set[str]:
    return {str(p.relative_to(folder)) for pattern in patterns for p in folder.rglob(pattern)}


def test_a_wheel_carries_every_module_source_and_choice(installed):
    package = installed / "zoo"
    assert contents(package / "_kernels", "*") >= contents(
        ROOT / "kernels", "*.h", "*.cuh", "*.c", "*.cu"
    ) - {"emulator/emulator.h"}
    assert contents(package / "_configs", "*.yaml") == contents(ROOT / "configs", "*.yaml")
    assert contents(package, "*.py", "*.j2") == contents(ROOT / "zoo", "*.py", "*.j2")
    assert contents(package / "report", "*.json") == contents(ROOT / "zoo/report", "*.json")


def test_the_programs_run_away_from_the_checkout(installed, tmp_path):
    words = ["-m", "zoo", "train", "model=mamba", "size=tiny", "--cfg", "job"]
    assert "state_size: 16" in run(tmp_path, *words, PYTHONPATH=str(installed))
    output = run(tmp_path, "-m", "zoo", "doctor", PYTHONPATH=str(installed))
    assert "selective_scan" in output
    where = "from zoo.ops.runtime.build import kernels_folder as f; print(f())"
    found = run(tmp_path, "-c", where, PYTHONPATH=str(installed))
    assert Path(found.strip()) == (installed / "zoo/_kernels").resolve()
