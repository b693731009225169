"""Transforms of torch.func and forward gradients give what plain calls give, in every op.

Kernels are not transformed: where a backend is not requested, the definition runs instead.
"""

import fuzz
import pytest
import torch
from building import train_config
from torch import Tensor
from torch.autograd import forward_ad

from zoo.config.groups import choices
from zoo.errors import UserError
from zoo.model.build import build_model


def small_call(name: str) -> tuple[fuzz.Call, list[Tensor]]:
    """A call of four of everything, and its real tensors in float64."""
    draw = fuzz.Draw(2, torch.float64)
    draw.size = lambda *_, **__: 4  # type: ignore[method-assign]
    draw.batch = lambda: 2  # type: ignore[method-assign]
    draw.chance = lambda p: p > 0.2  # type: ignore[method-assign]
    draw.random.randint = lambda _, most: min(3, most)  # type: ignore[method-assign]
    call = fuzz.cases()[name][0](draw)
    return call, [leaf.detach() for leaf, _ in call.tensors]


def random_like(tensors: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in tensors]


def pulled_back(function, given: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
    """The gradients of a weighted sum, by the backward that training has."""
    leaves = [x.clone().requires_grad_() for x in given]
    found = torch.autograd.grad(function(*leaves), leaves, weights, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True)]


def product(left: list[Tensor], right: list[Tensor]) -> Tensor:
    return sum((a * b).sum() for a, b in zip(left, right, strict=True))  # type: ignore[return-value]


def op_and_tensors(name: str, backend: str = "auto"):
    """A function of the tensors of an op that have gradients, and these."""
    call, tensors = small_call(name)
    real = [i for i, x in enumerate(tensors) if x.dtype == torch.float64]

    def function(*given: Tensor) -> tuple[Tensor, ...]:
        values = dict(zip(real, given, strict=True))
        return tuple(call.run(backend, *(values.get(i, x) for i, x in enumerate(tensors))))

    return function, [tensors[i] for i in real]


@pytest.mark.parametrize("with_gradients", [True, False])
@pytest.mark.parametrize("name", fuzz.cases())
def test_a_forward_gradient_is_the_transpose_of_the_backward(name, with_gradients):
    function, given = op_and_tensors(name)
    tangents, results = random_like(given), function(*given)
    weights = random_like([*results])
    expected = product(pulled_back(function, given, weights), tangents)
    with torch.set_grad_enabled(with_gradients):
        _, found = torch.func.jvp(function, tuple(given), tuple(tangents))
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(*pair) for pair in zip(given, tangents, strict=True)]
            outputs = [forward_ad.unpack_dual(x) for x in function(*duals)]
            ours = [x.tangent.clone() for x in outputs]
    for each in (found, ours):
        torch.testing.assert_close(product(weights, [*each]).detach(), expected)
    torch.testing.assert_close([x.primal.detach() for x in outputs], [*results])


@pytest.mark.parametrize("name", fuzz.cases())
def test_vmap_and_grad_are_plain_calls(name):
    function, given = op_and_tensors(name)
    batches = [torch.stack([x, 0.5 * x]) for x in given]
    weights = random_like([*function(*given)])
    outputs = torch.vmap(function)(*batches)

    def total(*tensors: Tensor) -> Tensor:
        return product(weights, [*function(*tensors)])

    gradients = torch.vmap(torch.func.grad(total, tuple(range(len(given)))))(*batches)
    for i in range(2):
        alone = [x[i] for x in batches]
        torch.testing.assert_close([x[i] for x in outputs], [*function(*alone)])
        expected = pulled_back(function, alone, weights)
        torch.testing.assert_close([x[i] for x in gradients], expected)


@pytest.mark.parametrize("name", fuzz.cases())
def test_a_kernel_that_is_requested_in_a_transform_is_refused_in_plain_words(name):
    function, given = op_and_tensors(name, "native")
    message = "it has no forward gradients and is not transformed by torch.func"
    with pytest.raises((UserError, NotImplementedError), match=message):
        torch.vmap(function)(*(x[None] for x in given))
    with forward_ad.dual_level(), pytest.raises((UserError, NotImplementedError), match=message):
        function(*(forward_ad.make_dual(x, x) for x in given))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(choices("model")))
def test_a_forward_gradient_of_a_model_is_the_transpose_of_its_backward(name):
    sizes = ["size=tiny", "size.layers=1", "seq_len=128", "match=none"]
    model = build_model(train_config(f"model={name}", *sizes), vocab_size=32)[0].eval().double()
    names, given = [*dict(model.named_parameters())], [x.detach() for x in model.parameters()]
    tokens = torch.randint(32, (2, 20), generator=torch.Generator().manual_seed(0))

    def function(*weights: Tensor) -> tuple[Tensor]:
        values = dict(zip(names, weights, strict=True))
        return (torch.func.functional_call(model, values, (tokens,)),)

    tangents, weights = random_like(given), random_like([*function(*given)])
    expected = product(pulled_back(function, given, weights), tangents)
    with torch.no_grad():
        _, found = torch.func.jvp(function, tuple(given), tuple(tangents))
    torch.testing.assert_close(product(weights, [*found]), expected, rtol=1e-5, atol=1e-5)
