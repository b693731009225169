"""Audits a model for leaks: what it predicts may depend on earlier tokens of its own row alone.

Training calls it on the weights it leaves, evaluation before it scores. On one stretch of text, at
two lengths, with the state and without, the outputs of the last layer are compared with
those of reading the text alone:

    future   later tokens are changed, from several places on: predictions before them must stay
    rows     other rows are in the batch: predictions must stay
    prefix   less text follows: predictions of what is left must stay
    again    the text is read a second time, after others: what was read before must not show
    chunks   the text is read in uneven chunks, many of one token, which shows nothing of what
             follows: predictions must be those of the whole

What must stay may differ by rounding. How much that may be is measured on the model itself: every
embedded number is disturbed by a relative `DISTURBANCE` at random, far more than the rounding of
all operations amounts to (u is the unit roundoff, half of eps):

    arithmetic   u       disturbance         leaves room for the rounding of
    float64      2^-53   2^-36               2^17 operations in a row
    float32      2^-24   2^-14               2^10
    float16      2^-11   2^-4                2^7
    bfloat16     2^-9    2^-2                2^7

and what the predictions change by then bounds what they may. A leak is compared where it shows
best: in float64, where a bound is about 1e-9, on a copy of the model; and in the arithmetic of the
run, where the kernels are those that train and measure.

A leak that shows only beyond `LONGEST` tokens (in float64 beyond `SHARP`) is not found: `tokens`
records how many were read in each arithmetic.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zoo.errors import NoStateError
from zoo.model.backbone import Backbone

AUTOCAST = {"bf16-mixed": torch.bfloat16}  # by Lightning's name for the precision
DISTURBANCE = {
    **{torch.float64: 2.0**-36, torch.float32: 2.0**-14},
    **{torch.float16: 2.0**-4, torch.bfloat16: 2.0**-2},
}
PROBE = 2.0**-30  # a disturbance far below the rounding of float32, far above that of float64
LONGEST = 8192  # tokens of the longer length, so that an audit takes seconds
SHARP = 2048  # tokens read in float64
TOKENS = 2**14  # of the rows read side by side
CUTS = 6  # places from which on the future is changed
ONE_BY_ONE = 80  # tokens read one by one, more than the 64 of the largest chunk of any operation
WORK = {"cuda": 2**44}  # parameters times tokens of a length: an audit reads one some fifty times
WORK_ELSEWHERE = 2**36  # about a minute on two cores
COPIED = 2**27  # parameters: of more, no copy in float64 is made


@dataclass(frozen=True)
class Deviation:
    """By how much predictions differ that must not."""

    check: str  # future | rows | prefix | again | chunks
    form: str  # whole | state | training
    arithmetic: str
    length: int
    place: int  # tokens before the prediction that differs most
    value: float  # largest difference of an output
    bound: float

    @property
    def ratio(self) -> float:
        """Above 1 it is more than rounding."""
        return self.value / self.bound if self.bound else (np.inf if self.value else 0.0)

    def __str__(self) -> str:
        forms = {"whole": "without a state", "state": "with a state", "training": "in training"}
        said = {
            "future": "it reads the future: changing later tokens alone",
            "rows": "it mixes the rows of a batch: changing other rows alone",
            "prefix": "it depends on how much text follows: leaving later tokens out",
            "again": "it remembers other texts: reading them before",
            "chunks": "reading in chunks differs from reading at once: cutting the text",
        }
        return (
            f"{said[self.check]} changes the output after {self.place} of {self.length} tokens "
            f"by {self.value:.2g}, rounding by at most {self.bound:.2g} "
            f"({forms[self.form]}, {self.arithmetic})"
        )


@dataclass(frozen=True)
class Audit:
    """What an audit found: `ok` and no reason, or the worst deviation in words."""

    ok: bool
    reason: str | None = None
    lengths: tuple[int, ...] = ()  # that were read; none for an encoder, which may read both ways
    worst: float = 0.0  # the largest deviation over its bound
    state: bool = True  # whether the model keeps a state that could be audited
    tokens: dict[str, int] = field(default_factory=dict)  # the longest text read, by arithmetic

    def record(self) -> dict[str, Any]:
        """As run.json holds it."""
        return {**asdict(self), "lengths": list(self.lengths), "worst": float(f"{self.worst:.3g}")}


def audit(
    model: Backbone,
    tokens: Any,
    *,
    lengths: Sequence[int] | None = None,
    autocast: torch.dtype | None = None,
) -> Audit:
    """Audit the model on a stretch of text, `tokens` (t,) or (1, t).

    `lengths` are t / 2 and t unless given, each at most `LONGEST`, what the model can read and what
    one so large can read in reasonable time (`WORK`).
    `autocast` is the run's arithmetic where that is not the weights' own. An encoder, which
    declares `causal=False`, is exempt. A length at which the outputs are not finite numbers is left
    out: it cannot be scored either.

    Raises ValueError where nothing is left to compare, as an audit would pass without one.
    """
    if not model.causal:
        return Audit(ok=True)
    device = next(model.parameters()).device
    text = torch.as_tensor(np.asarray(tokens), dtype=torch.int64).reshape(-1).to(device)
    work = WORK.get(device.type, WORK_ELSEWHERE)
    affordable = work // max(1, sum(weight.numel() for weight in model.parameters()))
    most = min(LONGEST, model.max_length or LONGEST, max(ONE_BY_ONE, affordable))
    lengths = sorted({min(n, most, len(text)) for n in lengths or (len(text) // 2, len(text))})
    lengths = [n for n in lengths if n > 1]
    found: list[Deviation] = []
    state, training, head = True, model.training, getattr(model, "head", None)
    try:
        for reader, kind in _readers(model, autocast):
            reader.drop_head()
            sharp = kind == torch.float64
            reads = dict.fromkeys(min(n, SHARP) if sharp else n for n in lengths)
            for index, n in enumerate(reads):
                try:
                    found += _deviations(reader, text[:n], kind, index == 0, state)
                except NoStateError:
                    state = False
                    found += _deviations(reader, text[:n], kind, index == 0, state)
    finally:
        model.train(training)
        if head is not None:
            model.head = head
    if not found:
        why = "the outputs are not finite numbers" if lengths else "the text has a single token"
        raise ValueError(f"nothing could be compared: {why}")
    worst = max(found, key=lambda one: one.ratio)
    read: dict[str, int] = {}
    for one in found:
        read[one.arithmetic] = max(one.length, read.get(one.arithmetic, 0))
    # The first of what is wrong names the cause best: a leak shows in the later checks as well.
    wrong = [one for one in found if one.ratio > 1]
    return Audit(
        ok=not wrong,
        reason=str(wrong[0]) if wrong else None,
        lengths=tuple(sorted({one.length for one in found})),
        worst=worst.ratio,
        state=state,
        tokens=read,
    )


def _name(kind: torch.dtype) -> str:
    return str(kind).removeprefix("torch.")


def stretch(tokens: np.ndarray, count: int) -> np.ndarray:
    """The first `count` tokens (up to `LONGEST`) of a text that is repeated where it ends."""
    return tokens[np.arange(min(count, LONGEST)) % len(tokens)].astype(np.int64)


class _Reader:
    """A model in one arithmetic."""

    def __init__(self, model: Backbone, autocast: torch.dtype | None) -> None:
        self.model, self.autocast = model, autocast

    def drop_head(self) -> None:
        """Leave out the head, which acts on every token for itself and may be very wide."""
        if hasattr(self.model, "head"):
            self.model.head = nn.Identity()  # type: ignore[assignment]

    @contextmanager
    def arithmetic(self, training: bool = False) -> Iterator[None]:
        """No gradients; the same random numbers each time, should the model draw any."""
        device = next(self.model.parameters()).device
        self.model.train(training)
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
            # On a CPU not torch.manual_seed: it looks for other devices, 0.5 ms each time.
            (torch.default_generator if device.type == "cpu" else torch).manual_seed(0)
            if self.autocast:
                stack.enter_context(torch.autocast(device.type, self.autocast))
            yield

    def whole(self, rows: Tensor, training: bool = False) -> Tensor:
        with self.arithmetic(training):
            return self.model(rows)

    def chunks(self, rows: Tensor, sizes: Sequence[int]) -> Tensor:
        with self.arithmetic():
            state, parts = self.model.empty_state(len(rows)), []
            for chunk in rows.split(list(sizes), 1):
                logits, state = self.model(chunk, state)
                parts.append(logits)
        return torch.cat(parts, 1)

    def disturbed(self, row: Tensor, by: float) -> Tensor:
        """The reading of embeddings that are off by so much, relatively and at random."""
        embedding = getattr(self.model, "embedding", None)
        if embedding is None:
            return self.whole(row)
        generator = torch.Generator().manual_seed(0)

        def disturb(_: Any, __: Any, out: Tensor) -> Tensor:
            signs = torch.randint(0, 2, out.shape, generator=generator).mul_(2).sub_(1)
            return out * (1 + by * signs.to(out))

        hook = embedding.register_forward_hook(disturb)
        try:
            return self.whole(row)
        finally:
            hook.remove()


def _readers(
    model: Backbone, autocast: torch.dtype | None
) -> Iterator[tuple[_Reader, torch.dtype]]:
    """The model in float64, where that can be had, and as it runs."""
    weights = next(model.parameters())
    own = autocast or weights.dtype
    size = sum(p.numel() for p in model.parameters())
    if own != torch.float64 and weights.device.type != "mps" and size <= COPIED:
        wide = copy.deepcopy(model).double()
        try:
            with _Reader(wide, None).arithmetic():
                wide(torch.zeros(1, 2, dtype=torch.int64, device=weights.device))
        except (RuntimeError, TypeError, ValueError, NotImplementedError):
            pass  # a library's kernel that knows no float64
        else:
            yield _Reader(wide, None), torch.float64
        del wide
    yield _Reader(model, autocast), own


def _deviations(
    reader: _Reader, text: Tensor, kind: torch.dtype, first: bool, state: bool
) -> list[Deviation]:
    """All comparisons at one length in one arithmetic."""
    length, vocabulary = len(text), reader.model.vocab_size
    reader.whole(text[None])  # so that one that remembers other texts remembers this one
    alone = reader.whole(text[None])[0]
    if not alone.isfinite().all():
        return []
    found: list[Deviation] = []
    bound = _rounding(reader, text, alone, kind)

    def compare(check: str, form: str, logits: Tensor, wanted: Tensor) -> None:
        apart = (logits - wanted).abs().nan_to_num(torch.inf, torch.inf).amax(-1)
        if len(apart):
            place, value = int(apart.argmax()), float(apart.max())
            found.append(Deviation(check, form, _name(kind), length, place + 1, value, bound))

    places = _cuts(length, max(1, min(CUTS, TOKENS // length)))
    rows = _changed(text, [length, *places, 0], vocabulary)
    forms = {"whole": lambda: reader.whole(rows)}
    if state:
        forms["state"] = lambda: reader.chunks(rows, [length])
    if first:
        forms["training"] = lambda: reader.whole(rows, training=True)
    for form, read in forms.items():
        outputs, wanted = read(), alone.expand(len(rows), -1, -1)
        if form == "training":  # what is drawn at random there depends on the number of rows
            wanted = reader.whole(text.expand_as(rows), training=True)
        compare("rows", form, outputs[0], wanted[0])
        for row, cut in enumerate(places, 1):
            compare("future", form, outputs[row, :cut], wanted[row, :cut])
    for cut in places:
        compare("prefix", "whole", reader.whole(text[None, :cut])[0], alone[:cut])
    compare("again", "whole", reader.whole(text[None])[0], alone)
    if state:
        compare("chunks", "state", reader.chunks(text[None], _uneven(length))[0], alone)
    return found


def _rounding(reader: _Reader, text: Tensor, alone: Tensor, kind: torch.dtype) -> float:
    """By how much outputs may differ from `alone` by rounding."""

    def response(by: float) -> float:
        return float((reader.disturbed(text[None], by)[0] - alone).abs().max())

    smallest = float(torch.finfo(kind).eps * alone.abs().max())
    if kind != torch.float64:
        return max(smallest, response(DISTURBANCE[kind]))
    # A part that computes in float32 all the same answers a small disturbance by steps of its own
    # rounding, far larger than in proportion to the answer to a large one.
    coarse, fine = response(DISTURBANCE[torch.float32]), response(PROBE)
    if fine > 8 * coarse * PROBE / DISTURBANCE[torch.float32]:
        return coarse
    return max(smallest, fine * DISTURBANCE[kind] / PROBE)


def _cuts(length: int, count: int) -> list[int]:
    """Places in the text, some of them neighbours: no block ends at both."""
    middle = length // 2
    wanted = [middle + 1, middle, length - 1, length // 3, 1, length // 3 + 1]
    return list(dict.fromkeys(cut for cut in wanted[:count] if 0 < cut < length))


def _changed(text: Tensor, places: Sequence[int], vocabulary: int) -> Tensor:
    """The text in rows, each with every token from one of the places on changed."""
    rows = text.repeat(len(places), 1)
    shift = torch.arange(len(text), device=text.device) % max(1, vocabulary - 1) + 1
    for row, place in zip(rows, places, strict=True):
        row[place:] = (row[place:] + shift[place:]) % vocabulary
    return rows


def _uneven(length: int) -> list[int]:
    """Sizes of chunks: tokens one by one, then ever larger odd numbers of them."""
    sizes, left, size = [], length, 3
    while left:
        sizes.append(min(left, 1 if len(sizes) < ONE_BY_ONE else size))
        left -= sizes[-1]
        if len(sizes) > ONE_BY_ONE:
            size += 2 + size // 4 * 2
    return sizes
