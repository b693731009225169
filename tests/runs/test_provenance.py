"""What a run is includes the code it was made of: which edits change it, and what then happens."""

import functools
import re
import shutil
from pathlib import Path

import pytest
from building import ARCHITECTURES, train_config

from zoo.paths import PACKAGE, ROOT
from zoo.runs import provenance
from zoo.runs.claim import trained_by
from zoo.runs.provenance import changed, digest, measured_by, sources


@pytest.fixture(scope="module")
def copied(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("copy")
    for name in ("zoo", "kernels"):
        shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
    return place / "zoo"


@pytest.fixture
def package(copied):
    """A copy of the package and its kernels, to be edited; what was edited is put back."""
    yield copied
    for file, text in EDITED.items():
        file.write_text(text)
    EDITED.clear()


EDITED: dict[Path, str] = {}


def files_of(model: str, package: Path = PACKAGE, *words: str) -> dict[str, str]:
    return sources(config_of(model, *words), package=package)


@functools.cache
def config_of(model: str, *words: str):
    return train_config(f"model={model}", *words)


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    EDITED.setdefault(file, text)
    assert old in text
    file.write_text(text.replace(old, new, 1))


EDITS = [  # file, what is edited, the models that it makes others
    ("zoo/mixers/mamba.py", ("def forward", "MORE = 1\n\n    def forward"), {"mamba"}),
    ("zoo/mixers/hawk.py", ("def forward", "MORE = 1\n\n    def forward"), set()),
    ("zoo/mixers/softmax.py", ("def forward", "MORE = 1\n\n    def forward"), {"transformer"}),
    ("zoo/ops/wkv4.py", ("LOG_ZERO = ", "MORE = 1\nLOG_ZERO = "), {"rwkv4"}),
    ("zoo/mixers/base.py", ("class Mixer", "MORE = 1\nclass Mixer"), {"*"}),
    ("zoo/model/backbone.py", ("class Backbone", "MORE = 1\nclass Backbone"), {"*"}),
    ("zoo/training/learner.py", ("class Learner", "MORE = 1\nclass Learner"), {"*"}),
    ("zoo/training/windows.py", ("class Windows", "MORE = 1\nclass Windows"), {"*"}),
    ("zoo/config/schedule.py", ("def learning", "MORE = 1\ndef learning"), {"*"}),
    ("zoo/training/callbacks.py", ("class Metrics", "MORE = 1\nclass Metrics"), set()),
    ("zoo/data/order.py", ("def ", "MORE = 1\ndef "), {"*"}),
    ("zoo/data/masking.py", ("def ", "MORE = 1\ndef "), {"*"}),
    ("zoo/report/statistics.py", ("def missing", "MORE = 1\ndef missing"), set()),
    ("zoo/cli/launch.py", ("def launch", "MORE = 1\ndef launch"), set()),
    ("zoo/tasks/context.py", ("def nats", "MORE = 1\ndef nats"), set()),
    ("zoo/attention/dual_chunk.py", ("class ", "MORE = 1\nclass "), set()),
    ("kernels/wkv4/wkv4.c", ("#include", "#define MORE 1\n#include"), {"rwkv4"}),
    ("kernels/selective_scan/selective_scan.cu", ("#include", "#define M\n#include"), {"mamba"}),
    ("kernels/common.h", ("#define", "#define MORE 1\n#define"), {"*"}),
]
MODELS = ("transformer", "mamba", "rwkv4")


@pytest.mark.parametrize(("file", "words", "touched"), EDITS, ids=[edit[0] for edit in EDITS])
def test_an_edit_makes_other_runs_of_those_models_that_read_it(package, file, words, touched):
    before = {model: files_of(model, package) for model in MODELS}
    edit(package.parent / file, *words)
    for model in MODELS:
        differ = changed(before[model], files_of(model, package))
        assert differ == ([file] if model in touched or "*" in touched else []), model


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("zoo/mixers/mamba.py", '"""', '"""More words. '),
        ("zoo/mixers/mamba.py", "class ", "# a comment\nclass "),
        ("zoo/mixers/mamba.py", "    def forward(", "\n\n    def forward("),
        ("zoo/training/fit.py", '"""', '"""More words. '),
        ("zoo/ops/selective_scan.py", "import torch\n", "import torch\n\n'words on their own'\n"),
        ("kernels/selective_scan/selective_scan.c", "#include", "/* words */ // more\n#include"),
    ],
)
def test_words_do_not_make_another_run(package, file, old, new):
    before = files_of("mamba", package)
    path = package.parent / file
    edit(path, old, new)
    assert files_of("mamba", package) == before


def test_the_words_of_an_error_do_not_but_its_class_does(package):
    file = package / "mixers" / "base.py"
    EDITED[file] = file.read_text()
    with file.open("a") as end:
        end.write('\n\ndef stop(x):\n    raise ValueError(f"{x} is bad")\n')
    before = digest(files_of("mamba", package))
    edit(file, "is bad", "is worse")
    assert digest(files_of("mamba", package)) == before
    edit(file, "raise ValueError(f", "raise TypeError(f")
    assert digest(files_of("mamba", package)) != before


def test_every_architecture_names_its_own_mixer_and_what_that_imports():
    for name in ARCHITECTURES:
        text = (ROOT / f"configs/model/{name}.yaml").read_text()
        modules = re.findall(r"_target_: zoo\.(mixers\.\w+)\.", text)
        files = provenance._closure(PACKAGE, ROOT / "kernels", [*provenance.TRAINING, *modules])
        own = {f"zoo/{module.replace('.', '/')}.py" for module in modules}
        always = {"zoo/training/fit.py", "zoo/model/backbone.py", "zoo/mixers/base.py"}
        assert own | always <= set(files)
        read = [ROOT / file for file in files if file.startswith("zoo/mixers/")]
        imported = "".join(path.read_text() for path in [*read, ROOT / "zoo/model/backbone.py"])
        for file in {file for file in files if file.startswith("zoo/mixers/")} - own:
            module = file.removesuffix(".py").replace("/", ".")
            assert module in imported, (name, file)  # by one of them, not by who builds them all
        assert not [file for file in files if re.search("report|zoo/cli|zoo/runs", file)]


def test_an_extension_belongs_to_a_run_trained_under_it():
    plain = files_of("transformer")
    posed = files_of("transformer", PACKAGE, "extension=randomised", "extension.factor=4")
    assert "zoo/positions/randomised.py" in posed
    assert "zoo/positions/randomised.py" not in plain


def test_what_measures_is_another_name_than_what_trains(package, monkeypatch):
    config = train_config("model=mamba", "size=tiny")
    task = "perplexity"
    monkeypatch.setattr(provenance, "PACKAGE", package)
    monkeypatch.setattr(provenance, "_closure", relocated(provenance._closure, package))
    before = [measured_by(config, task, extended) for extended in (False, True)]
    assert before[1].startswith(f"{before[0]}-")
    edit(package / "training/learner.py", "class Learner", "MORE = 1\nclass Learner")
    assert [measured_by(config, task, extended) for extended in (False, True)] == before
    edit(package / "positions/clex.py", "class ", "MORE = 1\nclass ")
    plain, extended = (measured_by(config, task, extended) for extended in (False, True))
    assert (plain, extended != before[1]) == (before[0], True)
    edit(package / "tasks/context.py", "def nats", "MORE = 1\ndef nats")
    assert measured_by(config, task, False) != before[0]


def relocated(closure, package: Path):
    return lambda _, __, roots: closure(package, package.parent / "kernels", roots)


def test_one_name_covers_every_code_that_made_a_runs_weights():
    assert trained_by({}) is None  # older than the record
    assert trained_by({"sources": "a"}) == "a"
    assert trained_by({"sources": "a", "base": {"sources": "a"}}) == "a"
    assert trained_by({"sources": "b", "earlier_sources": [{"sources": "a"}]}) == "a+b"
    assert trained_by({"sources": "b", "base": {"sources": None}}) == "unknown+b"
