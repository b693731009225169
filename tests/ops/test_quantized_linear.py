"""A product with a matrix in 8 or 4 bits is the sum over what its bits stand for."""

import fuzz
import pytest
import torch

from zoo.ops.quantized_linear import (
    GROUP,
    MAX_ROWS,
    quantized_linear,
    quantized_linears,
    restored,
    shape,
)
from zoo.ops.runtime.dispatch import reset, used_backends


def parts(bits: str, n: int, k: int, generator: torch.Generator | None = None):
    """Random bits and scales of a matrix (n, k)."""
    size, scales = ((n, k), (n, 1)) if bits == "int8" else ((n, k // 2), (n, k // GROUP * 2))
    least = -127 if bits == "int8" else -128
    q = torch.randint(least, 128, size, dtype=torch.int8, generator=generator)
    return q, torch.randn(scales, generator=generator).bfloat16()


def by_hand(q, scale, o: int, i: int) -> float:
    """One number of the matrix, as the module's first lines say it."""
    if scale.shape[1] == 1:
        return float(scale[o, 0]) * int(q[o, i])
    group, place = divmod(i, GROUP)
    byte = int(q[o, group * GROUP // 2 + place % 16]) % 256
    four = byte % 16 if place < 16 else byte // 16
    s, z = scale[o, 2 * group : 2 * group + 2].tolist()
    return s * (four - 16 if four > 7 else four) + z


@pytest.mark.parametrize(("bits", "k"), [("int8", 7), ("int8", 64), ("int4", 96)])
def test_the_matrix_is_what_its_bits_say(bits, k):
    q, scale = parts(bits, 5, k)
    expected = [[by_hand(q, scale, o, i) for i in range(k)] for o in range(5)]
    torch.testing.assert_close(restored(q, scale), torch.tensor(expected))
    assert shape(q, scale) == (5, k)


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("bits", ["int8", "int4"])
@pytest.mark.parametrize("n", [1, 3, 32, 37, 133])
@pytest.mark.parametrize("rows", [0, 1, 2, 4, 7, MAX_ROWS])
def test_backends_agree_with_the_definition_in_float64(backend, bits, n, rows):
    for k in (1, 15, 33, 70, 160, 1100) if bits == "int8" else (32, 160, 1056):
        q, scale = parts(bits, n, k)
        x = torch.randn(rows, 2 * k)[:, ::2]
        expected = quantized_linear(x.double(), q, scale, "reference")
        most = x.abs().double() @ restored(q, scale).abs().double().T  # where nothing cancels
        torch.testing.assert_close(
            quantized_linear(x.double(), q, scale, backend), expected, rtol=1e-12, atol=1e-10
        )
        found = quantized_linear(x, q, scale, backend)
        assert found.dtype == torch.float32
        assert ((found - expected).abs() <= 1e-6 * most).all()
        narrow = quantized_linear(x.bfloat16(), q, scale, backend)
        assert narrow.dtype == torch.bfloat16
        assert ((narrow - expected).abs() <= 2.0**-6 * most).all()


@pytest.mark.parametrize("bits", ["int8", "int4"])
@pytest.mark.parametrize("numbers", ["one huge", "tiny", "zeros", "infinite", "nan"])
def test_inputs_of_any_size_have_the_product_of_the_definition(bits, numbers):
    q, scale = parts(bits, 9, 640)
    x = torch.randn(1, 640)
    if numbers == "tiny":
        x *= 1e-33
    elif numbers == "zeros":
        x[:, :320] = 0
    else:
        x[0, 7] = {"one huge": 1e6, "infinite": torch.inf, "nan": torch.nan}[numbers]
    expected = quantized_linear(x.double(), q, scale, "reference")
    found = quantized_linear(x, q, scale, "native")
    most = x.abs().max() * restored(q, scale).abs().double().sum(1)  # x has 24 bits of its largest
    close = (found - expected).abs() <= 2.0**-22 * most
    assert (close | (found == expected) | (found.isnan() & expected.isnan())).all()


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_several_matrices_have_each_its_own_product(bits):
    for rows in ([1, 1], [2], [5]):
        x = torch.randn(*rows, 96)
        matrices = [parts(bits, n, 96) for n in (33, 0, 7, 64)]
        for few in (matrices[:1], matrices, matrices + matrices[:2]):
            found = quantized_linears(x, few)
            for y, one in zip(found, few, strict=True):
                assert torch.equal(y, quantized_linear(x, *one))
    other = parts("int8" if bits == "int4" else "int4", 5, 96)
    found = quantized_linears(x, [matrices[0], other])
    assert torch.equal(found[1], quantized_linear(x, *other))
    with pytest.raises(ValueError, match=r"x is \(2, 95\), must be \(.., 96\)"):
        quantized_linears(torch.randn(2, 95), matrices)


def test_any_leading_dimensions_and_none():
    q, scale = parts("int8", 6, 9)
    x = torch.randn(2, 3, 9)
    whole = quantized_linear(x, q, scale)
    assert whole.shape == (2, 3, 6)
    torch.testing.assert_close(quantized_linear(x[1, 2], q, scale), whole[1, 2])


def test_the_kernel_is_for_few_rows_without_a_gradient():
    q, scale = parts("int8", 6, 9)
    wanted = torch.randn(1, 9, requires_grad=True)
    for x, expected in (
        (torch.randn(MAX_ROWS, 9), "native"),
        (torch.randn(MAX_ROWS + 1, 9), "torch"),
        (wanted, "torch"),
    ):
        reset()
        quantized_linear(x, q, scale)
        assert used_backends() == {"quantized_linear": expected}


def test_threads_do_not_change_a_bit():
    q, scale = parts("int4", 500, 320)
    x, threads, results = torch.randn(5, 320), torch.get_num_threads(), []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(quantized_linear(x, q, scale, "native"))
    torch.set_num_threads(threads)
    assert torch.equal(*results)


@pytest.mark.mistyped
def test_what_does_not_fit_is_refused():
    q, scale = parts("int4", 6, 64)
    with pytest.raises(ValueError, match=r"x is \(2, 63\), must be \(.., 64\)"):
        quantized_linear(torch.randn(2, 63), q, scale)
    for wrong in (scale[:5], scale[:, :3], scale[:, :0]):
        with pytest.raises(ValueError, match="do not fit"):
            quantized_linear(torch.randn(2, 64), q, wrong)
    with pytest.raises(TypeError, match=r"q is torch\.uint8, must be torch\.int8"):
        quantized_linear(torch.randn(2, 64), q.view(torch.uint8), scale)


def random_quantized_linear_call(draw: fuzz.Draw) -> fuzz.Call:
    bits, n = draw.random.choice(["int8", "int4"]), draw.size(32)
    k = draw.size(16, zero=False) if bits == "int8" else draw.random.choice([32, 64, 96, 256])
    q, scale = parts(bits, n, k, draw.torch)
    rows = [draw.batch(), draw.random.choice([0, 1, 3, 4, 5, 9])]

    def run(backend, x):
        return (quantized_linear(x, q, scale, backend),)

    return fuzz.Call(run, [draw.layout(draw.values(*rows, k))], gradients=False)
