"""Tables of papers, mechanically: every file's rows are measured of a tiny checkpoint."""

import re

import pytest
import torch
import yaml
from building import ROOT, write_byte_level, write_text

from zoo.__main__ import main
from zoo.cli.paper import TABLES
from zoo.config.compose import compose

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A text, and a tiny Llama for 256 tokens and one for 1024, as the widest window is."""
    folder = tmp_path_factory.mktemp("paper")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "vocab_size": 258}
    for length in (256, 1024):
        sizes |= {"max_position_embeddings": length}
        config = transformers.LlamaConfig(**sizes, eos_token_id=257)
        transformers.LlamaForCausalLM(config).save_pretrained(folder / f"model-{length}")
        write_byte_level(folder / f"model-{length}", ("t", "h"), begins=True)
    write_text(folder, 600)
    return folder


@pytest.mark.parametrize("name", TABLES)
def test_every_row_of_every_table_composes_and_has_a_number_for_each_length(name):
    table = yaml.safe_load((ROOT / "configs" / "papers" / f"{name}.yaml").read_text())
    for row in table["rows"]:
        words = [*table["words"], f"{table['option']}={table['lengths']}".replace(" ", "")]
        compose("eval", ["run=x", *words, *row["words"]])
        assert len(row["published"]) == len(table["lengths"])
        if row["name"] != "plain":  # the model as it came, of which a paper may have no number
            assert any(number is not None for number in row["published"])


@pytest.mark.parametrize("name", TABLES)
def test_a_table_has_ours_beside_theirs(name, place, capsys):
    table = yaml.safe_load((ROOT / "configs" / "papers" / f"{name}.yaml").read_text())
    length = max([256, *map(int, re.findall(r"window=(\d+)", str(table["rows"])))])
    words = [f"checkpoint={place / f'model-{length}'}", f"data.path={place / 'text'}"]
    words += [f"data.cache={place / 'cache'}", f"runs={place / 'runs'}"]
    words += ["task.perplexity.units=1", "task.perplexity.unit=1024", "lengths=[256,512]"]
    if "units" in str(table["words"]):
        words.remove("task.perplexity.units=1")
    if "stride" not in str(table["words"]):
        words = [word for word in words if "stride" not in word]
    assert main(["paper", name, *words]) == 0
    printed = capsys.readouterr().err.splitlines()
    lines = printed[-len(table["rows"]) - 1 :]
    assert "256" in lines[0]
    for row, line in zip(table["rows"], lines[1:], strict=True):
        assert line.startswith(row["name"])
        theirs = [number for number in row["published"] if number is not None]
        assert all(f"({number:.2f})" in line for number in theirs)
        assert (f"needs {row.get('run')}=" in line) == ("run" in row)
        values = [word for word in line[len(row["name"]) :].split() if word[0].isdigit()]
        assert "run" in row or len([v for v in values if float(v.split()[0]) > 1]) >= 2


def test_the_numbers_are_those_of_the_command_and_of_no_other_measurement(place, capsys):
    words = ["paper", "dca_pg19", f"checkpoint={place / 'model-256'}", "lengths=[256]"]
    words += [f"data.path={place / 'text'}", f"data.cache={place / 'cache'}"]
    words += [f"runs={place / 'again'}", "task.perplexity.unit=1024"]

    def table(*others: str) -> list[str]:
        assert main([*words, *others]) == 0
        return capsys.readouterr().err.splitlines()[-2:]

    first = table("task.perplexity.units=1")
    assert table("task.perplexity.units=2") != first
    assert table("task.perplexity.units=1") == first


def test_what_cannot_be_measured_is_refused_in_one_line(capsys):
    for words in ([], ["no_such_table"], ["dca_pg19"]):
        assert main(["paper", *words]) == 2
        assert capsys.readouterr().err.count("\n") == 1
