"""A training run against a plain loop written here: which windows, which loss, which step.

The loop knows AdamW, clipping, warm-up and cosine from their papers, the windows from the text
itself; from the package it takes the model and the order of the windows alone.
"""

import csv
import itertools
import math
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from building import counting, train_config
from torch import Tensor, nn

from zoo.config.compose import compose
from zoo.config.schema.train import TrainConfig
from zoo.data.masking import mask_windows
from zoo.data.order import stream_restarts, window_starts
from zoo.model import checkpoint
from zoo.model.backbone import Backbone
from zoo.model.build import build_model
from zoo.runs.claim import claim
from zoo.runs.folder import RunFolder
from zoo.training import fit

SEED, WINDOW, ROWS, STEPS = 5, 24, 3, 7
OPTIM = {
    "lr": 2e-2,
    "weight_decay": 0.7,
    "betas": "[0.8,0.95]",
    "eps": 1e-4,  # large enough to show, and to keep rounding from growing
    "warmup_steps": 3,
    "min_lr_ratio": 0.2,
    "clip": 0.3,  # of gradients whose norm is above 1 at first
}


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """Three splits; the training text is 5 windows and a few tokens in each of 3 rows."""
    folder = tmp_path_factory.mktemp("text")
    for split, words in (
        ("train", counting(0, 40)[:365]),
        ("valid", counting(90, 60)),
        ("test", "x" * 99),
    ):
        (folder / split).mkdir(parents=True)
        (folder / split / "a.txt").write_text(words)
    return folder


def run(
    text: Path,
    place: Path,
    *words: str,
    pauses: Sequence[int] = (),
    parts: Sequence[int] = (1,),
    **options,
) -> RunFolder:
    """A run that pauses after these steps; its parts take turns in the micro-batches of a step."""
    trainer = {"max_steps": STEPS, "log_every_n_steps": 1, "accelerator": "cpu", "devices": 1}
    given = {
        "size": "tiny",
        "match": "none",
        "logger": "none",
        "data": "text",
        "data.path": text,
        "data.cache": text.parent / "cache",
        "runs": place / "runs",
        "seed": SEED,
        "seq_len": WINDOW,
        "batch_size": ROWS,
        "valid_every": 100,
        "trainer.precision": "32-true",
        **{f"trainer.{name}": value for name, value in trainer.items()},
        **{f"optim.{name}": value for name, value in OPTIM.items()},
        **options,
    }
    words = (*(f"{name}={value}" for name, value in given.items()), *words)
    folder = claim(train_config(*words))
    for until, micro in zip((*pauses, None), itertools.cycle(parts), strict=False):
        more = [f"trainer.accumulate_grad_batches={micro}"] * (micro > 1)
        fit.train(train_config(*words, *more), folder, until)
    return folder


def trained(folder: RunFolder) -> dict[str, Tensor]:
    return checkpoint.trained_weights(folder)


def logged(folder: RunFolder, column: str) -> list[float]:
    with open(folder.path / "metrics.csv") as file:
        return [float(row[column]) for row in csv.DictReader(file)]


def windows(text: Path, step: int, contiguous: bool) -> Tensor:
    tokens = np.frombuffer((text / "train/a.txt").read_bytes(), np.uint8).astype(np.int64)
    tokens = np.append(tokens, 0)  # the end of a document is the byte 0
    starts = window_starts(len(tokens), WINDOW, ROWS, SEED, step, contiguous)
    return torch.from_numpy(np.stack([tokens[s : s + WINDOW + 1] for s in starts]))


def rate(step: int) -> float:
    """Of steps 0, 1, ..: up in equal steps, full at once after them, then half a cosine."""
    if step < 3:
        return 2e-2 * (1, 2, 3)[step] / 3
    done = (step - 3) / (STEPS - 3)
    return 2e-2 * (0.2 + 0.8 * (1 + math.cos(math.pi * done)) / 2)


class AdamW:
    """Loshchilov & Hutter 2019, algorithm 2, with a gradient clipped to a norm before."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = list(model.parameters())
        self.m = [torch.zeros_like(p) for p in self.parameters]
        self.v = [torch.zeros_like(p) for p in self.parameters]
        self.taken = 0

    def step(self, gradients: list[Tensor], lr: float) -> float:
        norm = torch.stack([g.double().square().sum() for g in gradients]).sum().sqrt().item()
        scale = min(1.0, 0.3 / norm)
        self.taken += 1
        for p, m, v, g in zip(self.parameters, self.m, self.v, gradients, strict=True):
            g = g * scale
            if p.ndim >= 2 and not hasattr(p, "no_weight_decay"):
                p.mul_(1 - lr * 0.7)
            m.mul_(0.8).add_(0.2 * g)
            v.mul_(0.95).add_(0.05 * g * g)
            mean, square = m / (1 - 0.8**self.taken), v / (1 - 0.95**self.taken)
            p.sub_(lr * mean / (square.sqrt() + 1e-4))
        return norm


def model_of(config: TrainConfig) -> Backbone:
    torch.manual_seed(SEED)
    return build_model(config, 256 + (config.objective == "masked"))[0]


def losses_by_hand(model: Backbone, text: Path, kind: str) -> Iterator[Tensor]:
    """Of one step after another, whose gradients are taken before the next is computed."""
    state = None
    for step in count():
        tokens = windows(text, step, kind == "carry")
        if kind == "carry":
            if stream_restarts(366, WINDOW, ROWS, SEED, step).any():
                state = model.empty_state(ROWS)
            loss, state = model.loss(tokens, state)
            state = model.truncate_state(state, WINDOW)
        elif kind == "masked":
            keys = [(SEED, step, row) for row in range(ROWS)]
            masked = mask_windows(tokens[:, :-1].numpy(), 256, keys)
            shown, chosen = (torch.from_numpy(x) for x in masked)
            log_p = model(shown)[chosen].log_softmax(-1)
            loss = -log_p.gather(1, tokens[:, :-1][chosen][:, None]).mean()
        else:
            log_p = model(tokens[:, :-1]).log_softmax(-1)
            loss = -log_p.gather(2, tokens[:, 1:, None]).mean()
        yield loss


KINDS = {"plain": [], "carry": ["state_passing=carry"], "masked": ["objective=masked"]}
IN_PARTS = f"trainer.accumulate_grad_batches={ROWS}"  # each window on its own: the same step


@pytest.mark.parametrize("parts", [[], [IN_PARTS]], ids=["whole", "accumulated"])
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("mamba", "plain"),
        ("mamba", "carry"),
        ("transformer", "plain"),
        ("transformer", "carry"),
        ("transformer", "masked"),
    ],
)
def test_a_run_is_the_plain_loop(name, kind, parts, text, tmp_path):
    folder = run(text, tmp_path, f"model={name}", *KINDS[kind], *parts)
    model = model_of(folder.config)
    optimiser, losses, norms = AdamW(model), [], []
    of_steps = losses_by_hand(model, text, kind)
    for step in range(STEPS):
        loss = next(of_steps)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            norms.append(optimiser.step([*gradients], rate(step)))
        losses.append(loss.item())
    assert max(norms) > 1, "nothing was clipped"
    assert logged(folder, "train_loss") == pytest.approx(losses, rel=1e-5)
    assert logged(folder, "grad_norm") == pytest.approx(norms, rel=1e-3)
    assert logged(folder, "learning_rate") == pytest.approx([rate(i) for i in range(STEPS)])
    for key, weight in trained(folder).items():
        torch.testing.assert_close(weight, model.state_dict()[key], rtol=1e-3, atol=2e-5)
    assert folder.info["tokens_per_step"] == ROWS * WINDOW
    assert folder.info["tokens_seen"] == STEPS * ROWS * WINDOW
    assert logged(folder, "tokens") == [(i + 1) * ROWS * WINDOW for i in range(STEPS)]


@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_a_run_that_pauses_ends_as_the_unbroken_one(optim, text, tmp_path):
    words = {"model": "mamba", "optim": optim, "valid_every": 2}
    whole = run(text, tmp_path / "whole", **words)
    parts = run(text, tmp_path / "parts", **words, pauses=[2, 4])
    assert logged(parts, "train_loss") == logged(whole, "train_loss")
    assert logged(parts, "learning_rate") == logged(whole, "learning_rate")
    for key, weight in trained(whole).items():
        assert torch.equal(weight, trained(parts)[key])


@pytest.mark.parametrize("parts", [(1, ROWS), (ROWS, 1)])
def test_a_run_goes_on_in_other_micro_batches_after_any_step(parts, text, tmp_path):
    # A gradient near 0 is all rounding, of which AdamW with a small eps makes a step of full size.
    how = {"model": "mamba", "optim.eps": 1e-2}
    whole = run(text, tmp_path / "whole", **how)
    other = run(text, tmp_path / "parts", pauses=[1, 2, 4, 5], parts=parts, **how)
    for column in ("train_loss", "grad_norm"):
        assert logged(other, column) == pytest.approx(logged(whole, column), rel=1e-5)
    for key, weight in trained(whole).items():
        torch.testing.assert_close(trained(other)[key], weight, rtol=1e-5, atol=1e-6)


def test_the_state_carried_is_what_makes_the_difference(text, tmp_path):
    """The same windows without it have other losses, but for those where a text begins anew."""
    config = run(text, tmp_path, "model=mamba", "state_passing=carry").config
    model = model_of(config)
    restarts = [stream_restarts(366, WINDOW, ROWS, SEED, step).any() for step in range(STEPS)]
    assert restarts.count(True) == 2  # the first step and the end of the rows' text
    assert restarts[0]
    state = None
    for step, restart in enumerate(restarts):
        tokens = windows(text, step, True)
        state = model.empty_state(ROWS) if restart else state
        loss, state = model.loss(tokens, state)
        state = model.truncate_state(state, WINDOW)
        apart = abs(loss.item() - model.loss(tokens).item())
        assert (apart < 1e-6) == bool(restart), step


def test_validation_is_the_mean_over_fixed_windows_spread_evenly(text, tmp_path):
    folder = run(text, tmp_path, "model=transformer", valid_windows=11, valid_every=3)
    tokens = np.frombuffer((text / "valid/a.txt").read_bytes(), np.uint8).astype(np.int64)
    tokens = np.append(tokens, 0)
    starts = np.arange(11) * (len(tokens) - WINDOW - 1) // 10
    rows = torch.from_numpy(np.stack([tokens[s : s + WINDOW + 1] for s in starts]))
    with torch.no_grad():
        wanted = checkpoint.load(folder).loss(rows).item()
    with open(folder.path / "metrics.csv") as file:
        found = [row["valid_loss"] for row in csv.DictReader(file)]
    assert [step + 1 for step, value in enumerate(found) if value] == [3, 6, 7]
    assert float(found[-1]) == pytest.approx(wanted, rel=1e-5)


def test_the_defaults_are_the_documented_ones():
    """README's optimiser; a change of these changes every published number."""
    config = compose("train", [])
    assert isinstance(config, TrainConfig)
    optim = config.optim.model_dump()
    assert optim == {
        "lr": 1e-3,
        "weight_decay": 0.1,
        "betas": (0.9, 0.95),
        "eps": 1e-8,
        "warmup_steps": 100,
        "min_lr_ratio": 0.1,
        "clip": 1.0,
    }
