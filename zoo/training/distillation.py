"""Trains a model on what another one predicts (Hinton 2015, section 2, arXiv 1503.02531).

    loss = (1 - w) CE(targets) + w T^2 KL(softmax(z_teacher / T) || softmax(z / T))

per token, w = `weight` and T = `temperature`. The paper's soft term is a cross-entropy, which
differs from the divergence by the teacher's entropy, a constant: gradients are the same.
Validation is the plain loss.

A model may have more tokens than its tokenizer, as padded checkpoints have: the soft term is over
those of the tokenizer, whose probabilities add to 1 in both.

The teacher reads the same tokens as the student, in its own precision and without gradients.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from zoo.config.schema.train import Distil, TrainConfig
from zoo.config.validate import plain
from zoo.data.tokenizers import bos_of, open_tokenizer
from zoo.errors import refuse
from zoo.model.arithmetic import arithmetic
from zoo.model.backbone import Backbone
from zoo.model.build import count_parameters
from zoo.model.checkpoint import load
from zoo.model.flops import forward_flops
from zoo.model.pretrained import identify, load_pretrained
from zoo.ops.dtypes import wide_dtype
from zoo.pretrained.checkpoint import read_checkpoint
from zoo.pretrained.options import pretrained_config
from zoo.runs.claim import weights_of
from zoo.runs.folder import RunFolder


@dataclass(frozen=True)
class Teacher:
    """A trained model, the name of its tokenizer, the options of data that give the same one (where
    they are known) and what identifies its weights."""

    model: Backbone
    tokenizer: str
    options: Mapping[str, Any]
    weights: str
    precision: str


@dataclass(frozen=True)
class Distillation:
    """The loss of a student."""

    teacher: Teacher
    how: Distil
    vocab_size: int  # of the tokenizer

    def loss(self, student: Backbone, tokens: Int[Tensor, "b t1"]) -> Tensor:
        """The mean over tokens 1.., each predicted from those before it; see the module."""
        model = self.teacher.model.to(tokens.device)
        kind, precision = tokens.device.type, self.teacher.precision
        plain_numbers = torch.autocast(kind, enabled=False)  # the student's may be on
        with torch.no_grad(), plain_numbers, arithmetic(model, precision, tokens.device):
            taught = model(tokens[:, :-1])
        found = student(tokens[:, :-1])
        taught = taught[..., : self.vocab_size].clone()
        loss = distillation_loss(found, taught, tokens[:, 1:], self.how)
        return student.with_auxiliary(loss)

    def facts(self, seq_len: int) -> dict[str, Any]:
        """The entry of run.json about the teacher."""
        model = self.teacher.model
        return {
            "run": self.how.teacher,
            "weights": self.teacher.weights,
            "parameters": count_parameters(model),
            "flops_per_token": forward_flops(model, seq_len),
        }


def distillation_loss(
    logits: Float[Tensor, "b t v"],
    taught: Float[Tensor, "b t w"],
    targets: Int[Tensor, "b t"],
    how: Distil,
) -> Tensor:
    """The loss by its formula, in float32 or better; the soft term of the first w <= v tokens."""
    wide = wide_dtype(logits)
    z, z_teacher = (x.to(wide).flatten(0, 1) for x in (logits, taught))
    hard = F.cross_entropy(z, targets.flatten())
    soft, T = z_teacher.div(how.temperature).log_softmax(-1), how.temperature
    own = (z[:, : z_teacher.shape[1]] / T).log_softmax(-1)
    apart = F.kl_div(own, soft, reduction="batchmean", log_target=True)
    return (1 - how.weight) * hard + how.weight * T**2 * apart


def open_teacher(path: Path, config: TrainConfig) -> Teacher:
    """Read the model of a run or of a checkpoint.

    Raises:
        UserError: there is none, or its training has not ended.
    """
    if (path / "run.json").is_file():
        folder = RunFolder.open(path)
        if folder.info["status"] != "done":
            rule = f"its training is {folder.info['status']}"
            refuse("distil.teacher", path, rule, "Train it to its end first")
        model, precision = load(folder), folder.config.trainer.precision
        weights = weights_of(folder) or ""
        options = folder.config.data.options
        return Teacher(model, str(folder.info.get("tokenizer")), options, weights, precision)
    if not path.is_file() and not (path / "config.json").is_file():
        rule = "is no run and no checkpoint"
        refuse("distil.teacher", path, rule, "Give the folder of one, such as runs/<name>")
    with TemporaryDirectory() as folder:
        described, file = read_checkpoint(path, Path(folder))
        end, bos = described.end_token, bos_of(str(file))
        tokenizer = open_tokenizer(str(file), end, bos)
    options = {"tokenizer": str(file)} if path.is_dir() else {}  # else its file is gone
    options |= {"end_token": end, "bos_token": bos}
    own = pretrained_config(described, path, plain(config.data), Path(config.runs))
    model = load_pretrained(own, described=described).eval().requires_grad_(False)
    weights, precision = identify(path)["sha256"], own.trainer.precision
    return Teacher(model, tokenizer.name, options, weights, precision)


def distillation(
    config: TrainConfig, tokenizer: str, vocab_size: int, before: str | None = None
) -> Distillation | None:
    """What a run learns from its teacher; None without one.

    Args:
        tokenizer, vocab_size: of the run's data.
        before: what identified the teacher's weights when the run began; None: it begins now.

    Raises:
        UserError: tokens of the two are not the same, the windows are too long for the teacher, or
            its weights changed since.
    """
    if config.distil.teacher is None:
        return None
    path = Path(config.distil.teacher)
    teacher = open_teacher(path, config)
    if teacher.tokenizer != tokenizer or teacher.model.vocab_size < vocab_size:
        theirs = f"{teacher.tokenizer}, {teacher.model.vocab_size:,} tokens"
        rule = f"its tokens ({theirs}) are not the run's ({tokenizer}, {vocab_size:,} tokens)"
        options = {"tokenizer": "<file>", **teacher.options}
        given = [(name, options.get(name)) for name in ("tokenizer", "end_token", "bos_token")]
        words = [f"data.{name}={value}" for name, value in given if value is not None]
        refuse("distil.teacher", path, rule, f"Train with its tokenizer: {' '.join(words)}")
    most = teacher.model.max_length
    if not teacher.model.causal or (most is not None and most < config.seq_len):
        rule = f"reads at most {most:,} tokens" if teacher.model.causal else "reads both ways"
        refuse("distil.teacher", path, rule, "Choose another teacher, or shorter windows")
    if before is not None and before != teacher.weights:
        rule = "its weights changed since this run began"
        refuse("distil.teacher", path, rule, "Put them back, or train anew: fresh=true")
    return Distillation(teacher, config.distil, vocab_size)
