"""Transforms of torch.func and forward gradients give what plain calls give, in every op.

Kernels are not transformed: where a backend is not requested, the definition runs instead.
"""

import functools

import fuzz
import pytest
import torch
from building import train_config
from torch import Tensor
from torch.autograd import forward_ad

from zoo.config.groups import choices
from zoo.errors import UserError
from zoo.model.build import build_model
from zoo.model.quantization import QuantizedWeight
from zoo.ops.linear import MIN_WEIGHTS, Linear, linears, project
from zoo.ops.rotary import apply_rotary_to_both
from zoo.ops.runtime.dispatch import reset, used_backends


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


def one_call_of_several():
    """Functions linear in their tensors that are one call of a kernel, and what they are given."""
    k = 64
    draw = functools.partial(torch.randn, dtype=torch.float64)
    x, weights = draw(1, 1, k), [draw(MIN_WEIGHTS // k, k) for _ in range(2)]
    layers = [Linear(k, len(weight), False).double() for weight in weights]
    bits = [QuantizedWeight.of(weight, "int8") for weight in weights]
    cos, sin = draw(2, 1, 1, 8)
    heads = [draw(1, 1, h, 16) for h in (4, 2)]
    return {
        "linears": (lambda x: linears(x, weights, (None, None)), [x]),
        "linears in their weights": (lambda *w: linears(x, w, (None, None)), weights),
        "project": (lambda x: project(x, *layers), [x]),
        "linears in few bits": (lambda x: linears(x, bits, (None, None)), [x]),
        "apply_rotary_to_both": (lambda q, k: apply_rotary_to_both(q, k, cos, sin), heads),
    }


@pytest.mark.parametrize("name", one_call_of_several())
def test_one_call_of_several_is_plain_calls_in_a_transform(name):
    several, given = one_call_of_several()[name]
    tangents = random_like(given)

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(several(*tensors))

    with torch.no_grad():
        reset()
        plain, expected = function(*given), function(*tangents)
        assert {*used_backends().values()} == {"native"}
        reset()
        _, found = torch.func.jvp(function, tuple(given), tuple(tangents))
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(*pair) for pair in zip(given, tangents, strict=True)]
            ours = [forward_ad.unpack_dual(y).tangent.clone() for y in function(*duals)]
        batches = [torch.stack(pair) for pair in zip(given, tangents, strict=True)]
        outputs = torch.vmap(function)(*batches)
        assert "native" not in used_backends().values()
    for tangent in (found, ours):
        torch.testing.assert_close([*tangent], [*expected])
    for y, *alone in zip(outputs, plain, expected, strict=True):
        torch.testing.assert_close([*y], alone)
    weights = random_like([*plain])

    def total(*tensors: Tensor) -> Tensor:
        return product(weights, [*function(*tensors)])

    gradients = torch.func.grad(total, tuple(range(len(given))))(*given)
    torch.testing.assert_close(product([*gradients], tangents), product(weights, [*expected]))


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
