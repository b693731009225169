"""Rotary positions of layers that see a window of the text alone (Gemma 2, section 2, arXiv
2408.00118; Griffin, section 2.3, arXiv 2402.19427).

Each query sees the `window` keys up to its own, at their true distances. The window is the model's
own: extensions, which act on attention to the whole text, leave these layers as they are.
"""

from typing import Annotated, Any, ClassVar

from zoo.attention.streaming_llm import StreamingLLM
from zoo.config.domains import Range, RopeBase, Window
from zoo.positions.rope import Rope


class LocalRope(Rope):
    """Rotary positions over a window.

    Args:
        window: keys that a query sees, its own included.
        options: those of Rope.
    """

    takes_pattern: ClassVar[bool] = False
    placeable: ClassVar[bool] = False
    scaled_by: ClassVar[tuple[str, ...]] = ()
    one_sided: ClassVar[bool] = True

    def __init__(
        self,
        heads: int,
        head_width: int,
        /,
        *,
        window: Window = 512,
        rope_base: RopeBase = 10000.0,
        partial_rotary_factor: Annotated[float, Range(above=0, most=1)] = 1.0,
    ) -> None:
        more: Any = {"rope_base": rope_base, "partial_rotary_factor": partial_rotary_factor}
        super().__init__(heads, head_width, **more)
        unscaled = self.inv_freq, 1.0
        self.pattern = StreamingLLM(lambda _: unscaled, original_length=window, sinks=0)
