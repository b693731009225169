"""What tests build: configurations as the programs check them, little texts, run folders."""

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from zoo.config.compose import compose
from zoo.config.resolve import reads_both_ways
from zoo.config.schema.train import TrainConfig
from zoo.runs.folder import RunFolder

ROOT = Path(__file__).parents[1]
ARCHITECTURES = sorted(path.stem for path in ROOT.glob("configs/model/*.yaml"))

# The extensions that act on one kind of model alone, and a model of that kind; others: rotary ones.
MODEL_OF = {"alibi_interpolation": "alibi", "cosine_scaling": "cosformer"}
ENCODERS = [name for name in ARCHITECTURES if reads_both_ways(name)]


def train_config(*words: str) -> TrainConfig:
    """The checked configuration of `python train.py` under these options."""
    config = compose("train", words)
    assert isinstance(config, TrainConfig)
    return config


def recipe(title: str) -> dict[str, str]:
    """The files of a recipe in CONTRIBUTING.md: {path: text}, as the reader would write them."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    labelled = r"\n\n`([^`\n]+)`[^\n]*\n(?:[^\n]+\n)*\n```\w+\n(.*?)\n```(?=\n)"
    return {path: f"{code}\n" for path, code in re.findall(labelled, section, re.DOTALL)}


def carry_out(title: str, here: Path, *parts: str) -> Path:
    """Write a recipe's files into a copy of the package at `here`, with `parts` of the project."""
    for part in ("zoo", "configs", "kernels", *parts):
        skip = shutil.ignore_patterns("__pycache__", "results")
        copy = shutil.copy if (ROOT / part).is_file() else partial(shutil.copytree, ignore=skip)
        copy(ROOT / part, here / part)
    for path, text in recipe(title).items():
        (here / path).parent.mkdir(parents=True, exist_ok=True)
        (here / path).write_text(text)
    return here


def found_in(here: Path, code: str) -> dict:
    """What `code` prints last, a JSON object, when it runs on the package at `here`.

    It has the tests' own modules, and the folder that it writes to as its argument.
    """
    paths = [here, ROOT / "tests/tasks", ROOT / "tests"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    words = [sys.executable, "-c", code, str(here / "runs")]
    done = subprocess.run(words, cwd=here, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]) | {"folder": here / "runs"}


def counting(start: int, sentences: int) -> str:
    """A little prose with something to learn: numbers in order and their squares modulo 97."""
    return " ".join(f"{i} and then {i * i % 97}," for i in range(start, start + sentences))


def write_text(folder: Path, sentences: int = 300) -> Path:
    """A corpus in the folder `folder`/text: three splits of counting prose, one file each."""
    for split, start in (("train", 0), ("valid", 5000), ("test", 7000)):
        (folder / "text" / split).mkdir(parents=True)
        (folder / "text" / split / "a.txt").write_text(counting(start, sentences))
    return folder / "text"


def train_on_text(folder: Path, *words: str) -> None:
    """Train a tiny model for a few steps on the corpus that `write_text` writes into `folder`."""
    from zoo.cli.train import main  # heavy: seconds

    data = ["data=text", f"data.path={write_text(folder)}", f"data.cache={folder / 'cache'}"]
    size = ["size=tiny", "match=none", "seq_len=32", "logger=none", "trainer.accelerator=cpu"]
    assert main([*data, *size, *words]) == 0


def write_byte_level(checkpoint: Path, *merges: tuple[str, str], begins: bool = False) -> None:
    """A byte-level tokenizer.json with `merges`, and the token <|end|> behind them, which is put
    before every text with `begins`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[*merges]))
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if begins:
        special = [("<|end|>", len(tokens))]
        template = processors.TemplateProcessing("<|end|> $A", "<|end|> $A $B", special)
        tokenizer.post_processor = template
    tokenizer.save(str(checkpoint / "tokenizer.json"))


@contextmanager
def warnings_as_errors() -> Iterator[None]:
    """Within, what Python or PyTorch warns of is an error, each time that it happens."""
    import torch

    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            yield
    finally:
        torch.set_warn_always(before)


def write_checkpoint(folder: RunFolder, name: str) -> Path:
    """A checkpoint file that is whole, though no model's."""
    path = folder.path / "checkpoints" / name
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", bytes(range(256)) * 64)
    return path


def files_below(path: Path) -> list[str]:
    """The files in a folder, relative to it."""
    return sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())


def write_harness_task(folder: Path) -> None:
    """A task of the harness in local files alone: which number follows."""
    rows = [
        {"text": f"{i} and then {i * i % 97}, {i + 1} and then", "choices": [" 5,", " 36,"]}
        for i in range(12)
    ]
    file = folder / "squares.jsonl"
    file.write_text(
        "".join(json.dumps(row | {"label": i % 2}) + "\n" for i, row in enumerate(rows))
    )
    (folder / "squares.yaml").write_text(f"""
task: squares
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_target: label
doc_to_choice: "{{{{choices}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
""")
