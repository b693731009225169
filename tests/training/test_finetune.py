"""Whole runs: a model trained short, given a longer context by further training, and measured."""

import csv
import json
import math
from pathlib import Path

import pytest
import torch
from building import train_config, write_text

from zoo.config.compose import compose
from zoo.config.longrope_factors import with_found_factors
from zoo.config.schema.model import Extension
from zoo.config.validate import plain
from zoo.data.corpora import open_corpus
from zoo.data.loader import evaluation_text, train_loader
from zoo.mixers.feed_forward import SwiGLU
from zoo.mixers.softmax import SoftmaxAttention
from zoo.model import checkpoint
from zoo.model.extend import extend, places, rotary_positions
from zoo.runs.claim import claim
from zoo.runs.folder import RunFolder
from zoo.tasks import longrope
from zoo.tasks.context import EvalContext
from zoo.training import fit

L = 16
SHORT = [
    "trainer.max_steps=3",
    "batch_tokens=128",
    "valid_windows=2",
    "trainer.log_every_n_steps=1",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The working directory of a run, runs/base, trained on windows of L tokens."""
    place = tmp_path_factory.mktemp("work")
    write_text(place)
    words = ["size=tiny", f"seq_len={L}", "data=text", f"data.path={place}/text", "logger=none"]
    words += [f"data.cache={place}/cache", f"runs={place}/runs", "name=base", "seed=3"]
    words += ["match=none"]
    config = train_config(*words, *SHORT)
    fit.train(config, claim(config))
    return place


def first_loss(folder: RunFolder) -> float:
    with open(folder.path / "metrics.csv") as file:
        return float(next(csv.DictReader(file))["train_loss"])


@pytest.mark.parametrize(
    ("name", "window"), {"yarn": 4 * L, "pose": L, "randomised": L, "clex": L}.items(), ids=str
)
def test_a_run_is_tuned_under_an_extension_and_measured_as_it_was_tuned(name, window, program):
    extension = [f"extension={name}", "extension.factor=4"]
    code, error = program("train", "finetune=runs/base", *extension, f"name={name}", *SHORT)
    assert code == 0, error
    folder, base = RunFolder.open(f"runs/{name}"), RunFolder.open("runs/base")
    assert folder.config.seq_len == window
    assert folder.config.extension.original_length == L
    assert folder.config.seed == 3

    # Its first step read the base's weights, under the extension, at the places it says.
    model = extend(checkpoint.load(base), folder.config.extension, window)
    corpus = open_corpus(folder.config.data.model_dump(), Path("cache"))
    loader = train_loader(
        corpus.train, seq_len=window, batch_size=128 // window, seed=3, start_step=0, steps=1,
        contiguous=False, draw_positions=places(folder.config.extension, window),
    )  # fmt: skip
    (batch,) = loader
    assert ("positions" in batch) == (name != "yarn")
    expected = model.loss(batch["tokens"], positions=batch.get("positions"))
    assert first_loss(folder) == pytest.approx(expected.item(), rel=1e-5)
    assert first_loss(folder) != pytest.approx(float(checkpoint.load(base).loss(batch["tokens"])))

    # What it learned is read under the same extension, which nothing has to repeat.
    tuned, text = checkpoint.load(folder), torch.randint(256, (1, 4 * L))
    by_hand = extend(checkpoint.load(base), folder.config.extension, window)
    by_hand.load_state_dict(checkpoint.trained_weights(folder))
    assert torch.equal(tuned(text), by_hand.requires_grad_(False)(text))
    if name == "clex":
        assert tuned.frequencies.field.down.weight.any()  # zero before it was trained
    measure = ["task=perplexity", f"task.perplexity.lengths=[{L},{4 * L}]", "report=null"]
    code, _ = program("eval", f"run=runs/{name}", *measure)
    rows = [row for row in folder.rows() if row["protocol"] == "blocks"]
    assert (code, [row["length"] for row in rows]) == (0, [4 * L, L])
    assert {(row["arm"], row["status"]) for row in rows} == {
        (f"transformer tuned with {name} x4", "ok")
    }


FEW_GENOMES = ["population=6", "mutations=3", "crossovers=3", "parents=4", "texts=2"]


def test_a_search_leaves_the_model_as_it_was(program):
    base = RunFolder.open("runs/base")
    corpus = open_corpus(base.config.data.model_dump(), Path("cache"))
    model = checkpoint.load(base)
    before = [rope.pattern for rope in rotary_positions(model)]
    context = EvalContext(model=model, data=corpus, folder=Path("runs/base"), train_length=L)
    few = {"population": 6, "mutations": 3, "crossovers": 3, "parents": 4, "texts": 2}
    (row,) = longrope.LongRope(factor=2.0, generations=1, **few).rows(context)
    assert row["status"] == "ok"
    assert [rope.pattern for rope in rotary_positions(model)] == before


def test_longrope_is_searched_for_a_run_used_by_it_tuned_and_searched_again(program):
    def search(run: str, generations: int) -> dict:
        words = ["factor=4", f"generations={generations}", *FEW_GENOMES]
        code, error = program(
            "eval", f"run=runs/{run}", "report=null", "task=longrope",
            *(f"task.longrope.{word}" for word in words),
        )  # fmt: skip
        assert code == 0, error
        found = json.loads(Path(f"runs/{run}/longrope-x4.json").read_text())
        assert f"longrope: {found['best'][-1]:.4f} bits per byte at " in error
        assert "under n_hat=" in error
        return found

    measure = ["task=perplexity", f"task.perplexity.lengths=[{4 * L}]", "report=null"]
    extension = ["extension=longrope", "extension.factor=4"]
    code, error = program("eval", "run=runs/base", *measure, *extension)
    assert code == 2
    assert "python eval.py run=<run> task=longrope task.longrope.factor=4" in error

    search("base", 1)
    found = search("base", 3)  # goes on with the first two
    assert len(found["best"]) == 4
    assert found["best"] == sorted(found["best"], reverse=True)
    again = [row for row in RunFolder.open("runs/base").rows() if row["task"] == "longrope"]
    assert again[-1]["bits_per_byte"] == found["best"][-1]
    code, error = program(
        "eval", "run=runs/base", "report=null", "task=longrope", "task.longrope.factor=4"
    )
    assert code == 2
    assert "longrope-x4.json: holds another search, which differs in texts, population," in error

    # What it found reads the validation text exactly as well as the search says.
    base = checkpoint.load(RunFolder.open("runs/base"))
    config = compose("train", ["finetune=runs/base", *extension])
    tree = with_found_factors(plain(config)["extension"], Path("runs/base"))
    assert tree["scaling"]["long_factors"] == found["found"]["long_factors"]
    extend(base, Extension.model_validate(tree), L)
    corpus = open_corpus(RunFolder.open("runs/base").config.data.model_dump(), Path("cache"))
    text = torch.from_numpy(evaluation_text(corpus.valid, 4 * L, 2, corpus.eval_documents))
    for mixer in base.sublayers():
        if isinstance(mixer, SoftmaxAttention):
            mixer.positions.pattern.bucket = None
            mixer.positions.pattern.scaling = lambda _, scaling=mixer.positions.pattern.scaling: (
                scaling(4 * L)
            )
    bits = float(base.loss(text).detach()) / math.log(2)
    assert bits == pytest.approx(found["best"][-1], rel=1e-5)

    code, error = program("eval", "run=runs/base", *measure, *extension)
    assert code == 0, error
    code, error = program("train", "finetune=runs/base", *extension, "name=long", *SHORT)
    assert code == 0, error
    scaling = RunFolder.open("runs/long").config.extension.scaling
    assert scaling.options["long_factors"] == found["found"]["long_factors"]
    short = search("long", 1)
    assert short["found"]["long_factors"] == found["found"]["long_factors"]
    assert max(short["found"]["short_factors"]) <= 4
    code, error = program("eval", "run=runs/long", *measure, *extension)
    assert code == 0, error
    code, error = program("eval", "run=runs/long", *measure, "extension=yarn", "extension.factor=4")
    assert code == 0, error
    arms = {row["arm"] for row in RunFolder.open("runs/long").rows()}
    assert "transformer tuned with longrope x4 + yarn x4 in place of longrope" in arms


def test_positions_are_randomised_from_the_start_too():
    config = compose("train", ["model=alibi", "extension=randomised", "extension.factor=4"])
    drawn = places(config.extension, config.seq_len)
    assert drawn is not None
    found = drawn(3, 512, torch.Generator().manual_seed(0))
    assert found.shape == (3, 512)
    assert (found.diff() > 0).all()
    assert 1800 < found.max() < 2048


def test_a_leak_is_reported_where_it_is_trained_and_is_never_scored(program, monkeypatch):
    """A feed-forward that reads the next token by mistake."""
    honest = SwiGLU.forward

    def peeks(self, x, state=None):
        found = honest(self, torch.nn.functional.pad(x[:, 1:], (0, 0, 0, 1)), state)
        return found

    words = ["size=tiny", f"seq_len={L}", "data=text", f"data.path={Path('text').resolve()}"]
    words += ["data.cache=cache", "match=none", "name=leaky", *SHORT]
    monkeypatch.setattr(SwiGLU, "forward", peeks)
    for _ in range(2):  # trained, and found trained
        code, error = program("train", *words)
        assert code == 1
        assert "leaks" in error
        assert "it reads the future: changing later tokens alone changes the output after" in error
        info = RunFolder.open("runs/leaky").info
        assert (info["status"], info["audit"]["ok"]) == ("done", False)
    code, _ = program("eval", "run=runs/leaky", "task=perplexity", "report=null")
    assert code == 1
    assert {row["status"] for row in RunFolder.open("runs/leaky").rows()} == {"leaks"}


def test_training_records_that_a_model_does_not_leak(trained):
    audit = RunFolder.open(trained / "runs/base").info["audit"]
    assert (audit["ok"], audit["reason"], audit["lengths"]) == (True, None, [L, 2 * L])
    assert audit["worst"] < 0.5
