"""LM-Infinite: a Lambda-shaped mask and bounded distances.

Each query attends to the last `window` keys at their true distance, and to the first `sinks` keys
at min(distance, window). Unlike StreamingLLM's, positions are those in the text, not in the cache.

With `top_k` each query and head attends as well to that many of the keys between, those whose
scores are highest at the one distance `middle` that all of these have (the paper's option for
retrieval: 5 keys, at half the trained length, in the layers from the sixth on; here in every
layer). Then every key is cached, and scoring them takes O(t^2) time.

Source: Han 2023, "LM-Infinite", section 4 (arXiv 2308.16137).
"""

import torch
from torch import Tensor

from zoo.attention.key_blocks import (
    KeyBlock,
    KeyIndex,
    Scaling,
    constant,
    cut,
    distant_keys,
    positions_of,
)
from zoo.attention.local import attend_per_key
from zoo.attention.pattern import MAX_BLOCK_QUERIES, AttentionPattern, check_window
from zoo.config.domains import Natural, Positive
from zoo.errors import refuse
from zoo.ops.attention import repeat_heads
from zoo.ops.dtypes import wide_dtype
from zoo.ops.merge import Partial
from zoo.positions.rope import apply_rope

TILE = 256  # queries whose scores with all keys between are held at once


class LMInfinite(AttentionPattern):
    """LM-Infinite over rotary frequencies `scaling`.

    Args:
        original_length: the trained length in tokens.
        window: in tokens; None: the trained length.
        sinks: first keys that are always attended to, 10 to 100 in the paper.
        top_k: keys between sinks and window that each query selects; of rotary models.
        middle: their distance in tokens, with top_k; None: half the trained length.
    """

    def __init__(
        self,
        scaling: Scaling,
        *,
        original_length: int,
        window: int | None = None,
        sinks: int = 10,
        top_k: Natural = 0,
        middle: Positive | None = None,
    ) -> None:
        super().__init__(scaling)
        window = original_length if window is None else window
        check_window(window, original_length)
        if not 0 <= sinks < window:
            refuse("sinks", sinks, f"must be from 0 to {window - 1}, less than window={window}")
        inv_freq, _ = scaling(original_length)
        if top_k and isinstance(inv_freq, tuple) and not inv_freq:
            refuse("top_k", top_k, "selects by rotated keys, and this model rotates none", "Use 0")
        if middle is not None and not (top_k and middle < original_length):
            rule = f"must be less than the trained length ({original_length}), and with top_k alone"
            refuse("middle", middle, rule)
        self.nearest = self.window = window
        self.recent = None if top_k else window
        self.sinks, self.steps = sinks, [MAX_BLOCK_QUERIES]
        self.top_k = top_k
        self.middle = max(original_length // 2, 1) if middle is None else middle

    def views(self, rows: range) -> list[KeyBlock]:
        return distant_keys(rows, self.window, constant(self.window), constant(0), last=self.sinks)

    def selected(
        self, block: range, q: Tensor, k: Tensor, v: Tensor, index: KeyIndex
    ) -> list[tuple[range, Partial]]:
        first = max(block.start, self.window + self.sinks)  # the first query with a key between
        if not self.top_k or first >= block.stop:
            return []
        inv_freq, factor = self.scaling(block.stop)
        between = range(self.sinks + index.dropped, block.stop - self.window)
        k, v = (repeat_heads(x[:, index.slots(between)], q.shape[2]) for x in (k, v))
        k = apply_rope(k, inv_freq, torch.tensor([0]), factor)
        found = []
        for start in range(first, block.stop, TILE):
            rows = range(start, min(start + TILE, block.stop))
            q_rows = apply_rope(cut(q, block, rows), inv_freq, torch.tensor([self.middle]), factor)
            found.append((rows, self._highest(rows, between, q_rows, k, v)))
        return found

    def _highest(self, rows: range, between: range, q: Tensor, k: Tensor, v: Tensor) -> Partial:
        """Attend to the keys of highest scores, of each query and head its own."""
        scores = torch.einsum("bihd,bjhd->bihj", q, k).to(wide_dtype(q))
        apart = positions_of(rows)[:, None] - positions_of(between)
        there = (apart >= self.window).to(q.device)
        scores = scores.masked_fill(~there[:, None], -torch.inf)
        count = min(self.top_k, len(between))
        chosen = scores.detach().topk(count, -1).indices.transpose(1, 2)  # (b, h, i, count)
        keys, values = (
            x.transpose(1, 2)[:, :, None]
            .expand(-1, -1, len(rows), -1, -1)
            .gather(3, chosen[..., None].expand(*chosen.shape, x.shape[-1]))
            .permute(3, 0, 2, 1, 4)
            for x in (k, v)
        )
        visible = torch.arange(count, device=q.device) < there.sum(-1)[:, None]
        return attend_per_key(q, [*keys], [*values], visible=visible)
