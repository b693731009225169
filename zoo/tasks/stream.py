"""One pass over a very long text, the state carried on: constant memory at any length."""

from dataclasses import dataclass
from time import perf_counter
from typing import Annotated

import numpy as np

from zoo.config.domains import MAX_LENGTH, Count, Range
from zoo.data.store import TokenStore
from zoo.measurement import Declaration, Quantity
from zoo.model.backbone import Backbone
from zoo.tasks.context import (
    EvalContext,
    NotApplicableError,
    Row,
    bits_per_byte,
    check_length,
    check_state,
    chunk_tokens,
    position_edges,
    score,
)
from zoo.tasks.memory import held_bytes, peak_bytes
from zoo.tasks.task import Task


@dataclass(frozen=True, kw_only=True)
class Stream(Task):
    """One row: bits per byte by position, speed, memory, over `tokens` tokens read in chunks.

    A split shorter than that is read again from its start; `passes` says how often. Only models
    whose state does not grow are measured. `late_tokens_per_second` is the speed over the last
    tenth, no less than the whole's where a token costs the same however much came before.
    `peak_bytes` is what the state and the reading of a chunk take beyond the model's weights,
    `growth_bytes` by how much the process grew after the first tenth of the text: near 0 where
    memory is constant. Both are None where nothing reports it.
    """

    declares = Declaration(
        title="Streaming",
        about="One long text is read once in chunks, with the state passed on. A state of fixed "
        "size means memory that does not grow, however long the text.",
        quantities=(
            Quantity(field="bits_per_byte", name="bits per byte", better="lower", form="score"),
            Quantity(field="tokens_per_second", name="tokens per second", better="higher"),
            Quantity(
                field="late_tokens_per_second",
                name="tokens per second in the last tenth",
                better="higher",
            ),
            Quantity(field="peak_bytes", name="peak memory", better="lower", form="bytes"),
            Quantity(
                field="growth_bytes",
                name="growth after the first tenth",
                better="lower",
                form="bytes",
            ),
            Quantity(field="state_bytes", name="state", better="lower", form="bytes"),
        ),
    )
    unidentifying = ("tokens", "chunk")  # a question has them as `length` and `chunk`
    tokens: Annotated[int, Range(1, MAX_LENGTH)] = 2**20
    chunk: Count = 4096

    def questions(self, context: EvalContext) -> list[Row]:
        chunk = chunk_tokens(context, self.chunk)
        return [{"split": context.split, "length": self.tokens, "chunk": chunk}]

    def check_model(self, model: Backbone) -> None:
        if not model.recurrent:
            held, read = model.state_bytes(self.tokens), f"{self.tokens:,} tokens"
            why = f"its state grows with the text, to {held:,} bytes after {read}"
            raise NotApplicableError(why)
        check_length(model, self.tokens)

    def measure(self, context: EvalContext, question: Row) -> Row:
        self.check_model(context.model)
        return _read(context, question["length"], question["chunk"])


def _read(context: EvalContext, tokens: int, chunk: int) -> Row:
    model, store = context.model, context.store
    edges = position_edges(tokens)
    sums, sizes = np.zeros(len(edges) - 1), np.zeros(len(edges) - 1, np.int64)
    context.progress.begin(f"stream of {tokens:,}", tokens)
    with context.arithmetic():
        state, early, began = model.empty_state(1), None, perf_counter()
        last = (0, began)  # where the last tenth begins, and when
        for start in range(0, tokens, chunk):
            if 10 * start <= 9 * tokens:
                last = (start, perf_counter())
            piece = _tokens(store, start, min(chunk, tokens - start) + 1)
            nll, state = score(context, piece[None], state, chunk=chunk)
            positions = np.arange(start + 1, start + len(piece))
            buckets = np.searchsorted(edges, positions, side="right") - 1
            np.add.at(sums, buckets, nll[0])
            np.add.at(sizes, buckets, _bytes(store, start + 1, len(piece) - 1))
            if early is None and 10 * (start + chunk) >= tokens:
                early = held_bytes(context.device)
        ended, late = perf_counter(), held_bytes(context.device)
        held = check_state(model, state)
        piece = _tokens(store, 0, min(chunk, tokens) + 1)[None]
        peak = peak_bytes(context.device, lambda: score(context, piece, chunk=chunk))
    size, count = int(sizes.sum()), np.diff(edges)
    return {
        "nll_sum": float(sums.sum()),
        "count": tokens,
        "bytes": size,
        "bits_per_byte": bits_per_byte(float(sums.sum()), size),
        "passes": tokens / len(store),
        "curve": {
            "edges": edges.tolist(),
            "bits_per_byte": bits_per_byte(sums, sizes),
            "count": count.tolist(),
            "bytes": sizes.tolist(),
        },
        "tokens_per_second": tokens / (ended - began),
        "late_tokens_per_second": (tokens - last[0]) / (ended - last[1]),
        "peak_bytes": peak,
        "growth_bytes": None if late is None or early is None else late - early,
        "state_bytes": held,
    }


def _tokens(store: TokenStore, start: int, count: int) -> np.ndarray:
    """Tokens start .. start+count-1 of the split repeated without end."""
    return store.tokens[np.arange(start, start + count) % len(store)].astype(np.int64)


def _bytes(store: TokenStore, start: int, count: int) -> np.ndarray:
    """The bytes of text that these tokens stand for."""
    first = start % len(store)
    parts = []
    while count:
        parts.append(store.bytes_of(first, min(first + count, len(store))))
        first, count = 0, count - len(parts[-1])
    return np.concatenate(parts)
