"""Learned positions are rows of a table."""

import pytest
import torch

from zoo.errors import UserError
from zoo.positions.learned import Learned

WIDTH = 8


def test_learned_positions_are_rows_of_their_table_from_what_was_read_on():
    learned, x = Learned(WIDTH, max_length=20), torch.randn(2, 5, WIDTH)
    torch.testing.assert_close(learned(x, 7), x + learned.weight[7:12])
    at = torch.tensor([[0, 3, 4, 9, 19], [1, 2, 5, 6, 7]])
    torch.testing.assert_close(learned(x, 0, at), x + learned.weight[at])


@pytest.mark.parametrize("max_length", [None, 0])
def test_a_table_without_rows_is_refused(max_length):
    with pytest.raises(UserError, match=r"max_length=\w+: must be a number of positions to learn"):
        Learned(WIDTH, max_length=max_length)
