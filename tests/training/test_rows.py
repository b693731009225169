"""A row's loss never depends on the rows beside it: ranks and micro-batches may share rows out."""

import pytest
import torch
from building import ARCHITECTURES, ENCODERS, MODEL_OF, train_config

from zoo.config.groups import extensions
from zoo.data.masking import mask_windows
from zoo.model.build import build_model
from zoo.model.extend import extend, places

ROWS, TOKENS = 3, 24
PLACED = [name for name, tree in extensions().items() if tree.get("positions")]
SCALINGS = [  # of rotary frequencies; LongRoPE's are searched for a model first
    name
    for name, tree in extensions().items()
    if isinstance(tree["scaling"], dict) and name not in (*MODEL_OF, "longrope")
]


def alone_and_together(loss, *inputs) -> tuple[torch.Tensor, torch.Tensor]:
    alone = [loss(*(x[row : row + 1] for x in inputs)) for row in range(ROWS)]
    return torch.stack(alone), loss(*inputs)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_of_windows_are_read_apart(architecture, tiny):
    model = tiny(architecture)
    alone, together = alone_and_together(model.loss, torch.randint(32, (ROWS, TOKENS + 1)))
    torch.testing.assert_close(alone.mean(), together, rtol=1e-10, atol=1e-12)
    assert alone.std() > 1e-5


@pytest.mark.parametrize("architecture", ENCODERS)
def test_masked_rows_count_by_what_is_predicted(architecture, tiny):
    model = tiny(architecture, "objective=masked")
    tokens = torch.randint(31, (ROWS, TOKENS))
    masked = mask_windows(tokens.numpy(), 31, [(0, 3, row) for row in range(ROWS)])
    shown, chosen = (torch.from_numpy(x) for x in masked)
    alone, together = alone_and_together(model.masked_loss, shown, tokens, chosen)
    counts = chosen.sum(1)
    assert len(set(counts.tolist())) > 1
    expected = (alone * counts).sum() / counts.sum()
    torch.testing.assert_close(together, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("scaling", [None, *SCALINGS])
@pytest.mark.parametrize("placed", PLACED)
def test_placed_rows_are_read_apart(placed, scaling):
    """Rows that reach differently far: under a scaling by length each has its own frequencies."""
    words = [f"extension={placed}", "extension.factor=4", "finetune=x"]
    if scaling and placed != scaling:
        words.append(f"extension.scaling={scaling}")
    config = train_config("size=tiny", f"seq_len={TOKENS}", "match=none", *words)
    torch.manual_seed(0)
    model = extend(build_model(config, 32)[0], config.extension, TOKENS).double()
    if model.frequencies is not None:
        torch.nn.init.normal_(model.frequencies.field.down.weight, std=0.05)
    draw = places(config.extension, TOKENS)
    assert draw is not None
    positions = draw(ROWS, TOKENS, torch.Generator().manual_seed(1))
    positions[0] = torch.arange(TOKENS)  # within the trained length
    positions[1, -1] += 1
    tokens = torch.randint(32, (ROWS, TOKENS + 1))

    def loss(tokens, positions):
        return model.loss(tokens, positions=positions)

    alone, together = alone_and_together(loss, tokens, positions)
    torch.testing.assert_close(alone.mean(), together, rtol=1e-9, atol=1e-11)
