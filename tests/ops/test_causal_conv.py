"""The convolution is its sum: every backend, every gradient, any chunking."""

import functools

import emulator
import fuzz
import pytest
import torch
from torch import Tensor

from zoo.errors import UserError
from zoo.ops import causal_conv as module
from zoo.ops.causal_conv import causal_conv
from zoo.ops.runtime import cuda

NARROW = (torch.bfloat16,)  # read by the kernel besides float32 and float64
BACKENDS = ["reference", "torch", "native"]
# (b, t, d, width): shorter than the window, widths no vector divides, several segments
SHAPES = [(1, 1, 1, 2), (2, 2, 19, 4), (2, 5, 40, 8), (1, 515, 17, 3), (3, 1100, 300, 4)]


def arguments(b: int, t: int, d: int, width: int, dtype=torch.float64) -> dict:
    torch.manual_seed(0)
    shapes = {"x": (b, t, d), "weight": (d, width), "bias": (d,), "state": (b, width - 1, d)}
    values = {k: torch.randn(s, dtype=torch.float64) for k, s in shapes.items()}
    return {k: v.to(dtype).requires_grad_() for k, v in values.items()}


def everything(args: dict, backend: str, activation: str | None = "silu") -> dict[str, Tensor]:
    y, state = causal_conv(**args, activation=activation, backend=backend)
    torch.manual_seed(1)
    weights = [torch.randn(a.shape, dtype=torch.float64).to(a.dtype) for a in (y, state)]
    loss = (y * weights[0]).sum() + (state * weights[1]).sum()
    gradients = torch.autograd.grad(loss, list(args.values()))
    return {"y": y, "last": state, **dict(zip(args, gradients, strict=True))}


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    for name, value in wanted.items():
        error = (found[name].double() - value).norm() / value.norm()
        assert error <= tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize("backend", BACKENDS)
def test_three_tokens_by_hand(backend):
    x = torch.tensor([[[1.0], [2.0], [3.0]]])
    weight, bias, state = torch.tensor([[10.0, 1.0]]), torch.tensor([0.5]), torch.tensor([[[7.0]]])
    y, last = causal_conv(x, weight, bias, None, state, backend=backend)
    torch.testing.assert_close(y, torch.tensor([[[71.5], [12.5], [23.5]]]))
    torch.testing.assert_close(last, torch.tensor([[[3.0]]]))
    y, _ = causal_conv(x, weight, None, backend=backend)  # from nothing, through silu
    torch.testing.assert_close(y, torch.nn.functional.silu(torch.tensor([[[1.0], [12.0], [23.0]]])))


@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", ["torch", "native"])
def test_float64_is_the_reference(backend, shape, activation):
    args = arguments(*shape)
    wanted = everything(args, "reference", activation)
    assert_close(everything(args, backend, activation), wanted, 1e-14)


def test_native_float32_gradients_are_right_to_a_millionth():
    wanted = everything(arguments(2, 700, 40, 4), "reference")
    assert_close(everything(arguments(2, 700, 40, 4, torch.float32), "native"), wanted, 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_chunks_with_the_state_carried_are_the_whole(backend):
    args = arguments(2, 20, 19, 4)
    wanted = everything(args, backend)
    ys, state = [], args["state"]
    for part in args["x"].split([1, 2, 5, 12], 1):
        y, state = causal_conv(part, args["weight"], args["bias"], state=state, backend=backend)
        ys.append(y)
    y = torch.cat(ys, 1)
    torch.manual_seed(1)
    loss = (y * torch.randn_like(y)).sum() + (state * torch.randn_like(state)).sum()
    gradients = dict(zip(args, torch.autograd.grad(loss, list(args.values())), strict=True))
    assert_close({"y": y, "last": state, **gradients}, wanted, 1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    args = arguments(2, 5, 3, 4)
    x, weight, bias, state = args.values()
    assert torch.autograd.gradcheck(
        lambda x, w, bias, state: causal_conv(x, w, bias, "silu", state, backend),
        (x, weight, bias, state),
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_native_writes_all_of_its_outputs(shape):
    torch.use_deterministic_algorithms(True)  # fills every torch.empty with NaN
    try:
        assert torch.isnan(torch.empty(3)).all()
        found = everything(arguments(*shape, dtype=torch.float32), "native")
    finally:
        torch.use_deterministic_algorithms(False)
    for name, value in found.items():
        assert torch.isfinite(value).all(), name


def test_native_gives_the_same_bits_with_any_number_of_threads():
    args, threads = arguments(2, 1100, 150, 4, torch.float32), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(everything(args, "native"))
    finally:
        torch.set_num_threads(threads)
    for name, value in results[0].items():
        assert all(torch.equal(value, other[name]) for other in results), name


def test_slices_and_bfloat16_are_read_as_they_are():
    wide = torch.randn(2, 9, 48, dtype=torch.bfloat16)
    weight = torch.randn(24, 4)
    y, state = causal_conv(wide[..., 24:], weight, backend="native")
    wanted, last = causal_conv(wide[..., 24:].double(), weight.double(), backend="reference")
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.bfloat16)
    assert_close({"y": y, "last": state}, {"y": wanted, "last": last}, 4e-3)


def test_native_is_a_good_citizen_of_torch():
    x, weight, bias, state = arguments(2, 5, 3, 4).values()
    torch.library.opcheck(module.CONV.op, (x, weight, bias, state, True))
    torch.library.opcheck(module.CONV.op, (x, weight, None, state, False))


@pytest.mark.mistyped
def test_what_does_not_fit_is_refused():
    x, weight = torch.randn(1, 4, 3), torch.randn(3, 4)
    with pytest.raises(ValueError, match="weight is"):
        causal_conv(x, weight[:2])
    with pytest.raises(ValueError, match="2 to 8"):
        causal_conv(x, torch.randn(3, 9))
    with pytest.raises(ValueError, match="no tokens"):
        causal_conv(x[:, :0], weight)
    with pytest.raises(UserError, match="activation"):
        causal_conv(x, weight, activation="relu")


# (b, t, d), whether threads run last first, activation: shorter than the window, several segments
EMULATED = [((2, 2, 19), True, "silu"), ((2, 131, 5), False, "silu"), ((1, 64, 130), True, None)]
EMULATED += [((2, 131, 130), False, "silu")]  # several segments of several groups of channels


@emulator.needed
@pytest.mark.parametrize(("shape", "reverse", "activation"), EMULATED)
def test_cuda_is_the_reference(shape, reverse, activation, monkeypatch):
    emulator.install(monkeypatch, reverse=reverse)
    torch.use_deterministic_algorithms(True)  # every `torch.empty` is full of NaN
    try:
        args = {k: a.detach() for k, a in arguments(*shape, 4, torch.float32).items()}
        x, weight, bias, state = args.values()
        y, last = module._forward_cuda(x, weight, bias, state, activation == "silu")
        torch.manual_seed(1)
        dy, dlast = (torch.randn(a.shape, dtype=torch.float64).float() for a in (y, last))
        gradients = module._backward_cuda(dy, dlast, x, weight, bias, state, activation == "silu")
    finally:
        torch.use_deterministic_algorithms(False)
    wide = {k: a.double().requires_grad_() for k, a in args.items()}
    wanted = everything(wide, "reference", activation)
    found = {"y": y, "last": last, **dict(zip(args, gradients, strict=True))}
    assert_close(found, wanted, 1e-6)


def test_cuda_runs_more_tokens_than_a_grid_has_rows(monkeypatch):
    """65535 blocks along the grid's second side would be 4.19 million tokens."""
    tokens, grids = 5_000_000, []
    monkeypatch.setattr(module.CUDA, "call", lambda _, grid, *__, **___: grids.append(grid))
    x, weight = torch.zeros(1, tokens, 1), torch.zeros(1, 4)
    module._forward_cuda(x, weight, None, torch.zeros(1, 3, 1), True)
    module._backward_cuda(x, None, x, weight, None, torch.zeros(1, 3, 1), True)
    assert grids == 2 * [(-(-tokens // module.CUDA_SEGMENT), 1, 1)]
    most = cuda.MAX_GRID
    assert all(blocks <= limit for blocks, limit in zip(grids[0], most, strict=True))


def random_causal_conv_call(draw: fuzz.Draw) -> fuzz.Call:
    b, t, d = draw.batch(), draw.size(512, zero=False), draw.size()
    width = draw.random.randint(2, 8)
    tensors = {
        "x": draw.values(b, t, d),
        "weight": draw.values(d, width, dtype=draw.wide),
        "bias": draw.maybe(draw.values(d, dtype=draw.wide)),
        "state": draw.maybe(draw.values(b, width - 1, d)),
    }
    activation = draw.random.choice(["silu", None])
    return fuzz.by_name(draw, functools.partial(causal_conv, activation=activation), tensors)
