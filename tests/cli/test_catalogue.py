"""README's tables of what can be chosen are those that the YAML headers make."""

import re
from pathlib import Path

import pytest

from zoo.cli.catalogue import COLUMNS, citations, main, table, updated
from zoo.cli.listing import KINDS

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
LINKED = ("models", "extensions", "recipes", "compressions")
WITHOUT_PAPER = {"none", "window", "learned", "lstm", "ntk", "dynamic_ntk", "llama3"}
WITHOUT_PAPER |= {"rerope", "leaky_rerope"}


MADE_ANEW = (
    "README's tables do not list what configs/ has, as after every new YAML (of a private model, "
    "too). Run python -m zoo.cli.catalogue README.md."
)


def test_the_readme_is_up_to_date():
    text = README.read_text(encoding="utf-8")
    if updated(text) != text:  # not an assertion on the whole text, whose message would be as long
        pytest.fail(MADE_ANEW)


def test_the_recipes_name_the_command_that_makes_the_tables_anew():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"Run (python -m \S+ README\.md)", MADE_ANEW)
    for title in ("Add an architecture", "Before a pull request"):
        section = text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
        assert command in " ".join(section.split()), title


def test_the_readme_has_a_table_of_all_that_can_be_chosen_or_opened():
    found = re.findall(r"<!-- catalogue: (\w+) -->", README.read_text(encoding="utf-8"))
    kinds = ["models", "extensions", "recipes", "corpora", "tasks", "compressions", "families"]
    assert found == kinds


@pytest.mark.parametrize("kind", COLUMNS)
def test_every_choice_has_a_row_with_a_sentence(kind):
    rows = [line.split(" | ") for line in table(kind).splitlines()[2:]]
    names = {row[0].strip("| `") for row in rows}
    assert names == {file.stem for file in (ROOT / "configs" / KINDS[kind]).glob("*.yaml")}
    assert all(len(row[1].strip(" |")) > 15 for row in rows)


@pytest.mark.parametrize("kind", LINKED)
def test_every_published_choice_links_to_its_paper(kind):
    for line in table(kind).splitlines()[2:]:
        name = line.split("`")[1]
        assert name in WITHOUT_PAPER or "](https://arxiv.org/abs/" in line, name


@pytest.mark.parametrize(
    ("source", "cited"),
    [
        ('Gu & Dao 2023, "Mamba 2024", section 3 (arXiv 2312.00752)', "Gu & Dao 2023"),
        ("Su 2021 (arXiv 2104.09864); Sun 2022 (arXiv 2212.10554)", "Su 2021, Sun 2022"),
        ("Hochreiter 1997, in Neural Computation", "Hochreiter 1997"),
        ("yours", ""),
    ],
)
def test_citations_are_authors_and_years_with_their_own_links(source, cited):
    found = citations(source)
    assert re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", found) == cited
    assert found.count("arxiv.org") == source.count("arXiv")


def test_a_new_choice_is_in_the_table_after_one_command(tmp_path, monkeypatch):
    import zoo.cli.catalogue as catalogue

    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text(
        "# A model | of mine, width^2.\n# Time  O(t)\nx: 1\n"
    )
    monkeypatch.setattr(catalogue, "shipped", lambda _: tmp_path)
    file = tmp_path / "README.md"
    file.write_text("before\n<!-- catalogue: models -->\nold\n<!-- end -->\nafter\n")
    assert main([str(file)]) == 0
    row = "| `mine` | A model \\| of mine, width². |  | O(t) |  |\n"
    assert row in file.read_text()
    assert "old" not in file.read_text()
    assert file.read_text().endswith("<!-- end -->\nafter\n")
