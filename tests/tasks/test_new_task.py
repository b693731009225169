"""CONTRIBUTING.md's task costs two files, and every part of the report shows it."""

import pytest
from building import carry_out, found_in

EVALUATION = """
import json, sys
from pathlib import Path
import test_evaluate as driver
import zoo.tasks.measured_run
from fakes import Remembers
from zoo.report.rows import gather
from zoo.report.wandb import by_length
from zoo.report.wandb_report import report_blocks

model = Remembers(memory=5)
zoo.tasks.measured_run.load = lambda folder, *_: model
zoo.tasks.measured_run.open_data = lambda data, seq_len: driver.CORPUS
here = Path(sys.argv[1])
folders = [driver.run_folder(here / "a"), driver.run_folder(here / "b", "model=mamba")]
words = ["task=exact", f"report={here}/report.html", "logger=none"]
driver.SMALL, driver.PERPLEXITY = ["run=any"], []
code, said, rows = driver.run_eval(folders, *words)
read = model.read
again, *_ = driver.run_eval(folders, *words)
found = {"code": code, "said": said, "rows": rows, "read_again": model.read - read}
there = {"entity": "e", "project": "p", "evaluation": "i"}
found |= {"metrics": by_length(rows, []), "blocks": report_blocks(gather(rows, []), **there)}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    """What an evaluation with the new task gave, in a copy of the package with the two files."""
    return found_in(carry_out("Add a task", tmp_path_factory.mktemp("package")), EVALUATION)


def test_its_rows_are_in_the_runs_results_with_its_settings_and_declaration(found):
    assert found["code"] == 0
    assert [row["length"] for row in found["rows"]] == [32, 64, 128] * 2
    for row in found["rows"]:
        assert (row["status"], row["task"]) == ("ok", "exact")
        assert row["task.exact.windows"] == 8
        assert row["question"] == ["length", "split", "task.exact.windows"]
        quantity, cost = row["declares"]["quantities"]
        assert (quantity["better"], quantity["form"]) == ("higher", "share")
        assert cost["unit"] == "tokens per second"


def test_what_is_known_is_not_measured_again(found):
    assert found["read_again"] == 0


def test_the_terminal_has_its_table_with_direction_unit_and_chance(found):
    lines = found["said"].splitlines()
    head = lines.index("Tokens predicted (higher is better). Chance: 6%.")
    assert lines[head + 1].split() == ["arm", "32", "64", "128"]
    assert lines[head + 2].split()[0] == "transformer"
    assert all(cell.endswith("%") for cell in lines[head + 2].split()[1:])
    assert "Exact reading, tokens per second (higher is better)." in lines


def test_the_page_and_the_pictures_draw_it(found):
    page = (found["folder"] / "report.html").read_text()
    assert "<h2>Exact predictions against test length</h2>" in page
    assert "The share of tokens of the test text that the model finds likeliest." in page
    assert 'id="spec-exact-exact"' in page
    assert 'id="spec-exact-tokens_per_second"' in page
    pictures = {path.name for path in (found["folder"] / "report").iterdir()}
    assert pictures == {"exact.png", "overview.png", "speed.png"}


def test_wandb_has_it_as_metrics_and_in_the_report(found):
    row = found["rows"][0]
    assert found["metrics"]["32"]["exact/exact/transformer"] == row["exact"]
    texts = [each["text"] for each in found["blocks"] if each["block"] == "MarkdownBlock"]
    assert any("Tokens predicted (higher is better). Chance: 6%." in text for text in texts)
