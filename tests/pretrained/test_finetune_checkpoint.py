"""`train.py finetune=<checkpoint>`: every family, every extension: trained, resumed, measured."""

import json
from pathlib import Path

import pytest
import torch
from building import counting, write_byte_level
from checkpoints import CASES, transformers

from zoo.cli.eval import main as measure
from zoo.cli.train import check
from zoo.cli.train import main as train
from zoo.config.compose import compose_tree, composing, parse, plain
from zoo.model.checkpoint import load
from zoo.runs.folder import RunFolder

TOKENS, LENGTH = 259, 64  # of the tokenizer, the last of which ends a text
ROWS = 264  # of the embedding, more as those of Pythia and Qwen have
EXTENSIONS = ["none", "pi", "ntk", "yarn", "clex", "pose", "longrope"]
FAMILIES = {  # the first case of each, and those whose rotary positions are their own
    **{transformers_name: case for case, (transformers_name, _) in reversed(CASES.items())},
    "llama, yarn": "llama, yarn",
    "mistral, sliding": "mistral, sliding",
    "Gemma3Text": "gemma3, scaled",  # which has a layer that sees the whole text
}
SHORT = ["batch_tokens=256", "optim.warmup_steps=1", "logger=none", "valid_every=2"]
SHORT += ["valid_windows=2", "trainer.accelerator=cpu"]
QUICK = [("Llama", "clex"), ("Mamba", "pi"), ("llama, yarn", "pi"), ("mistral, sliding", "pi")]


def write_checkpoint(folder: Path, case: str) -> Path:
    """A tiny model of random weights with a tokenizer that begins texts, as `save` has it."""
    family, options = CASES[case]
    torch.manual_seed(0)
    more = {"vocab_size": ROWS, "eos_token_id": TOKENS - 1, "pad_token_id": 0}
    config = getattr(transformers, f"{family}Config")(**(options | more))
    name = family.removesuffix("Text")
    getattr(transformers, f"{name}ForCausalLM")(config).save_pretrained(folder)
    write_byte_level(folder, ("t", "h"), ("e", "n"), begins=True)
    return folder


def acts_on(family: str, extension: str) -> bool:
    """Whether the extension goes with the family: it has rotary attention, and what chooses
    positions or follows the text's length goes with no window of its own."""
    recurrent = ("Mamba", "Mamba2", "FalconMamba", "Rwkv", "RecurrentGemma")  # or local
    if family == "mistral, sliding":
        return extension in ("none", "pi", "ntk", "yarn")
    return extension == "none" or family not in recurrent


@pytest.mark.parametrize(
    ("family", "extension"),
    [
        pytest.param(
            *(family, extension),
            marks=[] if (family, extension) in QUICK else pytest.mark.slow,
        )
        for family in FAMILIES
        for extension in EXTENSIONS
    ],
)
def test_a_checkpoint_is_tuned_resumed_and_measured_or_the_line_says_why_not(
    family, extension, tmp_path, capsys
):
    place = write_checkpoint(tmp_path / "model", FAMILIES[family])
    (tmp_path / "text").mkdir()
    for name, start in (("a", 0), ("b", 3000), ("c", 6000)):
        (tmp_path / "text" / f"{name}.txt").write_text(counting(start, 400))
    runs = [f"runs={tmp_path / 'runs'}", f"data.cache={tmp_path / 'cache'}"]
    text = [f"data.path={tmp_path / 'text'}", *runs]
    words = [f"extension={extension}"]
    if extension != "none":
        # of the length before the checkpoint's own scaling, a quarter of a window
        words += [f"extension.factor={8 if family == 'llama, yarn' else 2}"]
    if family in ("Mamba", "Mamba2", "FalconMamba", "RecurrentGemma"):
        words += [f"seq_len={LENGTH}"]  # their configurations say none
    if extension == "longrope":
        pairs = {"GPTNeoX": 2}.get(family) or CASES[FAMILIES[family]][1].get("head_dim", 8) // 2
        words += [f"extension.scaling.long_factors={[1.0 + i / pairs for i in range(pairs)]}"]
    tune = [f"finetune={place}", *text, *words, *SHORT, "name=tuned", "trainer.max_steps=2"]
    code = train([word.replace(", ", ",") for word in tune])
    said = capsys.readouterr().err.strip().splitlines()[-1]
    if not acts_on(family, extension):
        assert code == 2
        assert "extension" in said
        assert not (tmp_path / "runs" / "tuned").exists()
        return
    assert code == 0, said
    run = tmp_path / "runs" / "tuned"
    assert train([f"resume={run}", "trainer.max_steps=3"]) == 0
    folder = RunFolder.open(run)
    assert (folder.info["status"], folder.info["step"]) == ("done", 3)
    base = RunFolder.open(folder.config.finetune)
    assert base.config.checkpoint == str(place)
    assert folder.config.data.options["bos_token"] == base.config.data.options["bos_token"]
    before, after = load(base), load(folder)
    assert any(
        not torch.equal(one, other)
        for one, other in zip(before.parameters(), after.parameters(), strict=False)
    )
    lengths = f"task.perplexity.lengths=[{LENGTH},{2 * LENGTH}]"
    options = ["task=perplexity", lengths, "task.perplexity.units=2", "logger=none", "report=null"]
    assert measure([f"run={run}", *options]) == 0
    rows = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    assert {row["length"] for row in rows} == {LENGTH, 2 * LENGTH}
    assert {row["status"] for row in rows} == {"ok"}


def test_adapters_fit_an_embedding_of_more_rows_than_the_tokenizer_has_tokens(tmp_path):
    """Trained, resumed and explained; and a run that was tuned whole goes on without its base."""
    place = write_checkpoint(tmp_path / "model", "llama")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text(counting(0, 900))
    where = [f"finetune={place}", f"data.path={tmp_path / 'text'}", f"runs={tmp_path / 'runs'}"]
    where += [f"data.cache={tmp_path / 'cache'}", "trainer.max_steps=2", *SHORT]
    assert train([*where, "lora.rank=2", "name=adapters", "--explain"]) == 0
    for name, more in (("adapters", ["lora.rank=2"]), ("whole", [])):
        assert train([*where, *more, f"name={name}"]) == 0
        run = RunFolder.open(tmp_path / "runs" / name)
        base = Path(run.config.finetune or "")
        if name == "whole":
            base.rename(tmp_path / "gone")
        assert train([f"resume={run}", "trainer.max_steps=3"]) == 0
        assert load(RunFolder.open(run.path)).vocab_size == ROWS


def test_every_option_of_data_beside_a_checkpoint_is_its_texts(tmp_path):
    """Whether data=text is given or follows from data.path."""
    place = write_checkpoint(tmp_path / "model", "llama")
    (tmp_path / "text").mkdir()
    for number in range(3):
        (tmp_path / "text" / f"{number}.txt").write_text(counting(number, 900))
    where = [f"finetune={place}", f"data.path={tmp_path / 'text'}", f"runs={tmp_path / 'runs'}"]
    words = [
        *where,
        f"data.cache={tmp_path / 'c'}",
        "data.passkey=0.5",
        "data.eval_documents=joined",
    ]
    found = []
    for named in ([], ["data=text"]):
        with composing("train"):
            tree = compose_tree("train", parse([*words, *named]))
            config = check(tree, [word.partition("=")[0] for word in [*words, *named]])
        found.append(plain(config)["data"])
    assert found[0] == found[1]
    assert (found[0]["passkey"], found[0]["eval_documents"]) == (0.5, "joined")


def test_what_cannot_be_tuned_is_refused_in_one_line_before_anything_is_written(tmp_path, capsys):
    place = write_checkpoint(tmp_path / "model", "llama")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text(counting(0, 900))
    runs = [f"runs={tmp_path / 'runs'}", "logger=none"]
    cases = {
        "data.path": [f"finetune={place}", f"data.path={tmp_path / 'nowhere'}", *runs],
        "no such run folder": [f"finetune={tmp_path / 'nowhere'}", *runs],
        "tokenizer": [f"finetune={place}", f"data.path={tmp_path / 'text'}", *runs],
    }
    for said, words in cases.items():
        if said == "tokenizer":
            (place / "tokenizer.json").unlink()
        assert train(words) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert said in lines[-1]
        assert not (tmp_path / "runs").exists()
