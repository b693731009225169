"""No positions: the causal mask alone gives the order (Haviv 2022, arXiv 2203.16634; Kazemnejad
2023, NoPE, arXiv 2305.19466), or positions added at the embedding do."""

from zoo.positions.base import Positions


class NoPositions(Positions):
    """Every key as it is, at no distance."""
