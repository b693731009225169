"""What tests share: tiny models of every architecture, built as the programs build them."""

import copy
import functools
import gc
import inspect
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from types import ModuleType

import pytest

if "--shape-checks" in sys.argv:
    os.environ["ZOO_SHAPE_CHECKS"] = "1"  # pytest-xdist's workers have other arguments
if "ZOO_SHAPE_CHECKS" in os.environ:  # before anything of zoo is imported
    from jaxtyping import install_import_hook

    shaped = ("ops", "positions", "attention", "mixers", "model")  # what computes with tensors
    install_import_hook([f"zoo.{folder}" for folder in shaped], "shape_checks.checked")

from building import ARCHITECTURES, train_config
from hypothesis import settings

from zoo.cli import guard
from zoo.errors import FORM, UserError
from zoo.runs.files import one_line

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests run in as many processes as cores
settings.register_profile("no wall clock", deadline=None)  # a loaded machine is no failure
settings.load_profile("no wall clock")


TEMPORARY = "ZOO_TEST_TEMPORARY"


def pytest_configure(config: pytest.Config) -> None:
    """What libraries and programs leave in the temporary folder goes with the session.

    Folders of tests stay where pytest keeps them.
    """
    if TEMPORARY not in os.environ:  # pytest-xdist's workers have the folder of their session
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())
        os.environ[TEMPORARY] = os.environ["TMPDIR"] = tempfile.mkdtemp(prefix="zoo-")
        place = os.environ[TEMPORARY]
        config.add_cleanup(lambda: shutil.rmtree(place, ignore_errors=True))
    tempfile.tempdir = os.environ[TEMPORARY]
    gc.disable()  # until all tests are imported, none of which is garbage


def pytest_collection_finish() -> None:
    gc.enable()
    gc.freeze()  # what was imported is not looked through again


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--model",
        action="append",
        default=[],
        choices=ARCHITECTURES,
        help="test this architecture alone, where tests go over all of them; may be repeated",
    )
    parser.addoption(
        "--shape-checks",
        action="store_true",
        help="check shapes and types of annotated arguments at run time",
    )


@pytest.fixture(autouse=True)
def annotations_apply(request):
    """Switch the shape checks off where a test is marked `mistyped`: the code's own are tested."""
    if not request.node.get_closest_marker("mistyped") or "ZOO_SHAPE_CHECKS" not in os.environ:
        yield
        return
    from jaxtyping import config

    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True)
def refusals_have_their_form(monkeypatch):
    """Every refusal that any test brings a program to print is `<option>=<value>: <rule>. <..>`."""
    wrong = []

    def seen(error: BaseException) -> str:
        of_the_system = isinstance(error.__cause__, OSError)  # "<file>: No space left on device"
        by_a_user = isinstance(error, UserError) and not of_the_system
        if by_a_user and not FORM.fullmatch(one_line(error)):
            wrong.append(one_line(error))
        return one_line(error)

    monkeypatch.setattr(guard, "one_line", seen)
    yield
    assert wrong == []


SMALL_FILE = 20  # tests


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With --model: of the tests of every architecture, those of the given ones.

    Beside other workers (`-n 2 --dist loadfile --no-loadscope-reorder`): first the files of few
    tests, of which many are whole programs, then the others, those of most tests first. What is
    left to the end is short, so that no worker waits for the other one for long.
    """
    if chosen := set(config.getoption("--model") or []):
        items[:] = [item for item in items if chosen & _architectures(item)]
    if hasattr(config, "workerinput"):
        count = Counter(item.path for item in items)
        items.sort(key=lambda item: (count[item.path] > SMALL_FILE, -count[item.path], item.path))


def _architectures(item: pytest.Item) -> set[str]:
    values = getattr(item, "callspec", None)
    found = values.params if values else {}
    return {name for key, name in found.items() if key in ("architecture", "encoder")}


@pytest.fixture
def tiny() -> Callable:
    """tiny(name, *options) -> the architecture at size tiny, vocabulary 32, in float64."""
    import torch

    def build(name: str, *options: str, dtype=torch.float64):
        original = built(name, *options)
        model = copy.deepcopy(original).to(dtype)
        for mine, its in zip(model.parameters(), original.parameters(), strict=True):
            vars(mine).update(vars(its))  # a copy of a parameter leaves its marks behind
        torch.manual_seed(0)  # for what the test draws
        return model

    return build


@functools.cache
def built(name: str, *options: str):
    """A model no test may touch: composing, checking and matching take longer than most tests."""
    import torch

    from zoo.model.build import build_model

    torch.manual_seed(0)
    config = train_config(f"model={name}", "size=tiny", "seq_len=256", *options)
    return build_model(config, vocab_size=32)[0]


@pytest.fixture
def in_pytorch(monkeypatch) -> Callable[[str], ModuleType]:
    """in_pytorch(path) -> a module of transformers whose functions are its own, in PyTorch.

    Where fla, mamba_ssm or causal_conv1d can be imported, transformers calls their GPU kernels in
    its functions' place, on a CPU too. Skips where transformers is not installed.
    """

    def imported(path: str) -> ModuleType:
        module = pytest.importorskip(path)
        for name, function in inspect.getmembers(module, inspect.isfunction):
            monkeypatch.setattr(module, name, inspect.unwrap(function))
        return module

    return imported


@pytest.fixture(params=ARCHITECTURES)
def architecture(request) -> str:
    """Every architecture in turn, by name."""
    return request.param
