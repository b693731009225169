"""What a scheme does not go with is refused, by what its class declares."""

from functools import partial

import pytest

from zoo.errors import UserError
from zoo.mixers.softmax import SoftmaxAttention
from zoo.positions.alibi import ALiBi
from zoo.positions.t5 import T5
from zoo.positions.xpos import XPos

SCHEMES = {"xpos": partial(XPos, window=8), "alibi": ALiBi, "t5": T5}


@pytest.mark.parametrize("name", SCHEMES)
def test_a_scheme_that_knows_earlier_keys_alone_is_refused_without_a_causal_mask(name):
    with pytest.raises(UserError, match=f"positions={name}: is defined for causal attention alone"):
        SoftmaxAttention(width=16, heads=2, positions=SCHEMES[name], causal=False)


@pytest.mark.parametrize("name", ["alibi", "t5"])
def test_a_sink_is_refused_beside_a_bias_by_distance(name):
    with pytest.raises(UserError, match=f"sink=true: cannot be combined with positions={name}"):
        SoftmaxAttention(width=16, heads=2, positions=SCHEMES[name], sink=True)
