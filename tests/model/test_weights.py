"""Weights in the form that is requested: what is kept, what it computes, what rows say of it."""

import json
import logging
import sys
from pathlib import Path

import pytest
import torch
from building import train_on_text
from checkpoints import CASES, VOCAB, opened, save

from zoo.cli.eval import main
from zoo.errors import UserError
from zoo.model.language_model import load_language_model
from zoo.model.weights import choose_weights
from zoo.pretrained.weights import stored_dtype

QUICK = ["llama", "mistral, sliding", "mamba2", "gemma3"]
HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize(
    "case",
    [pytest.param(one, marks=[] if one in QUICK else pytest.mark.slow) for one in CASES],
)
@pytest.mark.parametrize("dtype", HALVES, ids=["bf16", "fp16"])
def test_a_checkpoint_in_half_precision_computes_as_transformers_in_it(case, dtype, tmp_path):
    """To what rounding leaves: as far from float32 as `transformers` is, at most three times."""
    theirs = save(tmp_path, case).to(dtype)
    theirs.save_pretrained(tmp_path)
    as_stored, wide = opened(tmp_path, None), opened(tmp_path)
    assert stored_dtype(tmp_path) == str(dtype).removeprefix("torch.")
    assert {weight.dtype for weight in as_stored.parameters()} == {dtype}
    tokens = torch.randint(0, VOCAB, (2, 40))
    with torch.no_grad():
        expected, exact = theirs(tokens, use_cache=False).logits.float(), wide(tokens)
    off = (expected - exact).abs().amax()
    assert (as_stored(tokens).float() - exact).abs().amax() <= 3 * off
    state, parts = as_stored.empty_state(2), []
    for part in tokens.split(17, 1):
        logits, state = as_stored(part, state)
        parts.append(logits.float())
    assert (torch.cat(parts, 1) - exact).abs().amax() <= 3 * off


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's list of mapped files")
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_what_is_kept_as_it_is_stored_is_mapped_from_its_files(dtype, tmp_path):
    save(tmp_path, "llama, tied").to(dtype).save_pretrained(tmp_path, max_shard_size="20KB")
    model = opened(tmp_path, None)
    mapped = [
        [int(end, 16) for end in line.split()[0].split("-")]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if str(tmp_path) in line
    ]
    assert len(mapped) > 1
    for name, weight in model.named_parameters():
        assert any(start <= weight.data_ptr() < end for start, end in mapped), name


def test_the_default_is_what_the_device_is_made_for_and_is_said(tmp_path, caplog):
    config = load_config(tmp_path)
    accelerator, cpu = torch.device("cuda"), torch.device("cpu")
    with caplog.at_level(logging.INFO, "zoo"):
        assert choose_weights(None, config, cpu) == "float32"
        assert choose_weights(None, config, accelerator) == "bfloat16"
    assert len(caplog.records) == 2
    assert "weights=stored" in caplog.text
    assert "weights=float32" in caplog.text
    assert choose_weights("stored", config, cpu) == "bfloat16"
    for given in ("float32", "float16", "int8", "int4"):
        assert choose_weights(given, config, accelerator) == given
    assert len(caplog.records) == 2


def load_config(folder: Path):
    from zoo.config.compose import compose

    save(folder, "llama").bfloat16().save_pretrained(folder)
    return compose("train").model_copy(update={"checkpoint": str(folder)})


def test_a_dtype_that_is_not_read_is_refused(tmp_path):
    from safetensors.torch import save_file

    save(tmp_path, "llama")
    weights = {"one": torch.ones(4).to(torch.float8_e4m3fn)}
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="F8_E4M3"):
        stored_dtype(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(UserError, match="damaged"):
        stored_dtype(tmp_path)


def test_rows_say_the_dtype_and_a_trained_run_is_measured_in_any(tmp_path):
    train_on_text(tmp_path, "trainer.max_steps=2", f"runs={tmp_path / 'runs'}")
    (run,) = (path.parent for path in (tmp_path / "runs").glob("*/run.json"))
    options = ["task.perplexity.lengths=[32]", "task.perplexity.units=2", "logger=none"]
    kinds = [None, "stored", "float32", "bfloat16", "float16"]
    for weights in kinds:
        more = [] if weights is None else [f"weights={weights}"]
        assert main([f"run={run}", "task=perplexity", *options, "report=null", *more]) == 0
    rows = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    assert {row["status"] for row in rows} == {"ok"}
    scores = {row["dtype"]: row["bits_per_byte"] for row in rows if row["protocol"] == "blocks"}
    assert [*scores] == ["float32", "bfloat16", "float16"]
    assert len(rows) == 6  # null, stored and float32 are one
    assert all(abs(score - scores["float32"]) < 0.02 for score in scores.values())
    assert scores["bfloat16"] != scores["float32"]
    model = load_language_model(run, weights="bfloat16")
    assert {one.dtype for one in model.backbone.parameters()} == {torch.bfloat16}
    assert model.logits("1 and").dtype == torch.float32
