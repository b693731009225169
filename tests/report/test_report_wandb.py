"""The mirror: offline without a key, never a question, blocks that need no package."""

import builtins
import json
import logging

import pytest
from synthetic import experiment, score_row

from zoo.errors import UserError
from zoo.report.wandb import by_length, mirror, report_blocks, save_report


def test_metrics_are_those_of_the_rows():
    rows = [score_row("mamba", 512, bits, seed=bits) for bits in (1, 3)]
    rows.append(score_row("mamba", 1024, 9.0) | {"status": "failed"})
    assert by_length(rows, []) == {512: {"bits_per_byte/half_tail/mamba": 2.0}}


def test_without_a_key_rows_are_mirrored_offline_and_that_is_said(
    tmp_path, monkeypatch, caplog, rows
):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("it asked"))
    with caplog.at_level(logging.WARNING, "zoo"):
        folder = mirror(rows, [], tmp_path / "mirror", "online")
    assert folder.is_relative_to(tmp_path / "mirror")
    assert folder.name.startswith("offline-run-")
    assert "no W&B key" in caplog.text
    assert list(folder.glob("*.wandb"))
    (table,) = folder.rglob("*.table.json")
    assert len(json.loads(table.read_text())["data"]) == len(rows)


def test_blocks_hold_the_table_and_the_limits():
    blocks = report_blocks(experiment(), [])
    assert "transformer-alibi" in next(b["code"] for b in blocks if b["block"] == "CodeBlock")
    assert any("not tuned" in block.get("text", "") for block in blocks)


def test_saving_without_the_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb_workspaces", None)
    with pytest.raises(UserError, match="pip install wandb-workspaces"):
        save_report([], [])
