"""An extension is judged for all runs before the first of them is measured."""

import logging

import pytest
from test_evaluate import run_eval, run_folder

from zoo.config.compose import compose
from zoo.errors import UserError
from zoo.runs.folder import RunFolder
from zoo.tasks.extensions import check_extension

WIDE = ["extension=window", "extension.attention.window=64"]
LINE = "extension.attention.window=64: must be from 1 to 32, within the trained length."


def judge(folders, *words: str) -> None:
    config = compose("eval", ["run=any", *words])
    check_extension(config.extension, folders, config.kv_cache)


def test_a_bad_option_of_every_run_is_refused_before_any_is_measured(tmp_path, caplog):
    caplog.set_level(logging.INFO, "zoo")
    folders = [run_folder(tmp_path / name, f"seed={seed}") for seed, name in enumerate("ab")]
    with pytest.raises(UserError) as refused:
        run_eval(folders, *WIDE)
    assert str(refused.value) == LINE
    assert not any("measuring" in line for line in caplog.messages)


def test_one_run_that_it_fits_is_enough(tmp_path):
    longer, about = compose("train", ["size=tiny", "seq_len=64"]), {"status": "done"}
    short, long = run_folder(tmp_path / "a"), RunFolder.create(tmp_path / "b", longer, about)
    judge([short, long], *WIDE)
    judge([long], *WIDE)
    with pytest.raises(UserError, match="extension=dca: acts on positions=alibi, rope"):
        judge([run_folder(tmp_path / "c", "model=mamba")], "extension=dca")
    with pytest.raises(UserError, match=r"long_factors=null: must be searched for the model\."):
        judge([short, long], "extension=longrope", "extension.factor=4")


def test_bits_of_a_cache_are_judged_with_it(tmp_path):
    folders = [run_folder(tmp_path / "a"), run_folder(tmp_path / "b", "model=mamba")]
    judge(folders, "kv_cache=int8")
    rule = r"^kv_cache=int8: acts on the cache of layers of SoftmaxAttention, .* are of Mamba"
    with pytest.raises(UserError, match=rule):
        judge(folders[1:], "kv_cache=int8")
    with pytest.raises(UserError, match=r"^kv_cache=int8: leaves the last 128 tokens as they are"):
        judge(folders[:1], "kv_cache=int8", *WIDE[:1], "extension.attention.window=32")
