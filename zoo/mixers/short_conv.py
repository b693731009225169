"""A short convolution before any mixer: a Canon layer, at place A (Allen-Zhu 2025, arXiv
2512.17351, section 4; the authors' code: facebookresearch/PhysicsLM4, huggingface/canon_helper.py).

    h'_t        h_t + w_0 h_t + w_1 h_{t-1} + w_2 h_{t-2} + w_3 h_{t-3}      channel by channel

h is the normalised input of the mixer, which reads h' in its place. As published there is no bias
and no activation, and weights start as those of PyTorch's convolutions, at U(+-1/sqrt(taps)).
The state is the last `taps - 1` inputs.
"""

from typing import Annotated

from jaxtyping import Float
from torch import Tensor

from zoo.config.domains import Range
from zoo.mixers.base import Mixer, MixerOutput
from zoo.mixers.parts import conv_weight, no_inputs
from zoo.ops.causal_conv import causal_conv


class ShortConvolution(Mixer):
    """y = x + a causal depthwise convolution of x.

    Args:
        width: channels.
        taps: tokens that an output depends on, itself included; published: 4.
        backend: of zoo.ops.causal_conv.
    """

    def __init__(
        self, *, width: int, taps: Annotated[int, Range(2, 8)] = 4, backend: str = "auto"
    ) -> None:
        super().__init__()
        self.min_window = taps  # the oldest tap first acts on the taps-th token
        self.backend = backend
        self.weight = conv_weight(width, taps)

    def forward(
        self, x: Float[Tensor, "b t d"], state: Float[Tensor, "b w d"] | None = None
    ) -> MixerOutput:
        y, after = causal_conv(x, self.weight, None, None, state, self.backend)
        return x + y if state is None else (x + y, after)

    def empty_state(self, batch: int) -> Float[Tensor, "b w d"]:
        return no_inputs(self.weight, batch)
