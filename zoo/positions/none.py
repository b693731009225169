"""No positions: the causal mask alone gives the order (Haviv 2022, arXiv 2203.16634; Kazemnejad
2023, NoPE, arXiv 2305.19466), or positions added at the embedding do."""

from typing import ClassVar

from torch import Tensor

from zoo.ops.dtypes import wide_dtype
from zoo.positions.base import CrossLayer, Positions


class NoPositions(Positions):
    """Every key as it is, at no distance. Extensions that leave keys out act on it."""

    takes_patterns: ClassVar[tuple[str, ...]] = (
        "zoo.attention.lm_infinite",
        "zoo.attention.parallel_windows",
        "zoo.attention.streaming_llm",
    )

    def rotation_of_a_token(
        self, position: int, like: Tensor, cross_layer: CrossLayer | None
    ) -> tuple[Tensor, Tensor] | None:
        none = like.new_empty((1, 1, 0), dtype=wide_dtype(like))
        return None if self.pattern or self.softcap is not None else (none, none)
