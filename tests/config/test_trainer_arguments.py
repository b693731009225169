"""Every argument of Lightning's Trainer is carried through to the run, or refused by name."""

import inspect

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ProgressBar, Timer
from lightning.pytorch.strategies import DDPStrategy

from zoo.config.compose import compose, composing, parse
from zoo.config.effects import check_effects
from zoo.config.schedule import learning_rate_factor
from zoo.config.schema.train import TrainConfig
from zoo.config.schema.trainer import Trainer
from zoo.config.stored import as_now
from zoo.config.trainer_arguments import OWN_ARGUMENTS, TRAINER_OWNED, TRAINER_REFUSED
from zoo.config.validate import plain, validate
from zoo.errors import UserError
from zoo.runs.folder import RunFolder
from zoo.training.fit import train

ARGUMENTS = [name for name in inspect.signature(lightning.Trainer).parameters if name != "self"]
CARRIED = set(Trainer.model_fields)


def test_each_argument_is_carried_through_owned_or_refused_and_nothing_twice():
    """A new argument of Lightning fails here until it is decided."""
    decided = [*CARRIED, *TRAINER_OWNED, *TRAINER_REFUSED]
    assert sorted(decided) == sorted([*ARGUMENTS, *OWN_ARGUMENTS])


@pytest.fixture(scope="module")
def tree() -> dict:
    """What `python train.py` composes."""
    return plain(compose("train", []))


@pytest.mark.parametrize("value", ["0", "1", "-1", "true", "null", "-inf", "1k", "foo", "[1]"])
def test_the_others_are_refused_by_name_whatever_their_value(value, tree):
    names = sorted({*TRAINER_OWNED, *TRAINER_REFUSED})
    with composing("train"):
        overrides = parse([f"trainer.{name}={value}" for name in names])
    for name, override in zip(names, overrides, strict=True):
        changed = tree | {"trainer": tree["trainer"] | {name: override.value()}}
        with pytest.raises(UserError, match=rf"^trainer\.{name}=.*\. Leave it out\.$"):
            validate(TrainConfig, changed)


@pytest.mark.parametrize("name", sorted({*TRAINER_OWNED, *TRAINER_REFUSED}))
def test_the_others_are_refused_on_a_command_line(name):
    with pytest.raises(UserError, match=rf"^trainer\.{name}=1: .*\. Leave it out\.$"):
        compose("train", [f"trainer.{name}=1"])


def test_an_argument_that_nobody_decided_is_refused(monkeypatch):
    monkeypatch.setattr("zoo.config.schema.trainer.trainer_parameters", lambda: ["brand_new"])
    monkeypatch.setattr("zoo.config.compose.trainer_parameters", lambda: ["brand_new"])
    with pytest.raises(UserError, match=r"^trainer\.brand_new=1: not accepted, "):
        compose("train", ["trainer.brand_new=1"])


def has_callback(kind: type):
    return lambda trainer: any(isinstance(one, kind) for one in trainer.callbacks)


EFFECTS = {  # argument: a value unlike the default, and what the Trainer then is
    "max_steps": ("3", lambda t: t.max_steps == 3),
    "precision": ("bf16-mixed", lambda t: t.precision == "bf16-mixed"),
    "accelerator": ("cpu", lambda t: t.strategy.root_device.type == "cpu"),
    "devices": ("1", lambda t: t.num_devices == 1),
    "strategy": ("ddp", lambda t: isinstance(t.strategy, DDPStrategy)),
    "checkpoint": (
        "sharded trainer.strategy=fsdp",
        lambda t: any(getattr(one, "divided", None) == "sharded" for one in t.callbacks),
    ),
    "num_nodes": ("2", lambda t: t.num_nodes == 2),
    "sequence_parallel": ("2", lambda t: t.num_devices == 2),
    "accumulate_grad_batches": ("3", lambda t: t.accumulate_grad_batches == 3),
    "max_time": ("00:00:00:07", has_callback(Timer)),
    "log_every_n_steps": ("7", lambda t: t.log_every_n_steps == 7),
    "deterministic": ("warn", lambda _: torch.is_deterministic_algorithms_warn_only_enabled()),
    "benchmark": ("true", lambda _: torch.backends.cudnn.benchmark),
    "detect_anomaly": ("true", lambda t: t._detect_anomaly),
    "enable_progress_bar": ("true", has_callback(ProgressBar)),
}


def test_every_argument_that_is_carried_through_has_its_effect_below():
    assert set(EFFECTS) == CARRIED


@pytest.fixture
def text(tmp_path):
    """A folder of text to train on."""
    (tmp_path / "text").mkdir()
    for number in range(4):
        (tmp_path / "text" / f"{number}.txt").write_text(f"{number} words to read. " * 60)
    return f"data.path={tmp_path / 'text'}"


@pytest.mark.parametrize("name", EFFECTS)
def test_the_trainer_is_as_the_argument_says(name, tmp_path, text, monkeypatch):
    monkeypatch.chdir(tmp_path)
    value, holds = EFFECTS[name]
    found = []

    def stop(trainer, *_, **__):
        found.append(holds(trainer))
        raise StopIteration

    monkeypatch.setattr(lightning.Trainer, "fit", stop)
    words = ["size=tiny", "seq_len=32", "batch_size=2", "data=text", text, "logger=none"]
    config = compose("train", [*words, *f"trainer.{name}={value}".split()])
    try:
        with pytest.raises(StopIteration):
            train(config, RunFolder.create(tmp_path / "run", config, {}))
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = False
        torch.autograd.set_detect_anomaly(False)
    assert found == [True]


def test_run_folders_with_arguments_that_did_nothing_still_open():
    tree = plain(compose("train", ["model=mamba", "trainer.log_every_n_steps=3"]))
    ignored = {"min_steps": 5, "gradient_clip_algorithm": "norm", "overfit_batches": 0.0}
    stored = {
        **tree,
        "trainer": {**tree["trainer"], **ignored, "deterministic": "maybe", "devices": -1},
    }
    stored["model"]["blocks"][0]["mixer"]["dt_rank"] = 0  # was read as null
    config = validate(TrainConfig, as_now(stored))
    assert config.trainer.model_dump() == {
        **tree["trainer"],
        "precision": "32-true",
        "log_every_n_steps": 3,
    }
    assert config.model.blocks[0].mixer.options["dt_rank"] is None


@pytest.mark.parametrize(
    ("words", "message"),
    {
        "trainer.benchmark=true": "trainer.benchmark=true: acts on CUDA alone",
        "trainer.benchmark=false": "",
        "optim.min_lr_ratio=0.3 optim.warmup_steps=20": "optim.min_lr_ratio=0.3: acts on steps",
        "optim.min_lr_ratio=0.3 optim.warmup_steps=19": "optim.min_lr_ratio=0.3: acts on steps",
        "optim.min_lr_ratio=0.3 optim.warmup_steps=18": "",
    }.items(),
)
def test_an_option_that_would_do_nothing_in_this_run_is_refused(words, message):
    given = ["trainer.max_steps=20", "trainer.accelerator=cpu", *words.split()]
    config = compose("train", given)
    keys = [word.partition("=")[0] for word in given]
    low = config.optim.model_copy(update={"min_lr_ratio": 0.2})
    acts = len({learning_rate_factor(one, 20, 19) for one in (config.optim, low)}) == 2
    if not message:
        check_effects(config, {}, keys)
        assert acts or "optim.min_lr_ratio" not in keys
        return
    with pytest.raises(UserError) as error:
        check_effects(config, {}, keys)
    assert str(error.value).startswith(message)
    assert not acts or "optim.min_lr_ratio" not in keys
