"""An extension is judged for all runs before the first of them is measured."""

import logging

import pytest
from building import ARCHITECTURES
from test_evaluate import run_eval, run_folder

from zoo.config.compose import compose
from zoo.errors import UserError
from zoo.model.build import build_model
from zoo.runs.folder import RunFolder
from zoo.tasks import measured_run
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


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_stream_is_refused_before_the_weights_are_read_of_every_state_that_grows(
    name, tmp_path, monkeypatch
):
    read = []
    for what in ("open_data", "load"):
        monkeypatch.setattr(measured_run, what, lambda *_, what=what: read.append(what))
    words = [f"model={name}", "size=tiny", "size.layers=3", "match=none", "seq_len=64"]
    folder = RunFolder.create(tmp_path / "a", compose("train", words), {"status": "done"})
    model = build_model(folder.config, 8)[0]
    said = ""
    try:
        run_eval([folder], "task=stream")
    except UserError as error:
        said = str(error)
    assert ("its state grows with the text, to" in said) == (not model.recurrent), said
    assert bool(read) == model.recurrent
