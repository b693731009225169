"""No positions: the causal mask alone gives the order (Haviv 2022, arXiv 2203.16634; Kazemnejad
2023, NoPE, arXiv 2305.19466), or positions added at the embedding do."""

from typing import ClassVar

from zoo.positions.base import Positions


class NoPositions(Positions):
    """Every key as it is, at no distance. Extensions that leave keys out act on it."""

    takes_patterns: ClassVar[tuple[str, ...]] = (
        "zoo.attention.lm_infinite",
        "zoo.attention.parallel_windows",
        "zoo.attention.streaming_llm",
    )
