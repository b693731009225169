"""No false alarm: the audit passes every architecture, alone and under every extension."""

import pytest
import torch
from building import ARCHITECTURES

from zoo.config.compose import compose
from zoo.config.groups import extensions
from zoo.errors import UserError
from zoo.model.audit import audit
from zoo.model.extend import extend

TRAINED = 64  # tokens
READ = [name for name, tree in extensions().items() if not tree.get("positions")]
MORE = {  # a head of the tiny models has 16 rotary pairs
    "longrope": [f"extension.scaling.long_factors={[1, 1, *14 * [3.5]]}"],
}


def options(name: str) -> list[str]:
    factor = ["extension.factor=4"] if extensions()[name]["factor"] == "???" else []
    return ["run=none", f"extension={name}", *factor, *MORE.get(name, [])]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_architecture_under_any_extension_is_taken_for_a_leak(architecture, tiny):
    text = torch.randint(32, (5 * TRAINED + 3,), generator=torch.Generator().manual_seed(0))
    passed = []
    for name in READ:
        model = tiny(architecture, dtype=torch.float32)
        try:
            extend(model, compose("eval", options(name)).extension, TRAINED)
        except UserError:  # it does not apply
            continue
        for autocast in (None, torch.bfloat16):
            found = audit(model, text, autocast=autocast)
            assert found.ok, f"{name}, {autocast}: {found.reason}"
        passed.append(name)
    assert "none" in passed
    assert architecture != "transformer" or len(passed) == len(READ) - 1  # all but ALiBi's
