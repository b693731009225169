"""What the measurements share: who is measured, how text is scored, how an arm may fail.

Scores are negative log-likelihoods in nats: logits in float32, sums in float64. The first token of
a window has no context and is not scored, so a window of `length` scored tokens holds length + 1.
Position p is the number of tokens a prediction was made from, 1 .. length.
"""

import functools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from zoo.compression.compressor import CompressionError, Compressor
from zoo.data.corpora import Corpus
from zoo.data.examples import SyntheticData
from zoo.data.loader import begun
from zoo.data.store import TokenStore
from zoo.errors import NoStateError, UserError, place_of, sentence
from zoo.mixers.base import count_bytes
from zoo.model.arithmetic import arithmetic
from zoo.model.backbone import Backbone, BackboneState
from zoo.model.flops import ReadingCost, reading_cost
from zoo.ops.dtypes import wide_dtype
from zoo.parallel.ranks import Ranks
from zoo.tasks.progress import Progress

Row = dict[str, Any]

MAX_LOGITS = 2**26  # numbers in the output of one chunk: 256 MiB in float32
BUCKETS_PER_OCTAVE = 4  # points of a curve: 50 to 16k tokens, 75 to a million


@dataclass(frozen=True, kw_only=True)
class EvalContext:
    """A trained model, the text it is measured on and the arithmetic it runs in."""

    model: Backbone
    data: Corpus | SyntheticData
    folder: Path  # the run's: arrays too large for a row go to `results/` in it
    train_length: int
    split: str = "test"
    extension: str = "none"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: str = "32-true"
    progress: Progress = field(default_factory=Progress)
    compress: Compressor | None = None  # of prompts
    ranks: Ranks = field(default_factory=lambda: Ranks(1, 0))  # that read a text together

    @functools.cached_property
    def cost(self) -> ReadingCost:
        """The operations of reading, as the model is extended."""
        return self.compress.cost if self.compress else reading_cost(self.model)

    def prompt_row(self, lengths: Sequence[int]) -> Row:
        """What a row says of reading prompts, of so many tokens each where none was compressed:
        `prompt_flops`, the operations of shortening and reading one, on average."""
        if self.compress:
            return self.compress.row
        counted = run_guarded(lambda: sum(map(self.cost.of, lengths)) / len(lengths))
        return {"prompt_flops": counted.value}  # None where counting fails, as for lack of memory

    @property
    def corpus(self) -> Corpus:
        """The text. Raises NotApplicableError where the model was trained on a task."""
        if isinstance(self.data, SyntheticData):
            raise NotApplicableError(
                sentence(f"data={self.data.name}", "is a task and no text", "Use task=accuracy")
            )
        return self.data

    @property
    def examples(self) -> SyntheticData:
        """The task. Raises NotApplicableError where the model was trained on text."""
        if not isinstance(self.data, SyntheticData):
            raise NotApplicableError(
                sentence(f"data={self.data.name}", "is a text and no task", "Use task=perplexity")
            )
        return self.data

    @property
    def bos(self) -> int | None:
        """The token that begins every text that the model reads, if it was trained with one."""
        return None if isinstance(self.data, SyntheticData) else self.data.tokenizer.bos

    @property
    def store(self) -> TokenStore:
        return getattr(self.corpus, self.split)

    def arithmetic(self) -> AbstractContextManager[None]:
        """No gradients, and the run's own precision."""
        return arithmetic(self.model, self.precision, self.device)


def chunk_tokens(context: EvalContext, chunk: int) -> int:
    """Tokens per forward: `chunk`, or fewer where a large vocabulary's logits would not fit."""
    return max(1, min(chunk, MAX_LOGITS // context.model.vocab_size))


def score(
    context: EvalContext,
    tokens: Int[np.ndarray, "b t1"],
    state: BackboneState | None = None,
    *,
    chunk: int,
) -> tuple[Float[np.ndarray, "b t"], BackboneState]:
    """Nats (float64) of tokens 1.. given those before and the state; and the state after them.

    Reads `chunk` tokens at a time; the first of an empty state is the one that begins a text, where
    the model was trained with one. Raises RuntimeError where the state is not as large as declared,
    ArithmeticError where the model gives no finite numbers.
    """
    model, parts = context.model, []
    fresh = state is None or not state.tokens_seen
    tokens = begun(tokens, context.bos) if fresh else tokens
    text = torch.as_tensor(tokens, dtype=torch.int64)
    after = state or model.empty_state(len(text))
    for start in range(0, text.shape[1] - 1, chunk):
        piece = text[:, start : start + chunk + 1].to(context.device)
        logits, after = model(piece[:, :-1], after)
        parts.append(nats(logits, piece[:, 1:]))
        context.progress.advance(parts[-1].numel())
    check_state(model, after, len(text))
    return finite(torch.cat(parts, 1)), after


def fill(
    context: EvalContext,
    shown: Int[np.ndarray, "b t"],
    tokens: Int[np.ndarray, "b t"],
    masked: Bool[np.ndarray, "b t"],
) -> Float[np.ndarray, "b t"]:
    """Nats (float64) of the masked tokens, 0 elsewhere, as an encoder predicts them from `shown`.

    Raises ArithmeticError where the model gives no finite numbers.
    """
    shown_, tokens_, masked_ = (
        torch.as_tensor(part).to(context.device) for part in (shown, tokens, masked)
    )
    nll = torch.where(masked_, nats(context.model(shown_), tokens_), 0)
    context.progress.advance(nll.numel())
    return finite(nll)


def finite(nll: Float[Tensor, "b t"]) -> Float[np.ndarray, "b t"]:
    """In float64. Raises ArithmeticError where a number is not finite."""
    found = nll.double().cpu().numpy()
    if not np.isfinite(found).all():
        raise ArithmeticError("the model's outputs are not finite numbers")
    return found


def nats(logits: Float[Tensor, "b t v"], targets: Int[Tensor, "b t"]) -> Float[Tensor, "b t"]:
    """What each token costs given the logits before it, in float32 or better."""
    wide = logits.to(wide_dtype(logits))
    return F.cross_entropy(wide.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


def check_state(model: Backbone, state: BackboneState, batch: int = 1) -> int:
    """Bytes of the state; RuntimeError where the model declares another number."""
    held, declared = count_bytes(state), model.state_bytes(state.tokens_seen, batch)
    if held != declared:
        raise RuntimeError(f"the state holds {held} bytes and declares {declared}")
    return held


def bits_per_byte(nll_sum: Any, text_bytes: Any) -> Any:
    """Convert nats to bits per byte of the text that they are the cost of.

    Returns a number, or for arrays a list, with None where there is no text.
    """
    if not isinstance(nll_sum, np.ndarray):
        return float(nll_sum) / (math.log(2) * float(text_bytes)) if text_bytes else None
    return [bits_per_byte(*pair) for pair in zip(nll_sum.tolist(), text_bytes, strict=True)]


def position_edges(length: int) -> Int[np.ndarray, " edges"]:
    """Edges of log-spaced buckets over positions 1 .. length: bucket i is [edges[i], edges[i+1]).

    The same edges at every length, up to the last, length + 1.
    """
    octaves = (
        np.arange(math.ceil(BUCKETS_PER_OCTAVE * math.log2(length + 1)) + 1) / BUCKETS_PER_OCTAVE
    )
    edges = np.unique(np.rint(2**octaves).astype(np.int64))
    edges = edges[edges <= length]
    # A last bucket of less than half the width of the one before, such as that of position 512
    # alone, is known too badly to be shown for itself.
    if len(edges) > 1 and 2 * (length + 1 - edges[-1]) < edges[-1] - edges[-2]:
        edges = edges[:-1]
    return np.append(edges, length + 1)


def in_buckets(
    values: Float[np.ndarray, " length"], edges: Int[np.ndarray, " edges"]
) -> Float[np.ndarray, " buckets"]:
    """Sums over the buckets of values by position; the first is position 1."""
    return np.add.reduceat(values, edges[:-1] - 1)


class NotApplicableError(Exception):
    """The measurement has no meaning for this model; the message says why."""


class LeakError(Exception):
    """The model's predictions depend on what they must not; the message says how that was seen."""


class Outcome(NamedTuple):
    """What a measurement gave, or nothing, and the row's fields that say how it went."""

    value: Any
    row: Row

    @property
    def ok(self) -> bool:
        return self.row["status"] == "ok"


def run_guarded(measurement: Callable[[], Any]) -> Outcome:
    """Measure; what goes wrong becomes a status and one line, so that the other arms go on.

    Raises CompressionError: options that shorten prompts are no arm's fault.
    """
    start, value, how = perf_counter(), None, {"status": "ok", "reason": None}
    try:
        value = measurement()
    except CompressionError:
        raise
    except Exception as error:
        how = failure_row(error)
    if how["status"] == "out_of_memory" and torch.cuda.is_available():
        torch.cuda.empty_cache()  # only now: the traceback held the tensors
    return Outcome(value, how | {"seconds": round(perf_counter() - start, 3)})


def failure_row(error: Exception) -> Row:
    """The status and the one-line reason of a row that an error left without numbers."""
    line = next(iter(str(error).strip().splitlines()), "")
    if isinstance(error, NotApplicableError):
        return {"status": "not_applicable", "reason": line}
    if isinstance(error, LeakError):
        return {"status": "leaks", "reason": line, "audit": line}
    if isinstance(error, UserError | NoStateError):
        return {"status": "failed", "reason": line}
    memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
    # PyTorch's CPU allocator raises a bare RuntimeError.
    status = "out_of_memory" if memory or "can't allocate memory" in line else "failed"
    place = place_of(error) if status == "failed" else ""
    return {"status": status, "reason": f"{type(error).__name__}: {line}".rstrip(": ") + place}


def check_length(model: Backbone, length: int) -> None:
    """Raise NotApplicableError, in the model's own words, where it cannot read `length` tokens."""
    if model.max_length is None or length <= model.max_length:
        return
    device = next(model.parameters()).device
    try:
        model(torch.zeros(1, 1, dtype=torch.int64, device=device).expand(1, length))
    except ValueError as error:
        raise NotApplicableError(str(error)) from None
