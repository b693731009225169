"""zoo from Python, as README shows it."""

import inspect
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from building import train_on_text, write_byte_level

import zoo
import zoo.runs.rows
from zoo.cli.eval import main as eval_main
from zoo.cli.train import main as train_main
from zoo.errors import UserError

README = Path(__file__).parents[1] / "README.md"


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Path:
    """A folder with one trained and measured run, runs/my-run."""
    folder = tmp_path_factory.mktemp("api")
    model = ["model=transformer", "batch_tokens=64", "trainer.max_steps=2"]
    train_on_text(folder, *model, f"runs={folder / 'runs'}", "name=my-run")
    task = ["task=perplexity", "task.perplexity.lengths=[32]", "task.perplexity.units=2"]
    report = [f"report={folder / 'measured.html'}", "logger=none"]
    assert eval_main([f"run={folder / 'runs/my-run'}", *task, *report]) == 0
    return folder


def test_readmes_lines_run(here, monkeypatch, capsys):
    (block,) = re.findall(r"### From Python\n\n```python\n(.*?)```", README.read_text(), re.DOTALL)
    monkeypatch.chdir(here)
    found: dict = {}
    exec(block, found)
    model = found["model"]
    assert [one.name for one, _ in model.backbone.stages] == ["none", "dca"]
    assert model.logits("def main(").shape == (9, 256)
    assert capsys.readouterr().out == model.generate("def main(", tokens=100)
    assert {row["length"] for row in found["rows"]} == {32}
    assert "<html" in (here / "report.html").read_text()


def test_rows_of_a_folder_that_had_another_name_are_left_out_aloud(here, tmp_path, caplog):
    copy = shutil.copytree(here / "runs/my-run", tmp_path / "other")
    count = len(zoo.rows(here / "runs/my-run"))
    assert not caplog.messages
    assert zoo.rows(copy) == []
    (line,) = caplog.messages
    assert line.startswith(f"{copy}: {count} rows of the run my-run are left out, as this folder ")


def test_the_rows_of_a_folder_are_read_once(here, monkeypatch):
    read, files = zoo.runs.rows.read_rows, []
    monkeypatch.setattr(zoo.runs.rows, "read_rows", lambda file: files.append(file) or read(file))
    assert zoo.rows(here / "runs/my-run", other_code=True)
    assert files == [here / "runs/my-run/results.jsonl"]


def test_rows_that_other_code_measured_are_counted_aloud_or_marked(here, monkeypatch, caplog):
    run = here / "runs/my-run"
    current, marked = zoo.rows(run), zoo.rows(run, other_code=True)
    assert marked == [row | {"other_code": False} for row in current]
    assert not caplog.messages
    monkeypatch.setattr("zoo.tasks.known.measured_by", lambda *_: "another version")
    assert zoo.rows(run) == []
    (line,) = caplog.messages
    assert line.startswith(f"{run}: {len(current)} rows that other code measured are left out")
    assert zoo.rows(run, other_code=True) == [row | {"other_code": True} for row in current]
    with pytest.raises(UserError, match="has nothing measured by the code of now"):
        zoo.write_report(run, here / "none.html")


def test_logits_are_the_models_and_may_be_changed(here):
    model = zoo.load(here / "runs/my-run", device="cpu")
    logits = model.logits("abc")
    expected = model.backbone(torch.tensor([[97, 98, 99]]))[0]
    torch.testing.assert_close(logits, expected)
    logits.zero_()  # no inference tensor
    torch.testing.assert_close(model.logits([97, 98, 99]), expected)
    assert model.decode(model.encode("déjà")) == "déjà"


def test_many_prompts_are_written_on_as_each_alone(here):
    model = zoo.load(here / "runs/my-run", device="cpu")
    prompts = ["def main(", "", "a much longer prompt that is no Python", "def main(x", "x"]
    for how in ({}, {"temperature": 1.0, "seed": 3}, {"stop": ["e", "\n"]}):
        found = model.generate_many(prompts, tokens=20, rows=3, **how)
        assert found == [model.generate(prompt, tokens=20, **how) for prompt in prompts]


@pytest.mark.parametrize("of", [list, tuple, np.array, torch.tensor, str])
def test_prompts_may_be_of_every_annotated_type(here, of):
    model = zoo.load(here / "runs/my-run", device="cpu")
    given = ["def", "x"] if of is str else [of([100, 101, 102]), of([120])]
    found = model.generate_many(given, tokens=4)
    assert found == [model.generate(one, tokens=4) for one in given]
    assert found == model.generate_many(["def", "x"], tokens=4)
    with pytest.raises(UserError, match=r"^prompts=.+: must be a list, each .+$"):
        model.generate_many([np.ones((3, 40))], tokens=4)


def test_a_checkpoint_needs_no_text(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("tokenizers")
    config = transformers.LlamaConfig(
        vocab_size=257,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        eos_token_id=256,
    )
    theirs = transformers.LlamaForCausalLM(config)
    theirs.save_pretrained(tmp_path / "llama")
    write_byte_level(tmp_path / "llama")

    model = zoo.load(tmp_path / "llama", device="cpu")
    tokens = model.encode("Grüße 😀")
    expected = theirs(torch.tensor([tokens])).logits[0]
    torch.testing.assert_close(model.logits("Grüße 😀"), expected, atol=1e-5, rtol=0)
    assert model.tokenizer.end == 256
    assert [*model.tokenizer.decode(iter(tokens))] == ["G", "r", "ü", "ß", "e", " ", "😀"]
    assert model.decode(tokens[:-1]) == "Grüße \ufffd"  # a character that was not finished
    assert not list(tmp_path.glob("**/run.json"))


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ({"words": ["extension=yarm"]}, "extension=yarm"),
        ({"words": ["extension=yarn,dca"]}, "extension=yarn,dca: must be one value, and names"),
        (
            {"words": ["extension=yarn", "extension.factor=2,4"]},
            "extension.factor=2,4: must be one value, and names several. Give one.",
        ),
        ({"words": ["extension=yarn extension.factor=2"]}, "extension.factor=2: cannot be read"),
        ({"words": ["extension=pose", "extension.factor=2"]}, "is a way to train"),
        ({"words": ["task=speed"]}, "task=speed: is no option of an extension"),
        ({"words": ["weights=int8"]}, "no option of an extension. Give weights= as an argument"),
        ({"words": ["extension=alibi_interpolation", "extension.factor=2"]}, "alibi"),
        ({"device": "cuda:7"}, "device=cuda:7"),
        ({"path": "nothing"}, "nothing: is no run and no checkpoint"),
    ],
)
def test_what_cannot_be_opened_is_refused_in_one_line(here, words, line):
    path = words.get("path", here / "runs/my-run")
    with pytest.raises(UserError, match=line) as refused:
        zoo.load(path, *words.get("words", []), device=words.get("device", "cpu"))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"tokens": 0}, "tokens=0: must be an integer >= 1"),
        ({"tokens": "5"}, "tokens='5': must be an integer >= 1"),
        ({"tokens": 5.0}, "tokens=5.0: must be an integer >= 1"),
        ({"stop": [""]}, "stop=.*must not hold an empty text"),
        ({"top_p": 2}, "top_p=2: must be a number > 0 and <= 1"),
    ],
)
def test_a_bad_option_of_generate_is_refused_before_it_is_iterated(here, options, line):
    model = zoo.load(here / "runs/my-run", device="cpu")
    with pytest.raises(UserError, match=line):
        model.stream("a", **options)
    with pytest.raises(UserError, match="text=: must have at least one token"):
        model.logits("")
    with pytest.raises(UserError, match="text=999: must be of the model's tokens"):
        model.logits([999])


ZERO = "runs/\0x"  # no path, but a text
ODD = [None, True, 0, -1, 2.5, math.nan, 10**30, "", "x", "x" * 5000, b"x", [], [None], ["x"], {}]
ODD += [[-1], [2.5], [10**30], Path("nowhere"), ZERO]
ALLOWED = {  # the odd values that mean something
    "encode text": ["", "x", "x" * 5000, ZERO],
    "text": [[], "", "x", "x" * 5000, ZERO],
    "prompt": [[], "", "x", "x" * 5000, ZERO],
    "prompts": [[], ["x"]],
    "stop": [[], "x", "x" * 5000, ["x"], ZERO],
    "temperature": [0, 2.5],
    "decode tokens": [[]],
    "seed": [0],
    "weights": [None],
    "kv_cache": [None],
    "other_code": [True],
    "words": [],
    "folder": [
        "",
        "x",
        "x" * 5000,
        Path("nowhere"),
    ],  # where the run is not looked for: it has a whole path
    "html": ["x", Path("nowhere")],
}


def calls(here: Path) -> list[tuple[str, str, Callable]]:
    """(function, argument, a call with that argument) for every public argument."""
    run = str(here / "runs/my-run")
    model = zoo.load(run, device="cpu")
    given = {"load": {"path": run, "device": "cpu"}, "rows": {"pattern": run}}
    given["write_report"] = {"pattern": run, "html": str(here / "odd.html")}
    given |= {"encode": {"text": "a"}, "decode": {"tokens": [97]}, "logits": {"text": "a"}}
    given |= {name: {"prompt": "a", "tokens": 2} for name in ("generate", "stream")}
    given["generate_many"] = {"prompts": ["a", "bcd"], "tokens": 2}
    given["writer"] = {}
    functions = {name: getattr(zoo, name, None) or getattr(model, name) for name in given}
    public = {name for name, f in vars(type(model)).items() if inspect.isfunction(f)}
    assert {*zoo.__all__, *(name for name in public if name[0] != "_")} == given.keys()
    found = []
    for function, others in given.items():
        for name, argument in inspect.signature(functions[function]).parameters.items():

            def call(value, do=functions[function], others=others, name=name, kind=argument.kind):
                if kind is inspect.Parameter.VAR_POSITIONAL:
                    return do(others["path"], value, device="cpu")
                sampled = {"temperature": 1.0} if name in ("top_p", "seed") else {}
                got = do(**others | sampled | {name: value})
                return list(got) if inspect.isgenerator(got) else got

            found.append((function, name, call))
    return found


@pytest.mark.mistyped
def test_a_number_may_be_numpys(here):
    model = zoo.load(here / "runs/my-run", device="cpu")
    expected = model.generate("abc", tokens=3)
    assert model.generate([*np.array([97, 98, 99])], tokens=np.int64(3)) == expected


@pytest.mark.mistyped
def test_every_argument_is_honoured_or_refused_in_one_line(here, monkeypatch):
    """Whatever it is given: a value that means something, or `<argument>=<value>: <rule>.`"""
    (here / "empty").mkdir(exist_ok=True)
    monkeypatch.chdir(here / "empty")
    wrong = []
    for function, name, call in calls(here):
        allowed = ALLOWED.get(f"{function} {name}", ALLOWED.get(name, []))
        for value in ODD:
            who = f"{function}({name}={value!r:.40})"
            path = value[0] if isinstance(value, list) and value else value
            try:
                call(value)
                message = None
            except UserError as error:
                message = str(error)
            except Exception as error:
                wrong.append(f"{who}: {type(error).__name__}: {error}")
                continue
            right = any(type(value) is type(one) and value == one for one in allowed)
            if message is None and not right:
                wrong.append(f"{who} is accepted")
            if message is not None and not (
                message.startswith((f"{name}=", str(path)[:60] or "."))
                and re.fullmatch(r".*?: (must .*|.*\. .*)\.", message)
            ):
                wrong.append(f"{who}: {message}")
            if (
                message is not None
                and right
                and message.startswith(f"{name}=")
                and "must be text" in message
            ):
                wrong.append(f"{who} is refused: {message}")
    assert not wrong, "\n".join(wrong)


def test_tokens_may_be_an_array(here):
    model = zoo.load(here / "runs/my-run", device="cpu")
    expected = model.generate("abc", tokens=3)
    for tokens in (torch.tensor([97, 98, 99]), np.array([97, 98, 99]), [97, 98, 99]):
        assert model.generate(tokens, tokens=3) == expected


def test_lone_surrogates_are_the_replacement_character(here):
    model = zoo.load(here / "runs/my-run", device="cpu")
    assert model.decode(model.encode("a\ud800b")) == "a\ufffdb"


def test_a_run_of_a_task_has_no_text(tmp_path):
    data = ["data=parity", "model=lstm", "size=tiny", "match=none", "seq_len=16"]
    more = ["trainer.max_steps=1", "batch_tokens=32", f"runs={tmp_path}", "name=x", "logger=none"]
    assert train_main([*data, *more, "trainer.accelerator=cpu"]) == 0
    with pytest.raises(UserError, match="data=parity: is a task and no text"):
        zoo.load(tmp_path / "x")


def test_importing_zoo_costs_nothing():
    code = "import sys, zoo; print(sorted({'torch', 'lightning', 'pydantic'} & {*sys.modules}))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
    with pytest.raises(AttributeError, match="no attribute 'loda'"):
        _ = zoo.loda
