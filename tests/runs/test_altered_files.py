"""Whatever is altered in a run's folder or its token cache: one line, or a fall-back that is said.

A generator alters one file at random and then resumes, measures or fine-tunes the run, in this
process, with everything but the training steps themselves. Either the program stops with one line,
or what it works with is what an unaltered run has: its options, its weights at a step it saved, and
the scores of these.
"""

import contextlib
import copy
import functools
import json
import logging
import random
import shutil
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from building import write_text

from zoo.cli import eval as eval_program
from zoo.cli import train as train_program
from zoo.config.compose import compose_tree, composing, parse
from zoo.errors import RunError, UserError
from zoo.model import checkpoint
from zoo.runs.files import one_line
from zoo.runs.folder import RunFolder
from zoo.runs.identity import identity
from zoo.training.callbacks import COLUMNS

DATA = ["data=text", "data.path=text", "data.cache=cache"]
TINY = [*DATA, "size=tiny", "size.width=16", "size.layers=1", "seq_len=16", "batch_tokens=32"]
TINY += ["match=none", "logger=none", "trainer.max_steps=4", "save_every=2", "valid_windows=1"]
TINY += ["trainer.log_every_n_steps=1"]
RUN, OTHER = Path("runs/mine"), Path("runs/other")
MEASURE = ["task=perplexity", "task.perplexity.lengths=[16]", "task.perplexity.units=2"]
WORDS = {
    "resume": ["train", f"resume={RUN}", "trainer.max_steps=6"],
    "eval": ["eval", f"run={RUN}", "report=null", "logger=none", *MEASURE],
    "finetune": ["train", f"finetune={RUN}", "extension=pi", "extension.factor=2", "name=tuned",
                 "logger=none", "trainer.max_steps=2", "optim.warmup_steps=1"],
}  # fmt: skip


@functools.cache
def tree(purpose: str) -> tuple[dict[str, Any], list[str]]:
    program, *words = WORDS[purpose]
    with composing(program):
        return compose_tree(program, parse(words)), [word.partition("=")[0] for word in words]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A folder with two runs of four steps on one text, the first one measured."""
    place = tmp_path_factory.mktemp("original")
    write_text(place, 60)
    with contextlib.chdir(place):
        for name, seed in (("mine", 0), ("other", 1)):
            with composing("train"):
                words = [*TINY, f"name={name}", f"seed={seed}"]
                composed = compose_tree("train", parse(words))
            given = [word.partition("=")[0] for word in words]
            assert train_program.job(train_program.check(composed, given), None) == 0
        assert carry_out("eval").code == 0
    return place


class Outcome:
    """What a program did: exit code, what it said, and what it found in the run."""

    def __init__(self) -> None:
        self.code, self.said, self.error = 0, [], ""
        self.weights: dict[str, torch.Tensor] = {}
        self.config: Any = None


def carry_out(purpose: str, stub: bool = False) -> Outcome:
    """resume, eval or finetune as the programs do them; `stub` takes no training step."""
    outcome = Outcome()
    handler = logging.Handler()
    handler.emit = lambda record: outcome.said.append(record.getMessage())
    log = logging.getLogger("zoo")
    log.addHandler(handler)
    composed, given = tree(purpose)
    program = {"eval": eval_program}.get(purpose, train_program)

    def fit(trainer, module, datamodule=None, ckpt_path=None, **_):
        name = "tuned" if purpose == "finetune" else RUN.name
        step = torch.load(ckpt_path, weights_only=True)["global_step"] if ckpt_path else 0
        RunFolder(Path("runs") / name).metrics(COLUMNS, step=step)
        outcome.weights = {k: v.clone() for k, v in module.model.state_dict().items()}
        outcome.config = datamodule.config
        raise KeyboardInterrupt

    patch = pytest.MonkeyPatch()
    if stub:
        patch.setattr(lightning.Trainer, "fit", fit)
    try:
        outcome.code = program.job(program.check(copy.deepcopy(composed), given), None)
    except KeyboardInterrupt:
        outcome.code = 130
    except (UserError, OSError, RunError) as error:  # as `launch` does
        outcome.code, outcome.error = 1 + (not isinstance(error, RunError)), one_line(error)
    finally:
        patch.undo()
        log.removeHandler(handler)
    return outcome


@pytest.fixture(scope="module")
def truth(original, tmp_path_factory):
    """step -> the weights saved there and the score they have; and the run's configuration."""
    place = original
    with contextlib.chdir(place):
        folder = RunFolder.open(RUN)
        config = folder.config
        files = list(folder.whole_checkpoints())
        steps = {whole.step: checkpoint.weights_in(torch.load(whole.path)) for whole in files}
        assert sorted(steps) == [2, 4]
    scores = {4: scores_of(place)}
    copied = tmp_path_factory.mktemp("older") / "copy"
    shutil.copytree(place, copied)
    (copied / RUN / "checkpoints" / "step=00000004.ckpt").unlink()
    (copied / RUN / "results.jsonl").unlink()
    with contextlib.chdir(copied):
        assert carry_out("eval").code == 0
    scores[2] = scores_of(copied)
    assert scores[2] != scores[4]
    return steps, scores, config


def scores_of(place: Path) -> dict[tuple, float]:
    rows = RunFolder(place / RUN).rows()
    return {(row["protocol"], row["length"]): row["bits_per_byte"] for row in rows}


FILES = [  # and how often each is drawn
    *["runs/mine/run.json"] * 4,
    *["runs/mine/config.yaml"] * 4,
    *["runs/mine/results.jsonl"] * 3,
    *["runs/mine/metrics.csv"] * 2,
    *["runs/mine/checkpoints/step=00000004.ckpt"] * 6,
    *["runs/mine/checkpoints/step=00000002.ckpt"] * 2,
    "runs/mine/.lock",
    *[f"cache/*/test/{n}" for n in ("tokens.bin", "offsets.npy", "documents.json", "meta.json")],
    *["cache/*/train/meta.json", "cache/*/train/tokens.bin", "cache/*.lock"],
    "text/test/a.txt",
]


def alter(draw: random.Random, place: Path, pattern: str) -> str:
    """Alter one file; what was done."""
    file = draw.choice(sorted(place.glob(pattern)))
    data = file.read_bytes()
    kinds = ["cut", "flip", "flips", "nul", "delete", "swap", "empty", "junk", "folder"]
    structured = file.suffix in (".json", ".yaml", ".jsonl", ".csv")
    kinds += ["deep", "type", "type", "field", "value", "line"] * structured
    kind = draw.choice(kinds)
    at = draw.randrange(max(1, len(data)))
    if kind == "cut":
        file.write_bytes(data[:at])
    elif kind in ("flip", "flips"):
        mutable = bytearray(data or b"\0")
        for _ in range(1 if kind == "flip" else 9):
            mutable[draw.randrange(len(mutable))] ^= 1 << draw.randrange(8)
        file.write_bytes(mutable)
    elif kind == "nul":
        file.write_bytes(data[:at] + b"\0" * 8 + data[at + 8 :])
    elif kind == "delete":
        file.unlink()
    elif kind == "swap":
        other = place / str(file.relative_to(place)).replace("mine", "other").replace(
            "test", "vali"
        )
        source = other if other.is_file() else draw.choice(sorted(place.glob("runs/mine/*.*")))
        file.write_bytes(source.read_bytes() if source.is_file() else b"")
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "junk":
        file.write_bytes(data[:at] + draw.randbytes(40) + data[at:])
    elif kind == "folder":
        file.unlink()
        file.mkdir()
    elif kind == "deep":
        opened = draw.choice(["[", '{"a":', "- " * 3, "a: {b: ["])
        file.write_text(opened * draw.choice([50, 5000, 100_000]))
    elif kind == "line":
        lines = data.split(b"\n")
        odd = [b"7", b"[]", b"{}", b'"a"', b"null", b"\xff\xfe", b"a,b\0", b"1e999", b"- - -"]
        lines.insert(draw.randrange(len(lines) + 1), draw.choice(odd))
        file.write_bytes(b"\n".join(lines))
    else:
        file.write_bytes(alter_value(draw, data, kind))
    return f"{file.relative_to(place)}: {kind}"


def alter_value(draw: random.Random, data: bytes, kind: str) -> bytes:
    """Another value, of another type unless `value`, in one place of JSON or YAML text."""
    lines = data.decode().split("\n")
    number = draw.choice([i for i, line in enumerate(lines) if ":" in line] or [0])
    key, _, value = lines[number].partition(":")
    if kind == "field":
        del lines[number]
    elif kind == "value" and any(c.isdigit() for c in value):
        digits = [i for i, c in enumerate(value) if c.isdigit()]
        i = draw.choice(digits)
        value = value[:i] + str((int(value[i]) + draw.randrange(1, 10)) % 10) + value[i + 1 :]
        lines[number] = f"{key}:{value}"
    else:
        comma = "," if value.endswith(",") else ""
        odd = ['"text"', "null", "-1", "1e400", "[]", "{}", "true", "[[1]]", "3.5", "NaN", "10**9"]
        lines[number] = f"{key}: {draw.choice(odd)}{comma}"
    return "\n".join(lines).encode()


def judge(outcome: Outcome, purpose: str, place: Path, truth) -> None:
    """One line and a code, or the truth, said where it is not the whole of it."""
    steps, scores, config = truth
    if outcome.error:
        assert "\n" not in outcome.error
        assert len(outcome.error) < 1000
        assert outcome.code in (1, 2)
        return
    if purpose == "eval":
        rows = RunFolder(place / RUN).rows()
        good = [row for row in rows if row["status"] == "ok"]
        if outcome.code:
            assert outcome.said  # why there is no score
            assert not any(row["bits_per_byte"] != scores[4][row["protocol"], 16] for row in good)
            return
        (step,) = {row["train_steps"] for row in good}
        for row in good:
            assert row["bits_per_byte"] == scores[step][row["protocol"], row["length"]]
            known = (config.seed, config.optim.lr, config.model.name, config.seq_len)
            assert (row["seed"], row["lr"], row["model"], row["train_length"]) == known
            assert row["train_tokens"] == step * 32 or "run.json was altered" in str(outcome.said)
        assert step == 4 or outcome.said
        return
    assert outcome.code == 130  # the stub was reached
    found = [step for step, weights in steps.items() if same(weights, outcome.weights)]
    assert found, "neither step's weights"
    assert found == [4] or outcome.said
    if purpose == "resume":
        mine, its = identity(config), identity(outcome.config)
        assert {k for k in mine if mine[k] != its[k]} <= {"trainer.max_steps"}
    else:
        assert (outcome.config.model, outcome.config.seed) == (config.model, config.seed)
        assert outcome.config.seq_len == 2 * config.seq_len


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def alter_and_judge(seed: int, original: Path, truth, tmp_path: Path) -> None:
    draw = random.Random(seed)
    place = tmp_path / str(seed)
    shutil.copytree(original, place)
    done = alter(draw, place, draw.choice(FILES))
    purpose = draw.choice(["resume", "eval", "eval", "finetune"])
    try:
        with contextlib.chdir(place):
            judge(carry_out(purpose, stub=True), purpose, place, truth)
    except BaseException as error:
        raise AssertionError(f"seed {seed}: {purpose} after {done}: {error!r}") from error
    shutil.rmtree(place)


def test_an_unaltered_run_is_what_it_is(original, truth, tmp_path):
    for purpose in WORDS:
        shutil.copytree(original, tmp_path / purpose)
        with contextlib.chdir(tmp_path / purpose):
            outcome = carry_out(purpose, stub=True)
            judge(outcome, purpose, tmp_path / purpose, truth)
            assert outcome.code == (0 if purpose == "eval" else 130)
            assert not [line for line in outcome.said if "altered" in line or "damaged" in line]


@pytest.mark.parametrize("first", range(0, 60, 20))
def test_an_altered_file_gives_one_line_or_the_truth(original, truth, tmp_path, first):
    for seed in range(first, first + 20):
        alter_and_judge(seed, original, truth, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1000, 3000, 100))
def test_many_altered_files_give_one_line_or_the_truth(original, truth, tmp_path, first):
    for seed in range(first, first + 100):
        alter_and_judge(seed, original, truth, tmp_path)


def test_the_generator_alters_every_file_of_a_run(original, tmp_path):
    """But for what nothing reads again."""
    drawn = {path for pattern in FILES for path in original.glob(pattern)}
    mine = {path for path in (original / RUN).rglob("*") if path.is_file()}
    assert {path.name for path in mine - drawn if path.suffix != ".npz"} <= {"documents.json"}
    assert json.loads((original / RUN / "run.json").read_text())["status"] == "done"
