"""`eval.py checkpoint=`: a pretrained model is a run like any other, and measured like one."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from building import write_byte_level, write_text
from torch.nn.functional import cross_entropy

from zoo.cli import eval as eval_program
from zoo.cli.eval import main
from zoo.cli.launch import spelt
from zoo.cli.train import main as train
from zoo.config.compose import compose_tree, composing, parse
from zoo.config.groups import CONFIGS, corpora
from zoo.config.schema.data import DataPlace
from zoo.config.schema.train import TrainConfig
from zoo.data.loader import evaluation_bytes, evaluation_text, train_loader
from zoo.data.sources import NAMES
from zoo.errors import UserError
from zoo.model.export import export
from zoo.model.language_model import load_language_model
from zoo.runs.folder import RunFolder
from zoo.training.data import open_data, validation
from zoo.training.pretrained import pretrained_run
from zoo.training.windows import Windows

transformers = pytest.importorskip("transformers")
SLOPES = ["extension=alibi_interpolation", "extension.factor=2"]
PLACES = ("name", "path", "cache", "tokenizer")
MEASURE = ["task=perplexity", "task.perplexity.lengths=[32,64]", "task.perplexity.units=2"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A tiny Llama of random weights with a byte-level tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny llama"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        eos_token_id=257,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    write_byte_level(folder, ("t", "h"))
    return folder


@pytest.fixture
def words(checkpoint, tmp_path) -> list[str]:
    write_text(tmp_path / "text")
    place = [f"data.path={tmp_path / 'text'}", f"data.cache={tmp_path / 'cache'}"]
    place += [f"runs={tmp_path / 'runs'}", f"report={tmp_path / 'report.html'}", "logger=none"]
    return [f"checkpoint={checkpoint}", *place, *MEASURE]


def measured(tmp_path: Path) -> tuple[RunFolder, list[dict]]:
    (path,) = (path for path in (tmp_path / "runs").glob("*") if (path / "run.json").is_file())
    folder = RunFolder.open(path)
    return folder, [json.loads(line) for line in (path / "results.jsonl").read_text().splitlines()]


def test_it_is_measured_once_and_again_under_an_extension(words, tmp_path, capsys):
    assert main(words) == 0
    folder, rows = measured(tmp_path)
    assert {row["length"] for row in rows} == {32, 64}
    assert all(row["status"] == "ok" for row in rows)
    assert folder.info["status"] == "done"
    assert folder.config.seq_len == 32
    assert folder.info["tokenizer"].endswith("257 ends")
    assert main(words) == 0
    assert len(measured(tmp_path)[1]) == len(rows)  # known: not measured again
    assert main([*words, "extension=dca"]) == 0
    extended = measured(tmp_path)[1][len(rows) :]
    assert {row["extension"] for row in extended} == {"dca"}
    assert "dca" in capsys.readouterr().out


def test_its_rows_say_what_is_ignored_of_its_config(words, checkpoint, tmp_path, capsys):
    windowed = tmp_path / "windowed"
    shutil.copytree(checkpoint, windowed)
    config = json.loads((windowed / "config.json").read_text())
    scaled = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    config |= {"model_type": "mistral", "sliding_window": 48, "rope_parameters": scaled}
    config = {key: one for key, one in config.items() if not key.endswith("_bias")}
    (windowed / "config.json").write_text(json.dumps(config))
    words = [f"checkpoint={windowed}", *words[1:]]
    assert main(words) == 0
    assert (
        "the length before its linear rope_scaling is not in config.json" in capsys.readouterr().err
    )
    folder, rows = measured(tmp_path)
    assert {row["ignores"][:37] for row in rows} == {"sliding_window=48: does not act beside"[:37]}
    file = folder.path / "run.json"
    file.write_text(json.dumps({k: v for k, v in folder.info.items() if k != "ignores"}))
    assert main(words) == 0  # of a folder that an older version made
    assert RunFolder.open(folder.path).info["ignores"] == rows[0]["ignores"]
    assert len(measured(tmp_path)[1]) == len(rows)
    capsys.readouterr()
    config["original_max_position_embeddings"] = 24
    (windowed / "config.json").write_text(json.dumps(config))
    others = [word for word in words if not word.startswith("runs=")]
    assert main([*others, f"runs={tmp_path / 'known'}"]) == 0
    assert "linear rope_scaling" not in capsys.readouterr().err


def test_its_run_is_measured_by_its_folder_too(words, tmp_path):
    assert main(words) == 0
    folder, rows = measured(tmp_path)
    options = [word for word in words if not word.startswith(("checkpoint=", "data."))]
    assert main([f"run={folder.path}", *options]) == 0
    assert main([f"run={folder.path}", *options, "extension=dca"]) == 0
    assert {row["extension"] for row in measured(tmp_path)[1][len(rows) :]} == {"dca"}


def test_a_tokenizer_may_be_named_where_the_checkpoint_has_none(words, checkpoint, tmp_path):
    own, named = checkpoint / "tokenizer.json", tmp_path / "named.json"
    own.rename(named)
    try:
        assert main(words) == 2
        assert main([*words, f"data.tokenizer={named}"]) == 2  # one token more, to end documents
        assert main([*words, "data.tokenizer=bytes"]) == 0
    finally:
        named.rename(own)


def test_the_corpora_that_are_named_are_those_that_can_be_opened():
    assert {*corpora()} == {*NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_every_corpus_can_be_named_as_train_py_names_it(name, words, tmp_path, monkeypatch):
    section = yaml.safe_load((CONFIGS / "data" / f"{name}.yaml").read_text())
    opened = []
    monkeypatch.setattr(eval_program, "check_source", opened.append)
    words = [word for word in words if not word.startswith("data.path=")]
    own = [key for key in DataPlace.model_fields if key in section and key not in PLACES]
    values = {key: "7" if key == "documents" else "x" for key in own}
    if "path" in section:
        words.append("data.path=x")
    given = [f"data={name}", *(f"data.{key}={value}" for key, value in values.items())]
    with composing("eval"):
        tree = compose_tree("eval", parse(spelt("eval", [*words, *given])))
    config = eval_program.check(tree, [])
    assert config.data.name == name
    (text,) = opened
    assert text["name"] == name
    assert {key: str(text[key]) for key in own} == values
    for key in sorted({*DataPlace.model_fields} - {*section} - {"tokenizer"}):
        bad = {**tree, "data": {**tree["data"], key: 7 if key == "documents" else "x"}}
        with pytest.raises(UserError, match=f"data={name} has no such option"):
            eval_program.check(bad, [])


def test_records_are_read_and_a_run_keeps_its_own_corpus(words, tmp_path, capsys):
    records = tmp_path / "records.jsonl"
    lines = (json.dumps({"body": f"{n} " + "some words of a text " * 9}) for n in range(400))
    records.write_text("\n".join(lines))
    words = [word for word in words if not word.startswith("data.path=")]
    assert main([*words, "data=jsonl", f"data.path={records}", "data.field=body"]) == 0
    folder, rows = measured(tmp_path)
    assert {row["status"] for row in rows} == {"ok"}
    options = [f"run={folder.path}", *MEASURE, "report=null", "logger=none"]
    assert main([*options, "data=jsonl"]) == 0
    capsys.readouterr()
    assert main([*options, "data=text"]) == 2
    said = "data=text: the run was trained on data=jsonl, and is measured on that. Leave it out."
    assert said in capsys.readouterr().err


def test_a_folder_gives_its_run_its_whole_name(words, checkpoint, tmp_path):
    place = tmp_path / "tiny-3.1-8B"
    shutil.copytree(checkpoint, place)
    assert main([f"checkpoint={place}", *words[1:]]) == 0
    assert measured(tmp_path)[0].name.startswith("tiny-3.1-8B-text-")


def test_it_scores_the_bytes_of_the_text_and_random_weights_know_nothing(words, tmp_path):
    assert main(words) == 0
    for row in measured(tmp_path)[1]:
        if row["protocol"] == "blocks":
            assert row["bits_per_byte"] == pytest.approx(8, abs=0.8)


def test_it_is_fine_tuned_as_a_run(words, tmp_path):

    assert main(words) == 0
    folder, _ = measured(tmp_path)
    options = ["extension=pi", "extension.factor=2", "trainer.max_steps=2", "batch_tokens=128"]
    options += ["optim.warmup_steps=1", "logger=none", "valid_every=2", "valid_windows=2"]
    assert train([f"finetune={folder.path}", f"runs={tmp_path / 'tuned'}", *options]) == 0
    (tuned,) = (tmp_path / "tuned").glob("*/run.json")
    assert json.loads(tuned.read_text())["status"] == "done"


def test_weights_that_changed_are_not_measured_as_the_same(words, checkpoint, tmp_path, capsys):
    assert main(words) == 0
    file = checkpoint / "model.safetensors"
    whole = file.read_bytes()
    try:
        file.write_bytes(whole[:-4] + b"\0\0\0\x3f")
        assert main(words) == 2
        assert "changed" in capsys.readouterr().err
    finally:
        file.write_bytes(whole)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: [x for x in w if not x.startswith("data.path")], "Add data.path="),
        (lambda w: ["checkpoint=nowhere", *w[1:]], "checkpoint=nowhere"),
        (lambda w: [*w, "data.tokenizer=nowhere.json"], "nowhere.json"),
        (lambda w: [x for x in w if not x.startswith("checkpoint")], "run=: must be given"),
        (lambda w: [*w, *SLOPES], SLOPES[0]),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(change, said, words, tmp_path, capsys):
    assert main(change(words)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert said in lines[-1]
    assert not list((tmp_path / "runs").glob("*/results.jsonl"))


@pytest.fixture
def beginning(checkpoint, tmp_path) -> Path:
    """The checkpoint with a tokenizer that puts a token before every text."""
    place = tmp_path / "beginning"
    shutil.copytree(checkpoint, place)
    write_byte_level(place, ("t", "h"), begins=True)
    return place


def nll_of_windows(checkpoint: Path, windows: np.ndarray) -> float:
    """What `transformers` has for the tokens of windows but their first, in nats."""
    model = transformers.LlamaForCausalLM.from_pretrained(checkpoint).eval()
    tokens = torch.from_numpy(windows)
    with torch.no_grad():
        logits = model(tokens[:, :-1]).logits.double()
    return float(cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum"))


def test_every_window_begins_as_the_tokenizer_begins_a_text(words, beginning, tmp_path):
    """And covers the same bytes: only what the first tokens are predicted from is another."""
    assert main([f"checkpoint={beginning}", *words[1:]]) == 0
    folder, rows = measured(tmp_path)
    assert folder.config.data.options["bos_token"] == 257
    (row,) = [row for row in rows if (row["protocol"], row["length"]) == ("blocks", 32)]
    corpus = open_data(folder.config.data, 32)
    stretches = evaluation_text(corpus.test, 64, 2, "whole")
    windows = np.concatenate([stretches[:, at : at + 33] for at in (0, 32)])
    plain = nll_of_windows(beginning, windows)
    windows[:, 0] = 257
    assert row["nll_sum"] == pytest.approx(nll_of_windows(beginning, windows), abs=1e-3)
    assert abs(row["nll_sum"] - plain) > 0.01
    assert row["count"] == windows[:, 1:].size
    sizes = evaluation_bytes(corpus.test, 64, 2, "whole")
    assert row["bytes"] == sizes[:, 1:].sum()


def test_training_windows_and_prompts_begin_so_too(words, beginning, tmp_path):
    assert main([f"checkpoint={beginning}", *words[1:]]) == 0
    folder, _ = measured(tmp_path)
    corpus = open_data(folder.config.data, 32)
    shape = {"seq_len": 32, "batch_size": 4, "seed": 0, "start_step": 0, "steps": 2}
    for contiguous in (False, True):
        loader = train_loader(corpus.train, **shape, contiguous=contiguous, bos=257)
        plain = train_loader(corpus.train, **shape, contiguous=contiguous)
        for found, without in zip(loader, plain, strict=True):
            restart = found["restart"]
            assert (found["tokens"][restart, 0] == 257).all()
            assert torch.equal(found["tokens"][:, 1:], without["tokens"][:, 1:])
            assert torch.equal(found["tokens"][~restart], without["tokens"][~restart])
    assert (validation(corpus, folder.config)["tokens"][:, 0] == 257).all()
    assert next(iter(windows_of(corpus, folder.config)))["tokens"][:, 0].tolist() == [257] * 2
    model = load_language_model(folder.path)
    assert model.encode("and then")[0] == 257
    assert model.writer("and").last_tokens == [257, *model.tokenizer.tokens("and")]
    assert model.writer("").last_tokens == [257]
    theirs = transformers.LlamaForCausalLM.from_pretrained(beginning).eval()
    prompt = torch.tensor([model.encode("and then")])
    expected = theirs.generate(prompt, max_new_tokens=9, do_sample=False, pad_token_id=0)
    written = model.generate("and then", tokens=9)
    assert written == model.decode([x for x in expected[0, prompt.shape[1] :].tolist() if x != 257])


def windows_of(corpus, config: TrainConfig) -> Windows:
    """A run's training windows, two a step."""
    windows = Windows(corpus, config.model_copy(update={"batch_size": 2}))
    step = {"global_step": 0, "max_steps": 1, "global_rank": 0, "world_size": 1}
    windows.trainer = SimpleNamespace(**step, accumulate_grad_batches=1)
    return windows


def test_writing_ends_at_each_of_a_checkpoints_ends(words, checkpoint, tmp_path):
    """Chat models have several: of a turn, at times in generation_config.json alone, and a text.
    A run that is made of the checkpoint keeps them."""
    place = tmp_path / "several"
    shutil.copytree(checkpoint, place)
    prompt = torch.tensor([load_language_model(place).encode("and then")])
    how = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    theirs = transformers.LlamaForCausalLM.from_pretrained(place).eval()
    end = theirs.generate(prompt, **how)[0, prompt.shape[1] + 3].item()
    (place / "generation_config.json").rename(tmp_path / "kept")
    for file in ("config.json", "generation_config.json"):
        if file != "config.json":
            (tmp_path / "kept").rename(place / file)
        settings = json.loads((place / file).read_text())
        (place / file).write_text(json.dumps(settings | {"eos_token_id": [257, end]}))
        theirs = transformers.LlamaForCausalLM.from_pretrained(place).eval()
        expected = theirs.generate(prompt, **how)[0, prompt.shape[1] :].tolist()
        assert expected[-1] == end
        data = corpora()["text"] | {"path": str(tmp_path / "text"), "cache": str(tmp_path)}
        run = pretrained_run(place, data | {"tokenizer": None}, tmp_path / file)
        for path in (place, run.path):
            model = load_language_model(path)
            written = model.decode(expected[:-1])
            assert model.generate("and then", tokens=9) == written
            assert model.generate_many(["and then"], tokens=9) == [written]
        (place / file).write_text(json.dumps(settings))


def test_passkeys_prompts_begin_so_and_are_no_longer(words, beginning, tmp_path, monkeypatch):
    """A passkey's prompt has as many tokens as its length says, the first of which begins it."""
    import zoo.tasks.passkey as passkey

    seen = []
    answer = passkey._answer
    monkeypatch.setattr(passkey, "_answer", lambda *args: seen.append(args[1]) or answer(*args))
    options = ["task=passkey", "task.passkey.lengths=[128]", "task.passkey.repeats=1"]
    place = [word for word in words[1:] if not word.startswith("task")]
    assert main([f"checkpoint={beginning}", *place, *options]) == 0
    assert (seen[0][:, 0] == 257).all()
    assert seen[0].shape[1] == 128 - passkey.DIGITS


def test_an_export_begins_texts_as_its_run_does(words, beginning, checkpoint, tmp_path):
    for place in (beginning, checkpoint):
        runs = [f"runs={tmp_path / place.name}", *[w for w in words[1:] if "runs=" not in w]]
        assert main([f"checkpoint={place}", *runs]) == 0
        (run,) = (path.parent for path in (tmp_path / place.name).glob("*/run.json"))
        to = tmp_path / f"{place.name} out"
        export(RunFolder.open(run), to)
        theirs = transformers.AutoTokenizer.from_pretrained(to)
        assert theirs.encode("and then") == load_language_model(run).encode("and then")
        assert theirs.encode("and then") == load_language_model(to).encode("and then")


def test_a_checkpoint_is_made_smaller_and_reads_from_a_quantized_cache(words, tmp_path):
    from zoo.cli.shrink import main as shrink

    assert main(words) == 0
    (path,) = (path for path in (tmp_path / "runs").glob("*") if (path / "run.json").is_file())
    assert shrink([f"run={path}", "rank=4", f"to={tmp_path / 'smaller'}"]) == 0
    kept = ("report=", "logger=")
    own = [word for word in words if word.startswith(kept)]
    more = ["task=speed", "task.speed.lengths=[300]", "kv_cache=int4"]
    assert main([*own, f"run={tmp_path / 'smaller'}", *more]) == 0
    rows = (tmp_path / "smaller" / "results.jsonl").read_text().splitlines()
    assert {json.loads(row)["dtype"] for row in rows} == {"float32, int4 KV cache"}


def test_a_checkpoint_teaches_a_run_of_its_tokens(checkpoint, words, tmp_path):

    place = [word for word in words if word.startswith("data.")]
    tokens = [f"data.tokenizer={checkpoint / 'tokenizer.json'}", "data.end_token=257"]
    small = ["model=mamba", "size=tiny", "match=none", "seq_len=32", "batch_tokens=64"]
    more = ["trainer.max_steps=2", f"runs={tmp_path / 'runs'}", "name=student", "logger=none"]
    teach = ["data=text", *place, *tokens, *small, *more, f"distil.teacher={checkpoint}"]
    assert train(teach) == 0
    record = RunFolder.open(tmp_path / "runs" / "student").info["teacher"]
    assert record["run"] == str(checkpoint)
    assert len(record["weights"]) == 64


@pytest.mark.parametrize("option", ["checkpoint", "finetune"])
def test_an_extension_that_does_not_act_is_refused_before_the_text_is_read(
    option, tmp_path, monkeypatch, capsys
):
    def read(*_):
        raise AssertionError("the text was read")

    checkpoints = pytest.importorskip("checkpoints")  # transformers
    monkeypatch.setattr("zoo.training.pretrained.open_data", read)
    checkpoints.save(tmp_path / "mamba", "mamba")
    (tmp_path / "books").mkdir()
    (tmp_path / "books/a.txt").write_text("text " * 100)
    words = [f"{option}={tmp_path / 'mamba'}", f"data.path={tmp_path / 'books'}"]
    words += ["data.tokenizer=bytes", "extension=pi", "extension.factor=2", "logger=none"]
    program = main if option == "checkpoint" else train
    assert program([*words, f"runs={tmp_path / 'runs'}"]) == 2
    assert "extension=pi: acts on positions=" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
