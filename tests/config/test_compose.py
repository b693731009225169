"""What options and YAML files mean: sizes, hybrids, positions, parts, names of runs."""

import shutil
from pathlib import Path

import pytest

from zoo.config.compose import SCHEMAS, compose
from zoo.config.introspect import target_parameters
from zoo.config.sizes import read_count
from zoo.errors import UserError
from zoo.runs.folder import RunFolder
from zoo.runs.identity import run_name

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("text", "meaning"),
    {"512": 512, "64k": 65536, "64K": 65536, "1M": 2**20, "65_536": 65536, "2**16": 65536}.items(),
)
def test_sizes_are_what_people_write(text, meaning):
    assert read_count(text) == meaning
    assert compose("train", [f"seq_len={text}"]).seq_len == meaning


@pytest.mark.parametrize("text", ["64kk", "k", "2**", "2**2**2", "1e", "0x10", "", "_1", "1__0"])
def test_what_only_resembles_a_size_is_refused(text):
    with pytest.raises(ValueError, match="whole number"):
        read_count(text)


def test_sizes_are_read_in_lists_and_in_the_arguments_of_the_zoo():
    lengths = ["task.perplexity.lengths=[512,4k]"]
    part = compose("eval", ["run=x", "task=perplexity", *lengths]).task["perplexity"]
    assert part.options["lengths"] == [512, 4096]
    mixer = compose("train", ["model=mamba", "model.mixer.inner_width=1k"]).model.blocks[0].mixer
    assert mixer.options["inner_width"] == 1024


def test_a_yaml_file_that_changes_is_read_again_and_nobody_changes_what_is_kept(
    tmp_path, monkeypatch
):
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    for module in ("zoo.config.compose", "zoo.config.groups"):
        monkeypatch.setattr(f"{module}.CONFIGS", tmp_path / "configs")
    file = tmp_path / "configs/optim/adamw.yaml"
    optim = compose("train", ["optim.lr=1e-2"]).optim
    found = compose("train", []).optim
    assert (optim.lr, found.lr) == (1e-2, 1e-3)
    file.write_text(file.read_text().replace("lr: 1.0e-3", "lr: 0.125"))
    assert compose("train", []).optim.lr == 0.125


def test_arguments_are_read_from_the_source():
    found = target_parameters("zoo.mixers.feed_forward.SwiGLU")
    assert found == ["hidden_width", "bias", "activation"]
    with pytest.raises(UserError, match="there is no"):
        target_parameters("zoo.mixers.nowhere.Mixer")


def test_batch_size_comes_from_the_tokens_unless_given():
    assert compose("train", ["seq_len=512", "batch_tokens=8192"]).batch_size == 16
    assert compose("train", ["seq_len=64k", "batch_tokens=8192"]).batch_size == 1
    assert compose("train", ["seq_len=64k", "batch_size=3"]).batch_size == 3


MODELS = sorted(path.stem for path in ROOT.glob("configs/model/*.yaml"))


@pytest.mark.parametrize("name", MODELS)
def test_every_model_composes_and_survives_its_own_record(name, tmp_path):
    config = compose("train", [f"model={name}", "seq_len=64"])
    assert config.model.name == name
    assert RunFolder.create(tmp_path / "run", config, {}).config == config


HOME = "zoo.positions."


def test_positions_act_in_the_mixer_or_at_the_embedding():
    inside, outside = compose("train", ["model=alibi"]), compose("train", ["model=learned"])
    assert inside.model.blocks[0].mixer.options["positions"] == {"_target_": f"{HOME}alibi.ALiBi"}
    assert inside.model.embedding_positions is None
    assert outside.model.blocks[0].mixer.options["positions"] == {
        "_target_": f"{HOME}none.NoPositions"
    }
    assert outside.model.embedding_positions.target == f"{HOME}learned.Learned"
    assert outside.model.embedding_positions.options == {"max_length": outside.seq_len}


def test_a_hybrid_is_its_parts_in_turn():
    words = ["model=hybrid", "model.pattern=[mamba,alibi]", "size=tiny"]
    mamba, alibi = compose("train", words).model.blocks
    assert mamba == compose("train", ["model=mamba", "size=tiny"]).model.blocks[0]
    assert alibi == compose("train", ["model=alibi", "size=tiny"]).model.blocks[0]


def test_hybrid_is_short_for_its_pattern_and_repeats_layers():
    short = compose("train", ["hybrid=[2*mamba,alibi]", "size=tiny"])
    words = ["model=hybrid", "model.pattern=[mamba,mamba,alibi]", "size=tiny"]
    assert short == compose("train", words)
    assert short == compose("train", ["model=hybrid", "hybrid=[2*mamba,alibi]", "size=tiny"])


def test_parts_load_with_their_arguments():
    block = compose("train", ["size=tiny", "model.feed_forward.hidden_width=32"]).model.blocks[0]
    assert block.feed_forward is not None
    assert block.feed_forward.load()(width=8).down_proj.weight.shape == (8, 32)


def test_the_same_options_give_the_same_name_wherever_they_run():
    name = run_name(compose("train", ["model=mamba"]))
    assert name.startswith("mamba-small-512-stdlib-s0-")
    for same in ["threads=1", "workers=2", "logger=none", "trainer.devices=1", "runs=elsewhere"]:
        assert run_name(compose("train", ["model=mamba", same])) == name
    for other in ["seed=1", "optim.lr=1", "model.mixer.state_size=8", "trainer.max_steps=7"]:
        assert run_name(compose("train", ["model=mamba", other])) != name


@pytest.mark.parametrize("value", ["${nope}", "[[a]]"])
@pytest.mark.parametrize("program", ["train", "eval"])
def test_what_hydra_refuses_of_an_option_names_that_option_alone(program, value):
    others = {"train": ["model=mamba", "threads=1"], "eval": ["run=x", "task=perplexity"]}[program]
    given = {word.partition("=")[0] for word in others}
    for key in sorted({*SCHEMAS[program].model_fields, "hydra.nope"} - given):
        with pytest.raises(UserError) as refused:
            compose(program, [*others, f"{key}={value}"])
        message = str(refused.value)
        assert message.startswith(key), message
        assert not [word for word in others if word in message], message
