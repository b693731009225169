"""Training: killed and resumed it is the unbroken run; what goes wrong is said, never hidden."""

import csv
import functools
import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from building import ROOT, train_config, write_text
from lightning.pytorch.callbacks import Timer
from torch.utils._pytree import tree_leaves

from zoo.errors import NonFiniteError, UserError
from zoo.model import checkpoint
from zoo.model.backbone import Backbone
from zoo.model.build import build_model, count_parameters
from zoo.runs.claim import claim
from zoo.runs.folder import RunFolder
from zoo.runs.stopping import Stop
from zoo.training import fit
from zoo.training.callbacks import MetricsLogger
from zoo.training.learner import Learner

TINY = ["size=tiny", "data=text", "seq_len=32", "batch_tokens=128", "logger=none", "match=none"]


@pytest.fixture
def text(tmp_path) -> Path:
    """A little corpus: three splits of counting prose."""
    return write_text(tmp_path, 900)


def arguments(text: Path, *more: str) -> list[str]:
    return [*TINY, f"data.path={text}", f"data.cache={text.parent}/cache", *more]


def program(*words: str, cwd: Path, **options) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "train.py"), *words]
    return subprocess.Popen(
        command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )


def losses(folder: Path) -> dict[int, tuple[str, str]]:
    """Step -> (loss, gradient norm) as metrics.csv spells them: equal text, equal bits."""
    with open(folder / "metrics.csv") as file:
        return {
            int(row["step"]): (row["train_loss"], row["grad_norm"])
            for row in csv.DictReader(file)
            if row["train_loss"]
        }


def weights(folder: RunFolder) -> dict[str, torch.Tensor]:
    return torch.load(folder.checkpoint(), weights_only=True)["state_dict"]


def wait_for(condition, process: subprocess.Popen, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "the run never got there"
        time.sleep(0.02)


def test_sigterm_saves_first_and_says_so(text, tmp_path):
    words = arguments(
        text, "name=run", "trainer.max_steps=100000", "save_every=100000", "valid_every=100000"
    )
    running = program(*words, "trainer.log_every_n_steps=1", cwd=tmp_path)
    metrics = tmp_path / "runs/run/metrics.csv"
    wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 5, running)
    running.send_signal(signal.SIGTERM)
    output, _ = running.communicate(timeout=60)
    assert running.returncode not in (0, 2), output
    folder = RunFolder.open(tmp_path / "runs/run")
    assert folder.info["status"] == "stopped"
    assert "SIGTERM" in folder.info["reason"]
    assert folder.info["step"] == max(losses(folder.path))
    assert folder.checkpoint() is not None
    assert "Traceback" not in output


def run_here(text: Path, *more: str) -> RunFolder:
    config = train_config(*arguments(text, f"runs={text.parent}/runs", *more))
    folder = claim(config)
    fit.train(config, folder)
    return folder


def test_a_loss_that_is_no_number_stops_with_step_batch_and_last_checkpoint(text, monkeypatch):
    loss = Backbone.loss
    calls = iter(range(100))

    def broken(self, *given, **more):
        value = loss(self, *given, **more)
        return value * math.nan if self.training and next(calls) == 5 else value

    monkeypatch.setattr(Backbone, "loss", broken)
    with pytest.raises(
        NonFiniteError,
        match=r"loss is nan at step 6, batch [0-9a-f]{12}; last good checkpoint: .*00000004\.ckpt",
    ):
        run_here(text, "trainer.max_steps=10", "save_every=4", "name=lost")


def test_a_broken_gradient_never_reaches_the_weights(text, monkeypatch):
    def poisoned(self, *given, **more):
        value = loss(self, *given, **more)
        if self.training:
            value.register_hook(lambda g: g * math.inf)
        return value

    loss = Backbone.loss
    monkeypatch.setattr(Backbone, "loss", poisoned)
    with pytest.raises(NonFiniteError, match=r"gradient norm is (nan|inf) at step 1"):
        run_here(text, "trainer.max_steps=3", "name=lost")


def test_weights_load_back_and_score_as_they_did(text):
    folder = run_here(text, "trainer.max_steps=40", "name=good", "optim.warmup_steps=1")
    model = checkpoint.load(folder)
    assert not model.training
    assert count_parameters(model) == folder.info["parameters"]
    with open(folder.path / "metrics.csv") as file:
        logged = float([row["valid_loss"] for row in csv.DictReader(file)][-1])
    from zoo.data.corpora import open_corpus
    from zoo.data.loader import valid_batch

    corpus = open_corpus(folder.config.data.model_dump(), text.parent / "cache")
    batch = valid_batch(corpus.valid, 32, folder.config.valid_windows)
    assert float(model.loss(batch["tokens"])) == pytest.approx(logged, rel=1e-5)
    assert logged < math.log(256) - 1


def test_an_encoder_learns_what_was_masked(text):
    words = ["objective=masked", "trainer.max_steps=60", "optim.warmup_steps=1"]
    folder = run_here(text, *words, "name=encoder")
    model = checkpoint.load(folder)
    assert not model.causal
    assert model.vocab_size == 257  # the bytes and the mask token
    with open(folder.path / "metrics.csv") as file:
        logged = [float(row["valid_loss"]) for row in csv.DictReader(file) if row["valid_loss"]]
    assert logged[-1] < math.log(256) - 1


@pytest.mark.parametrize("step", [2, 4, 5])
@pytest.mark.parametrize("times", [1, 2])
def test_a_validation_that_a_stop_cut_short_is_made_up_for(step, times, text, monkeypatch):
    """After the last step, too, where nothing is left to train."""
    words = ["trainer.max_steps=5", "valid_every=2", "save_every=2", "trainer.log_every_n_steps=1"]
    stop, validate = Stop(), MetricsLogger._validate
    monkeypatch.setattr(fit, "current", lambda: stop)
    cuts = iter(range(times))

    def cut(self, trainer, module):
        at = max(trainer.global_step, self.reached)
        if at >= step and next(cuts, None) is not None:
            stop.requested = "SIGTERM"
        return validate(self, trainer, module)

    def figures(folder: RunFolder) -> list[tuple[str, str]]:
        with open(folder.path / "metrics.csv") as file:
            return [(row["step"], row["valid_loss"]) for row in csv.DictReader(file)]

    whole = run_here(text, *words, "name=uncut")
    monkeypatch.setattr(MetricsLogger, "_validate", cut)
    for _ in range(times):
        with pytest.raises(KeyboardInterrupt):
            run_here(text, *words, "name=cut")
        stop.requested = None
    folder = run_here(text, *words, "name=cut")
    assert figures(folder) == figures(whole)
    assert folder.info["status"] == "done"


def test_a_stop_between_two_micro_batches_goes_on_from_the_states_of_the_step(text, monkeypatch):
    """As `trainer.max_time` stops: what was read of the next step is read again."""
    words = ["model=mamba", "state_passing=carry", "trainer.accumulate_grad_batches=2"]
    words += ["trainer.max_steps=4", "trainer.max_time=00:01:00:00"]
    whole = run_here(text, *words, "name=uncut")

    def stop(_, trainer, *__):
        trainer.should_stop = trainer.fit_loop.epoch_loop.total_batch_idx == 4

    with monkeypatch.context() as patch:
        patch.setattr(Timer, "on_train_batch_end", stop)
        folder = run_here(text, *words, "name=cut")
    assert (folder.info["status"], folder.info["step"]) == ("stopped", 2)
    folder = run_here(text, *words, "name=cut")
    assert folder.info["status"] == "done"
    assert all(map(torch.equal, weights(folder).values(), weights(whole).values()))


def test_an_encoder_predicts_only_what_was_chosen(tiny):
    model = tiny("transformer", "objective=masked")
    shown = torch.randint(32, (2, 20))
    tokens, chosen = shown.clone(), torch.zeros(2, 20, dtype=torch.bool)
    chosen[0, 3] = chosen[1, 7] = True
    loss = model.masked_loss(shown, tokens, chosen)
    log_p = model(shown).log_softmax(-1)
    expected = -(log_p[0, 3, tokens[0, 3]] + log_p[1, 7, tokens[1, 7]]) / 2
    torch.testing.assert_close(loss, expected)


def test_run_json_holds_what_a_comparison_needs(text):
    folder = run_here(text, "trainer.max_steps=2", "name=said", "model=mamba")
    info = json.loads((folder.path / "run.json").read_text())
    assert info["status"] == "done"
    assert info["flops_per_token"] > 2 * info["parameters"] * 0.5
    assert info["backends"]["selective_scan"] in ("native", "torch")
    assert len(info["fingerprint"]) == 64
    assert info["tokens_per_step"] == 128


def test_a_full_disk_leaves_the_last_checkpoint_whole(text, monkeypatch):
    save, writes = torch.save, iter(range(10))

    def full(*words, **options):
        if next(writes) == 1:
            raise OSError(28, "No space left on device")
        return save(*words, **options)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\)"):
        run_here(text, "trainer.max_steps=9", "save_every=3", "name=full")
    folder = RunFolder.open(text.parent / "runs/full")
    assert folder.checkpoint().name == "step=00000003.ckpt"
    assert len(list((folder.path / "checkpoints").iterdir())) == 1


@functools.cache
def parameters(*overrides: str) -> int:
    with torch.device("meta"):
        return count_parameters(build_model(train_config(*overrides), 256)[0])


@pytest.mark.parametrize("size", ["tiny", "small", pytest.param("base", marks=pytest.mark.slow)])
def test_arms_matched_by_parameters_are_within_one_percent(size, architecture):
    reference = parameters("model=transformer", f"size={size}", "match=none")
    found = parameters(f"model={architecture}", f"size={size}", "match=params", "seq_len=128")
    assert abs(found - reference) <= 0.01 * reference


def test_parameters_are_counted_once_though_two_layers_share_them():
    """The transformer of size tiny by hand; its head is its embedding."""
    model, _ = build_model(train_config("model=transformer", "size=tiny", "match=none"), 256)
    width, hidden = 64, 168
    of_layer = 4 * width**2 + 3 * width * hidden + 2 * width
    assert count_parameters(model) == 256 * width + 2 * of_layer + width


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_layers_are_as_many_as_come_nearest_before_widths_are_matched(size):
    with torch.device("meta"):
        reference, _ = build_model(train_config("model=transformer", f"size={size}"), 256)
        _, knobs = build_model(train_config("model=mamba", f"size={size}"), 256)
        apart = {}
        for layers in range(knobs["layers"] - 1, knobs["layers"] + 2):
            words = ["model=mamba", f"size={size}", "match=none", f"size.layers={layers}"]
            count = count_parameters(build_model(train_config(*words), 256)[0])
            apart[layers] = abs(count - count_parameters(reference))
    assert min(apart, key=apart.__getitem__) == knobs["layers"]


def test_what_cannot_be_matched_is_refused_with_both_counts():
    config = train_config("model=learned", "size=tiny", "seq_len=64k")
    with pytest.raises(UserError, match=r"within 1 % \(nearest [\d,]+\)\. Use match=none"):
        build_model(config, 256)


def test_the_learning_rate_warms_up_and_falls_along_a_cosine(tiny):
    optim = train_config("optim.warmup_steps=10", "optim.min_lr_ratio=0.1").optim
    module = Learner(model=tiny("nope"), optim=optim, max_steps=110, seq_len=8)
    factor = module.learning_rate_factor
    assert factor(0) == pytest.approx(0.1)
    assert factor(9) == pytest.approx(1.0)
    assert factor(10) == pytest.approx(1.0)
    assert factor(60) == pytest.approx(0.55)
    assert factor(110) == pytest.approx(0.1)


def test_windows_that_carry_their_state_read_as_one_long_window(architecture, tiny):
    """Two windows with state passing see what one of twice the length sees, and learn apart."""
    model = tiny(architecture)
    tokens = torch.randint(32, (2, 129))
    whole = model.loss(tokens)
    first, state = model.loss(tokens[:, :65], model.empty_state(2))
    carried = model.truncate_state(state, 128)
    leaves = [leaf for leaf in tree_leaves(carried) if isinstance(leaf, torch.Tensor)]
    assert not any(leaf.requires_grad for leaf in leaves)
    second = model.loss(tokens[:, 64:], carried)[0]
    torch.testing.assert_close((first + second) / 2, whole, rtol=1e-10, atol=1e-12)
    alone = model.loss(tokens[:, 64:])
    assert abs(second - alone) > 1e-6, "what it carries changes nothing"


@pytest.mark.parametrize("held", [3, 5])
def test_a_validation_text_of_fewer_windows_is_said(held, monkeypatch, capfd):
    monkeypatch.setattr(fit, "validation", lambda *_: {"tokens": torch.zeros(held, 33)})
    config = train_config("size=tiny", "seq_len=32", "valid_windows=5")
    fit._callbacks(config, RunFolder(Path("none")), None, 0)  # type: ignore[arg-type]
    said = "valid_windows=5: the validation text holds 3 of 32 tokens\n"
    assert capfd.readouterr().err == said * (held < 5)
