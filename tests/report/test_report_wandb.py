"""The mirror: offline without a key, never a question, the same numbers as the rows."""

import base64
import builtins
import json
import logging
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from synthetic import run_records, score_row

import zoo.report.wandb
from zoo.report import write_report
from zoo.report.wandb import by_length, mirror


def test_metrics_are_those_of_the_rows():
    rows = [score_row("mamba", 512, bits, seed=bits) for bits in (1, 3)]
    rows.append(score_row("mamba", 1024, 9.0) | {"status": "failed"})
    assert by_length(rows, []) == {
        512: {
            "perplexity/bits_per_byte/half_tail/mamba": 2.0,
            "perplexity/state_bytes/mamba": 65536,
        }
    }


def test_without_a_key_rows_are_mirrored_offline_and_that_is_said(
    tmp_path, monkeypatch, caplog, rows
):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("it read the keyboard"))
    with caplog.at_level(logging.WARNING, "zoo"):
        folder = mirror(rows, [], tmp_path / "mirror", "online")
    assert folder.is_relative_to(tmp_path / "mirror")
    assert folder.name.startswith("offline-run-")
    assert "no W&B key" in caplog.text
    assert list(folder.glob("*.wandb"))
    (table,) = folder.rglob("*.table.json")
    assert len(json.loads(table.read_text())["data"]) == len(rows)


@pytest.fixture
def logged(monkeypatch) -> dict:
    """What a W&B run is begun with and given, without W&B's process behind it."""
    found: dict = {}

    @contextmanager
    def begin(mode, **about):
        found.update(about, mode=mode)
        run = SimpleNamespace(dir="w/files", define_metric=lambda *_, **__: None)
        run.log = found.update
        yield run

    monkeypatch.setattr(zoo.report.wandb, "begin", begin)
    return found


def test_the_evaluations_run_has_a_name_the_options_the_figures_and_the_report(
    logged, tmp_path, rows
):
    html = tmp_path / "july.html"
    write_report(rows, run_records(rows), html)
    mirror(rows, run_records(rows), tmp_path, config={"split": "test"}, report=html)
    assert logged["name"] == "perplexity, speed, stream of 4 runs"
    assert logged["config"] == {"split": "test"}
    assert logged["job_type"] == logged["group"] == "evaluation"
    assert {"figures/bits_per_byte", "figures/speed", "report"} <= logged.keys()
    assert "rows" in logged
    assert html.read_text() == logged["report"].html
    picture = base64.b64encode((tmp_path / "july/speed.png").read_bytes()).decode()
    assert picture in logged["figures/speed"].html


def test_an_evaluation_without_a_report_is_mirrored_without_one(logged, tmp_path):
    rows = [score_row("mamba", 512, 2.0), score_row("mamba", 512, 2.0, task="x", requested=False)]
    mirror(rows, [], tmp_path)
    assert logged["name"] == "perplexity of mamba-0"
    assert "report" not in logged
