"""The key/value cache that grows in place: what it holds is what joining would give."""

import pytest
import torch

from zoo.mixers.parts import append, grow, reserve


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_cache_grown_in_place_is_the_tokens_behind_one_another(mode):
    with mode():
        pieces = [torch.randn(2, tokens, 3, 4) for tokens in (5, 1, 1, 200, 1, 0, 7)]
        past = joined = torch.empty(2, 0, 3, 4)
        for piece in pieces:
            past, joined = grow(past, piece), append(joined, piece)
            assert torch.equal(past, joined)


def test_two_texts_that_go_on_from_one_cache_do_not_meet():
    common = grow(torch.empty(1, 0, 1, 2), torch.zeros(1, 4, 1, 2))
    one, other = grow(common, torch.ones(1, 1, 1, 2)), grow(common, 2 * torch.ones(1, 1, 1, 2))
    assert one[0, 4].eq(1).all()
    assert other[0, 4].eq(2).all()
    assert common.shape[1] == 4


def test_a_token_is_written_without_copying_the_past():
    past = grow(torch.empty(1, 0, 1, 2), torch.zeros(1, 100, 1, 2))
    assert grow(past, torch.ones(1, 1, 1, 2)).data_ptr() == past.data_ptr()


def test_a_cache_of_inference_mode_is_copied_outside_of_it():
    with torch.inference_mode():
        past = grow(torch.empty(1, 0, 1, 2), torch.zeros(1, 4, 1, 2))
    with torch.no_grad():
        both = grow(past, torch.ones(1, 1, 1, 2))
    assert both[0, :, 0, 0].tolist() == [0, 0, 0, 0, 1]
    assert not both.is_inference()


def test_gradients_reach_the_past():
    past, x = torch.randn(1, 3, 1, 2, requires_grad=True), torch.randn(1, 2, 1, 2)
    grow(past, x).sum().backward()
    assert past.grad is not None
    assert past.grad.eq(1).all()


def test_with_room_reserved_chunks_share_one_memory_and_have_the_gradients_of_joining():
    pieces = [torch.randn(2, tokens, 3, 4, requires_grad=True) for tokens in (5, 1, 9, 3)]

    def total(join) -> torch.Tensor:
        past, score, left = torch.empty(2, 0, 3, 4), torch.zeros(()), 18
        for piece in pieces:
            left -= piece.shape[1]
            with reserve(left):
                past = join(past, piece)
            held.append(past)
            score = score + (past.sin() * past).sum()  # sin saves the past as it was
        return score

    held: list[torch.Tensor] = []
    found = torch.autograd.grad(total(grow), pieces)
    assert len({past.data_ptr() for past in held}) == 1
    expected = torch.autograd.grad(total(append), pieces)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
