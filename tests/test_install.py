"""The pinned set installs on every platform that README names: resolved here, not installed."""

import importlib.metadata
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# As `make constraints` names them.
EXTRAS = re.findall(r"--extra|(?<=--extra )[\w-]+", (ROOT / "Makefile").read_text(encoding="utf-8"))
PLATFORMS = {
    "Linux x86-64": "x86_64-unknown-linux-gnu",
    "Linux aarch64": "aarch64-unknown-linux-gnu",
    "macOS 14 arm64": "aarch64-apple-darwin",
    "Windows x86-64": "x86_64-pc-windows-msvc",
}
PYTHONS = ["3.11", *(pytest.param(v, marks=pytest.mark.slow) for v in ("3.12", "3.13")), "3.14"]
# omegaconf's parser is published as source alone, and needs nothing else.
NO_WHEEL = "antlr4-python3-runtime"
OF_CUDA = re.compile(r"(nvidia-|cuda-|triton\b)")


@pytest.fixture(scope="session")
def uv() -> str:
    """The resolver's program, once a registry has answered it."""
    found = pytest.importorskip("uv").find_uv_bin()
    answer = run(found, "pip", "compile", "--refresh", "--no-deps", "-", stdin="setuptools")
    if answer.returncode:
        pytest.skip(
            f"no package registry answers: {answer.stderr.strip().splitlines()[-1].strip()}"
        )
    return found


def run(*words: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "UV_HTTP_TIMEOUT": "10",  # seconds that a registry which does not answer may cost
        "UV_HTTP_RETRIES": "1",
        "UV_NO_CONFIG": "1",
        "UV_PYTHON_DOWNLOADS": "never",
        "MACOSX_DEPLOYMENT_TARGET": "14.0",  # what PyTorch's wheels are built for
    }
    return subprocess.run(
        words, cwd=ROOT, env=environment, input=stdin, capture_output=True, text=True, timeout=240
    )


def compiled(uv: str, *words: str) -> str:
    done = run(uv, "pip", "compile", "--no-annotate", *EXTRAS, *words, "pyproject.toml")
    if "error sending request" in done.stderr:
        pytest.skip(f"the package registry stopped answering: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return done.stdout


def pins() -> dict[str, str]:
    """Package -> pinned version."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = [line.partition(" ")[0] for line in lines if not line.startswith("#")]
    return {pin.partition("==")[0]: pin.partition("==")[2] for pin in pinned}


def resolved(uv: str, platform: str, python: str, metadata: dict[str, list[str]], folder: Path):
    """Package -> version that the pins give; fails where they contradict each other."""
    known = [
        f'[[dependency-metadata]]\nname = "{name}"\nversion = "{pins()[name]}"\n'
        f"requires-dist = {needs!r}\n"
        for name, needs in {NO_WHEEL: [], **metadata}.items()
    ]
    config = folder / "uv.toml"
    config.write_text("".join(known), encoding="utf-8")
    only = ["--only-binary", ":all:", "--no-binary", NO_WHEEL, "--constraint", "constraints.txt"]
    target = ["--python-platform", platform, "--python-version", python]
    lines = compiled(uv, "--config-file", str(config), "--no-header", *only, *target).splitlines()
    return {line.partition("==")[0]: line.partition("==")[2] for line in lines}


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("platform", PLATFORMS)
def test_the_pins_resolve_with_wheels_alone(uv, tmp_path, platform, python):
    found = resolved(uv, PLATFORMS[platform], python, {}, tmp_path)
    assert found.items() <= pins().items()
    assert {"torch", "lightning", "pytest", "uv", "transformers", "datasets"} <= found.keys()
    assert ("nvidia-cublas" in found) == platform.startswith("Linux")  # PyPI's torch has CUDA there
    assert ("nvidia-cuda-nvrtc" in found) == platform.startswith("Linux")


@pytest.mark.parametrize("python", PYTHONS)
def test_the_pins_resolve_beside_the_cpu_build_of_pytorch(uv, tmp_path, python):
    """Whose wheel, from PyTorch's own index, requires the same less what is of CUDA."""
    needs = [need for need in importlib.metadata.requires("torch") or () if "extra ==" not in need]
    of_cpu = [need for need in needs if not OF_CUDA.match(need)]
    found = resolved(uv, PLATFORMS["Linux x86-64"], python, {"torch": of_cpu}, tmp_path)
    assert found.items() <= pins().items()
    assert [name for name in found if OF_CUDA.match(name)] == ["nvidia-cuda-nvrtc"]


def test_every_pin_is_needed_and_nothing_needed_is_unpinned(uv, tmp_path):
    copy = tmp_path / "constraints.txt"
    shutil.copy(ROOT / "constraints.txt", copy)
    words = ["--universal", "--python-version", "3.11", "--output-file", str(copy)]
    compiled(uv, "--custom-compile-command", "make constraints", *words)
    again, known = (path.read_text(encoding="utf-8") for path in (copy, ROOT / "constraints.txt"))
    assert again == known, "run make constraints"


def test_a_registry_that_does_not_answer_costs_seconds(monkeypatch):
    found = pytest.importorskip("uv").find_uv_bin()
    monkeypatch.setenv("UV_DEFAULT_INDEX", "http://127.0.0.1:9/simple")
    answer = run(found, "pip", "compile", "--refresh", "--no-deps", "-", stdin="setuptools")
    assert answer.returncode
    assert "error sending request" in answer.stderr


def test_no_variable_of_the_makefile_has_two_meanings():
    names = re.findall(r"^([A-Z_]+) *[:?]?=", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert len(names) > 10
    assert len(names) == len({*names})


def test_every_target_gives_each_option_one_value():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^([\w-]+):.*##", makefile, re.M)
    words = []
    for target in targets:
        command = ["make", "--dry-run", "--always-make", target, "MODEL=model", "BOOKS=books"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        words += done.stdout.split()
    assert len(words) > 100
    assert [word for word in words if re.match(r"[\w.]+=[\w.]+=", word)] == []
