"""Runs and models made of a run, whichever way that run itself came about: each reads as it should.

Every run of RUNS is a base of everything in MADE.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from building import write_byte_level, write_text
from torch import Tensor

import zoo
from zoo.cli.export import main as export
from zoo.cli.shrink import main as shrink_main
from zoo.cli.train import main as train
from zoo.config.schema.model import Shrunk
from zoo.model.backbone import Backbone
from zoo.model.checkpoint import load
from zoo.model.quantization import quantize
from zoo.model.shrink import shrink
from zoo.runs.claim import weights_of
from zoo.runs.folder import RunFolder
from zoo.training.distillation import open_teacher

pytestmark = pytest.mark.slow  # two minutes

L = 16
SHORT = ["trainer.max_steps=2", "batch_tokens=128", "valid_windows=2", "logger=none"]
SHORT += ["optim.warmup_steps=1", "trainer.accelerator=cpu"]
LEARNS, STAYS = ["optim.lr=3e-2"], ["optim.lr=1e-12"]
YARN = ["extension=yarn", "extension.factor=2"]
TOKENS = torch.randint(256, (2, 3 * L), generator=torch.Generator().manual_seed(0))

# A run by name, from which it comes (None: a text; "A": a checkpoint), and how.
TINY = ["size=tiny", f"seq_len={L}", "match=none"]
RUNS: dict[str, tuple[str | None, list[str]]] = {
    "plain": (None, TINY),
    "untied": (None, [*TINY, "model.tied=false"]),
    "tuned": ("plain", YARN),
    "tuned-twice": ("tuned", ["extension=dca"]),
    "clex": ("plain", ["extension=clex", "extension.factor=2"]),
    "lora": ("plain", [*YARN, "lora.rank=2"]),
    "lora-clex": ("plain", ["extension=clex", "extension.factor=2", "lora.rank=2"]),
    "lora-on-lora": ("lora", ["lora.rank=1", "lora.targets=[q_proj]"]),
    "tuned-on-lora": ("lora", ["extension=pi", "extension.factor=4"]),
    "lora-dca": ("plain", ["extension=dca", "lora.rank=2"]),
    "lora-window": ("plain", ["extension=window", "extension.attention.window=9", "lora.rank=2"]),
    "low-rank": ("plain", ["shrink", "rank=4"]),
    "pruned": ("plain", ["shrink", "sparsity=0.5"]),
    "tuned-low-rank": ("low-rank", YARN),
    "tuned-pruned": ("pruned", YARN),
    "lora-low-rank": ("low-rank", [*YARN, "lora.rank=2"]),
    "low-rank-of-lora": ("lora", ["shrink", "rank=4"]),
    "pruned-of-lora-on-lora": ("lora-on-lora", ["shrink", "sparsity=0.5"]),
    "lora-on-low-rank-of-lora": ("low-rank-of-lora", ["lora.rank=1"]),
    "student": (None, [*TINY, "distil.teacher=runs/lora"]),
    "of-checkpoint": ("A", YARN),
    "lora-of-checkpoint": ("A", [*YARN, "lora.rank=2"]),
    "low-rank-of-lora-of-checkpoint": ("lora-of-checkpoint", ["shrink", "rank=4"]),
}


def chain(name: str | None) -> list[str]:
    """A run, and what it came from."""
    return [name, *chain(RUNS[name][0])] if name in RUNS else []


def shrunk(name: str, setting: str = "") -> bool:
    """Whether a run's model was made smaller, by that setting."""
    return any(words[0] == "shrink" and words[1].startswith(setting) for words in ways(name))


def ways(name: str) -> list[list[str]]:
    return [RUNS[one][1] for one in chain(name)]


def done(code: int, captured: pytest.CaptureFixture[str]) -> None:
    said = captured.readouterr()
    assert code == 0, said.err or said.out


def data_of(name: str | None, place: Path) -> list[str]:
    """The options of the text that a run is trained on."""
    outside = "A" in [name, *(RUNS[one][0] for one in chain(name))]
    more = [f"data.tokenizer={place}/A/tokenizer.json", "data.end_token=256", "data.bos_token=256"]
    where = ["data=text", f"data.path={place}/text", f"data.cache={place}/cache"]
    return where + more * outside


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """The working directory of all runs, each made when it is first used."""
    pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    here = tmp_path_factory.mktemp("work")
    write_text(here)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **{"vocab_size": 264, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2},
        **{"num_attention_heads": 2, "max_position_embeddings": L, "pad_token_id": 0},
        **{"eos_token_id": 256},
    )
    transformers.LlamaForCausalLM(config).save_pretrained(here / "A")
    write_byte_level(here / "A", begins=True)
    return here


@pytest.fixture
def run(place, monkeypatch, capsys) -> Callable[[str], RunFolder]:
    """run(name) -> a run of RUNS, in the working directory."""
    monkeypatch.chdir(place)

    def made(name: str) -> RunFolder:
        base, words = RUNS[name]
        if Path(f"runs/{name}").exists():
            return RunFolder.open(f"runs/{name}")
        if base in RUNS:
            made(base)
        start = [f"finetune={base if base == 'A' else f'runs/{base}'}"] if base else []
        if words[0] == "shrink":
            made(str(base))
            done(shrink_main([f"run=runs/{base}", words[1], f"to=runs/{name}"]), capsys)
        else:
            if "distil.teacher=runs/lora" in words:
                made("lora")
            text = data_of(name, place) if base is None or base == "A" else []
            text = text[:3] if base == "A" else text  # with the checkpoint's own tokenizer
            done(train([*start, *text, *words, *SHORT, *LEARNS, f"name={name}"]), capsys)
        return RunFolder.open(f"runs/{name}")

    return made


def read(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(TOKENS)


def same(found: Backbone, expected: Backbone) -> None:
    torch.testing.assert_close(read(found), read(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_not_what_it_came_from(run, name):
    """So that a model which forgets a part of its own is seen."""
    model = read(load(run(name)))
    if (base := RUNS[name][0]) in RUNS:
        assert not torch.allclose(model, read(load(run(base))), atol=1e-3)


@pytest.mark.parametrize("how", [{"rank": 2}, {"sparsity": 0.25}])
@pytest.mark.parametrize("name", RUNS)
def test_a_smaller_run_of_every_run(run, name, how, capsys):
    base, ((option, value),) = run(name), how.items()
    to = Path(f"made/{option}-{name}")
    code = shrink_main([f"run={base}", f"{option}={value}", f"to={to}"])
    if shrunk(name):
        assert (code, to.exists()) == (2, False)
        assert "is a smaller model already" in capsys.readouterr().err
        return
    done(code, capsys)
    same(load(RunFolder.open(to)), shrink(load(base), Shrunk(run=str(base), **how)))


@pytest.mark.parametrize("adapters", [[], ["lora.rank=1"]])
@pytest.mark.parametrize("name", RUNS)
def test_fine_tuning_of_every_run_begins_where_it_ended(run, name, adapters, capsys):
    base = run(name)
    to = f"{'lora' if adapters else 'whole'}-of-{name}"
    words = [f"finetune={base}", *adapters, *SHORT, *STAYS, "runs=made", f"name={to}"]
    code = train(words)
    if adapters and shrunk(name, "sparsity"):
        assert (code, Path(f"made/{to}").exists()) == (2, False)
        assert "adapters fill the zeros of a pruned model" in capsys.readouterr().err
        return
    done(code, capsys)
    same(load(RunFolder.open(f"made/{to}")), load(base))


@pytest.mark.parametrize("bits", ["int8", "int4"])
@pytest.mark.parametrize("name", RUNS)
def test_every_run_is_opened_in_fewer_bits(run, name, bits):
    base = run(name)
    found = zoo.load(base.path, device="cpu", weights=bits).backbone
    expected = quantize(load(base), bits)
    same(found, expected)
    assert not torch.allclose(read(found), read(load(base)), atol=1e-4)


@pytest.mark.parametrize("form", ["auto", "zoo"])
@pytest.mark.parametrize("name", RUNS)
def test_every_run_is_exported_whole(run, name, form, capsys):
    base, to = run(name), Path(f"made/{form}-{name}")
    code = export([f"run={base}", f"to={to}", f"format={form}"])
    if load(base).frequencies is not None:
        assert (code, to.exists()) == (2, False)
        assert "its frequencies are trained" in capsys.readouterr().err
        return
    done(code, capsys)
    same(zoo.load(to, device="cpu").backbone, load(base))


@pytest.mark.parametrize("name", RUNS)
def test_every_run_teaches(run, name, capsys):
    base = run(name)
    words = [*TINY, *data_of(name, Path.cwd()), *SHORT, *STAYS, f"distil.teacher={base}"]
    done(train([*words, "runs=made", f"name=student-of-{name}"]), capsys)
    student = RunFolder.open(f"made/student-of-{name}")
    same(open_teacher(base.path, student.config).model, load(base))
    assert student.info["teacher"]["weights"] == weights_of(base)


@pytest.mark.parametrize("name", [name for name in RUNS if "lora.rank" in str(RUNS[name][1])])
def test_adapters_go_over_the_base_that_their_export_names(run, name, capsys):
    import peft
    import transformers

    folder, to = run(name), Path(f"made/adapter-{name}")
    code = export([f"run={folder}", f"to={to}", "format=adapter"])
    said = capsys.readouterr().err
    refused = {
        "lora-clex": "its frequencies are trained",
        "lora-low-rank": "adapts units of low rank, which no model of transformers has",
        "lora-on-low-rank-of-lora": "adapts units of low rank",
        "lora-window": "is a MistralForCausalLM there, and its base a LlamaForCausalLM",
    }
    if name in refused:
        assert (code, to.exists()) == (2, False)
        assert refused[name] in said
        return
    assert code == 0, said
    base = RUNS[name][0]
    if name == "lora-dca":
        assert "go over zoo.load('runs/plain').backbone, under the run's extension=dca" in said
        model = zoo.load(f"runs/{base}", "extension=dca", device="cpu").backbone
        found = read(peft.PeftModel.from_pretrained(model, str(to)).eval().base_model.model)  # pyright: ignore[reportArgumentType]
    else:
        file = to / "base_options.json"
        options = json.loads(file.read_text()) if file.exists() else {}
        assert ("opened with the" in said) == bool(options)
        outside = f"they go over {base}" if base == "A" else f"zoo export run=runs/{base} to="
        assert outside in said
        if base != "A":
            done(export([f"run=runs/{base}", f"to=made/base-of-{name}"]), capsys)
        place = base if base == "A" else f"made/base-of-{name}"
        model = transformers.AutoModelForCausalLM.from_pretrained(place, **options).eval()
        with torch.no_grad():
            found = peft.PeftModel.from_pretrained(model, str(to)).eval()(TOKENS).logits
    torch.testing.assert_close(found, read(load(folder)), atol=1e-5, rtol=1e-5)
