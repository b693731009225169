"""`eval.py checkpoint=`: a pretrained model is a run like any other, and measured like one."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from building import write_byte_level, write_text

from zoo.cli.eval import main
from zoo.runs.folder import RunFolder

transformers = pytest.importorskip("transformers")
SLOPES = ["extension=alibi_interpolation", "extension.factor=2"]
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
    from zoo.cli.train import main as train

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
