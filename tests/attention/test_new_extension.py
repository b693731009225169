"""CONTRIBUTING.md's extension costs two files: a class and a YAML, and everything else finds it."""

import pytest
from building import carry_out, found_in

EVALUATION = """
import json, sys
from pathlib import Path

import torch
import test_evaluate as driver
import zoo.cli.training_free
import zoo.tasks.measured_run
from zoo.cli.listing import listing
from zoo.cli.patterns import _distances
from zoo.cli.training_free import training_free
from zoo.errors import UserError
from zoo.model.build import build_model

here = Path(sys.argv[1])
folder = driver.run_folder(here / "a")
torch.manual_seed(0)
zoo.tasks.measured_run.load = lambda *_: build_model(folder.config, vocab_size=16)[0].eval()
zoo.tasks.measured_run.open_data = lambda data, seq_len: driver.CORPUS
zoo.cli.training_free.choices = lambda _: ["slow_distances"]  # one of all, to be quick
words = [f"report={here}/report.html", "logger=none"]
driver.run_eval([folder], *words)
code, said, rows = driver.run_eval([folder], *words, "extension=slow_distances")
refused = ""
try:
    driver.run_eval([folder], "extension=slow_distances", "extension.attention.shrink=0.5")
except UserError as error:
    refused = str(error)
print(json.dumps({
    "code": code, "said": said, "rows": rows, "refused": refused,
    "listed": listing(["extensions"]), "training_free": list(training_free("8")),
    "row": _distances(["extension=slow_distances"])[20, :21].tolist(),
}))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    """What the programs say of the extension, in a copy of the package with the two files."""
    return found_in(carry_out("Add an extension", tmp_path_factory.mktemp("package")), EVALUATION)


def test_it_is_measured_and_its_rows_say_under_which_settings(found):
    assert found["code"] == 0
    rows = [row for row in found["rows"] if row["extension"] == "slow_distances"]
    assert {row["length"] for row in rows} == {32, 64}
    for row in rows:
        assert row["status"] == "ok"
        assert row["extension_options"]["attention.shrink"] == 8.0


def test_the_terminal_and_the_report_show_it_beside_the_model_alone(found):
    page = (found["folder"] / "report.html").read_text()
    for text in (found["said"], page):
        assert "transformer + slow_distances" in text


def test_it_is_listed_compared_and_drawn(found):
    assert "let farther ones grow slowly (Leaky ReRoPE)." in found["listed"]
    assert ["extension=slow_distances"] in found["training_free"]  # make length-extension reads it
    window, shrink = 12, 8  # half of the 24 tokens that the drawn model was trained on
    near, far = range(window), range(window, 21)
    expected = [*near, *(window + (apart - window) / shrink for apart in far)]
    assert found["row"] == expected[::-1]


def test_a_setting_it_refuses_is_reported_as_it_is_typed(found):
    assert found["refused"] == "extension.attention.shrink=0.5: must be >= 1."
