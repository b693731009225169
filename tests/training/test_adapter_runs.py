"""Runs that train low-rank adapters: under every extension, resumed, moved, measured, exported."""

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch
from building import train_config, write_text

from zoo.cli.train import check
from zoo.config.compose import compose_tree, composing, parse
from zoo.config.groups import choices
from zoo.errors import UserError
from zoo.model import checkpoint
from zoo.model.export import export
from zoo.runs.claim import claim
from zoo.runs.folder import RunFolder
from zoo.training import fit
from zoo.training.data import open_data, validation

pytestmark = pytest.mark.slow  # half a minute

L = 16
SHORT = ["trainer.max_steps=2", "batch_tokens=128", "valid_windows=2", "optim.lr=1e-2"]
SHORT += ["optim.warmup_steps=1"]
TEXTS = ["task=perplexity", f"task.perplexity.lengths=[{2 * L}]", "report=null"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The working directory of a run, runs/base, trained on windows of L tokens."""
    pytest.importorskip("peft")
    place = tmp_path_factory.mktemp("work")
    write_text(place)
    words = ["size=tiny", f"seq_len={L}", "data=text", f"data.path={place}/text", "logger=none"]
    words += [f"data.cache={place}/cache", f"runs={place}/runs", "name=base", "match=none"]
    config = train_config(*words, *SHORT[:3])
    fit.train(config, claim(config))
    return place


def held(run: str) -> set[str]:
    """The kinds of weights in a run's last checkpoint."""
    names = checkpoint.checkpoint_weights(RunFolder.open(run))
    return {name.split(".")[-3] if ".lora_" in name else name.split(".")[0] for name in names}


QUICK = ("clex", "dca")


@pytest.mark.parametrize(
    "extension",
    [
        pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow)
        for name in choices("extension")
    ],
)
def test_adapters_alone_are_trained_under_every_extension_that_tunes_the_model(extension, program):
    words = [f"extension={extension}"]
    words += [] if extension == "none" else ["extension.factor=2"]
    if extension == "longrope":
        words += ["extension.scaling.long_factors=[1,2,3,4,5,6,7,8]"]
    name = f"name={extension}"
    tune = ["finetune=runs/base", *words, *SHORT]
    possible, said = program("train", *tune, f"{name}-whole")
    code, error = program("train", *tune, name, "lora.rank=2")
    assert code == possible, error
    if code:
        assert error == said
        return
    run, base = RunFolder.open(f"runs/{extension}"), RunFolder.open("runs/base")
    new = {"frequencies"} if extension == "clex" else set()
    assert held(f"runs/{extension}") == {"lora_A", "lora_B", *new}
    before, after = base.info["parameters"], run.info["trained_parameters"]
    assert 0 < after < before / 4
    one, other = checkpoint.load(base), checkpoint.load(run)
    layers = [name for name, weight in one.named_parameters() if "_proj" in name]
    assert layers
    for name, weight in one.named_parameters():
        assert torch.equal(weight, other.get_parameter(name)) == (name not in layers), name
    assert run.last_metric("valid_loss") == pytest.approx(
        validation_loss(run, other), rel=1e-5
    )  # of the merged model


def validation_loss(run: RunFolder, model) -> float:
    batch = validation(open_data(run.config.data, run.config.seq_len), run.config)
    return float(model.loss(batch["tokens"], positions=batch.get("positions")))


def test_a_stopped_run_goes_on_as_one_that_was_not(program):
    tune = ["finetune=runs/base", "lora.rank=2", "extension=clex", "extension.factor=2"]
    tune += [*SHORT[1:], "trainer.max_steps=4", "logger=none"]
    assert program("train", *tune[:-1], "name=whole")[0] == 0
    with composing("train"):
        words = [*tune, "name=parts"]
        config = check(compose_tree("train", parse(words)), [w.partition("=")[0] for w in words])
    folder = claim(config)
    fit.train(config, folder, until=2)
    assert folder.info["step"] == 2
    assert program("train", *tune[:-1], "name=parts")[0] == 0
    one, other = (
        checkpoint.trained_weights(RunFolder.open(f"runs/{name}")) for name in ("whole", "parts")
    )
    assert all(torch.equal(weight, other[name]) for name, weight in one.items())


def test_a_run_with_adapters_is_tuned_measured_and_opened_only_beside_its_base(program, tmp_path):
    words = ["finetune=runs/base", "lora.rank=2", *SHORT, "name=first"]
    assert program("train", *words)[0] == 0
    again = ["finetune=runs/first", "lora.rank=1", "lora.targets=[q_proj]", *SHORT]
    again += ["extension=pi", "extension.factor=2", "name=second"]
    code, error = program("train", *again)
    assert code == 0, error
    code, error = program("eval", "run=runs/second", *TEXTS)
    assert code == 0, error
    logits = checkpoint.load(RunFolder.open("runs/second"))(torch.arange(32)[None])
    for run in ("base", "first", "second"):
        shutil.copytree(f"runs/{run}", tmp_path / run)
    shutil.move("runs/first", "runs/elsewhere")  # the copies lie beside one another
    moved = checkpoint.load(RunFolder.open(tmp_path / "second"))
    assert torch.equal(moved(torch.arange(32)[None]), logits)
    second = RunFolder.open("runs/second")
    with pytest.raises(UserError, match="adapters of the run runs/first, which is not there"):
        checkpoint.load(second)
    shutil.move("runs/elsewhere", "runs/first")
    assert program("train", "resume=runs/first", "trainer.max_steps=3")[0] == 0
    with pytest.raises(UserError, match="adapters of the run runs/first, whose weights changed"):
        checkpoint.load(second)


def test_adapters_are_exported_as_peft_reads_them(program, tmp_path):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    base = RunFolder.open("runs/base")
    export(base, tmp_path / "base")
    words = ["finetune=runs/base", "lora.rank=2", "name=out", *SHORT]
    assert program("train", *words)[0] == 0
    export(RunFolder.open("runs/out"), tmp_path / "adapter", "adapter")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    adapted = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    tokens = torch.randint(256, (1, 40))
    ours = checkpoint.load(RunFolder.open("runs/out"))(tokens)
    plain = checkpoint.load(base)(tokens)
    torch.testing.assert_close(adapted(tokens).logits, ours, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(ours, plain, atol=1e-3)
    with pytest.raises(UserError, match=r"format=adapter: .* without lora\.rank"):
        export(base, tmp_path / "no", "adapter")
    assert not (tmp_path / "no").exists()


def test_without_peft_training_is_refused_in_one_line(program, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "zoo.config.effects.find_spec", lambda name: None if name == "peft" else find(name)
    )
    code, error = program("train", "finetune=runs/base", "lora.rank=2", "name=none-of-it", *SHORT)
    line = "train.py: lora.rank=2: needs the package peft. Run pip install 'zoo[lora]'."
    assert (code, error) == (2, line)
    assert not Path("runs/none-of-it").exists()
