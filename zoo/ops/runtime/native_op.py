"""Registers the kernels of an op as an operator of PyTorch, with its gradient.

`NativeOp` is all there is between an op's mathematics and its kernels: schema, fake tensors,
autograd, CUDA, FLOP formula, which types are read, and the way past PyTorch's dispatcher.
"""

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from functools import partial, reduce
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from zoo.ops.runtime.cpu import CpuKernel
from zoo.ops.runtime.cuda import DTYPES, CudaKernel
from zoo.ops.runtime.dispatch import Available, shapes_only
from zoo.ops.runtime.nvrtc import Macros

Form = Callable[..., Any]  # tensors and numbers -> a tensor, or a sequence of them


class Signature(NamedTuple):
    """A signature like "x bias? eps:float -> y last": a tensor, one that may be None, a number."""

    inputs: dict[str, str]  # name -> type in a schema
    outputs: list[str]

    @classmethod
    def read(cls, text: str) -> "Signature":
        inputs, outputs = text.split("->")
        types = {}
        for word in inputs.split():
            name, _, number = word.rstrip("?").partition(":")
            types[name] = number or ("Tensor?" if word.endswith("?") else "Tensor")
        return cls(types, outputs.split())

    @property
    def tensors(self) -> list[str]:
        return [name for name, kind in self.inputs.items() if kind.startswith("Tensor")]

    @property
    def schema(self) -> str:
        arguments = ", ".join(f"{kind} {name}" for name, kind in self.inputs.items())
        returns = ", ".join("Tensor" for _ in self.outputs)
        return f"({arguments}) -> " + (returns if len(self.outputs) == 1 else f"({returns})")


class NativeOp:
    """An op with kernels, called with tensors that are ready for them.

    Args:
        name: of the op.
        forward: its signature. Where the backward needs more than inputs and outputs, the last
            input is `save:bool` and the last output `saved`, left empty unless `save`; callers
            see neither.
        backward: signature of the gradient. Its inputs are the gradients of the outputs, called
            "d" + name, of which all but the first may be None; then tensors, and numbers, by the
            names they have in `forward`. Its outputs are gradients of inputs, called "d" + name;
            that of an absent one is ignored.
        cpu, cuda: forward and backward with these signatures, of which the backward may be None.
            They allocate their outputs and call kernels, which do nothing under `shapes_only`.
        kernels: the kernel of the CPU, and that of CUDA or None.
        flops: operations by the shapes of the inputs, by name.
    """

    def __init__(
        self,
        name: str,
        *,
        forward: str,
        backward: str,
        cpu: tuple[Form, Form],
        cuda: tuple[Form, Form] | None = None,
        kernels: tuple[CpuKernel, CudaKernel | None],
        flops: Callable[..., int] | None = None,
    ) -> None:
        self.name, self.kernels = name, kernels
        self.signature, gradient = Signature.read(forward), Signature.read(backward)
        self._saves = self.signature.outputs[-1] == "saved"
        self._forward = {"cpu": cpu[0], "cuda": (cuda or cpu)[0]}
        self._backward = {"cpu": cpu[1], "cuda": (cuda or cpu)[1]}
        self.op = _operator(name, self.signature, self._forward, cuda is not None)
        self.backward_op = _operator(f"{name}_backward", gradient, self._backward, cuda is not None)
        inputs, outputs = [*self.signature.inputs], self.signature.outputs
        self._results = len(outputs) - self._saves
        saved = [*gradient.inputs][self._results :]
        # of the inputs followed by the outputs
        self._saved = [(inputs + outputs).index(x) for x in saved if x in gradient.tensors]
        self._numbers = [inputs.index(x) for x in saved if x not in gradient.tensors]
        given = [f"d{name}" for name in inputs]
        self._gradients = [
            gradient.outputs.index(x) if x in gradient.outputs else None for x in given
        ]
        self.op.register_autograd(self._differentiate, setup_context=self._save)
        if flops:
            self._count = flops
            register_flop_formula(getattr(torch.ops.zoo, name))(self._flops)

    def __call__(self, *inputs: Any) -> Any:
        """Run on the device of the first input; returns the outputs, without `saved`."""
        if can_bypass_dispatcher(*inputs):
            form = self._forward["cpu" if inputs[0].is_cpu else "cuda"]
            return form(*inputs, False)[: self._results] if self._saves else form(*inputs)
        if not self._saves:
            return self.op(*inputs)
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        save = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
        return self.op(*inputs, save)[: self._results]

    def available(self, device: torch.device, dtype: torch.dtype, macros: Macros = ()) -> Available:
        """For `select_backend`: whether a kernel reads sequences of this type on this device."""
        on_cpu, on_cuda = self.kernels
        if device.type == "cpu":
            return on_cpu.usable
        if device.type != "cuda" or on_cuda is None or dtype not in DTYPES:
            return False
        return partial(on_cuda.usable, device, dtype, macros)

    def _save(self, ctx: Any, inputs: Sequence[Any], output: Any) -> None:
        """Save what the backward needs."""
        outputs = (output,) if isinstance(output, Tensor) else output
        values = (*inputs, *outputs)
        ctx.save_for_backward(*[values[i] for i in self._saved])
        ctx.numbers = [inputs[i] for i in self._numbers]
        ctx.absent = [x is None for x in inputs]
        ctx.first = outputs[0].shape, outputs[0].dtype, outputs[0].device
        if self._saves:
            ctx.saved = inputs[-1]
            ctx.mark_non_differentiable(outputs[-1])
        ctx.set_materialize_grads(False)

    def _differentiate(self, ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        if self._saves and not ctx.saved:
            raise RuntimeError(f"{self.name}: the forward saved nothing for a backward")
        first, *others = gradients[: self._results]
        if first is None:
            shape, dtype, device = ctx.first
            first = torch.zeros(shape, dtype=dtype, device=device)
        arguments = (first, *others, *ctx.saved_tensors, *ctx.numbers)
        form = self.backward_op
        if can_bypass_dispatcher(*arguments):
            form = self._backward["cpu" if first.is_cpu else "cuda"]
        found = form(*arguments)
        found = (found,) if isinstance(found, Tensor) else found
        pairs = zip(self._gradients, ctx.absent, strict=True)
        return tuple(None if i is None or absent else found[i] for i, absent in pairs)

    def _flops(self, *shapes: Any, **_: Any) -> int:
        return self._count(**dict(zip(self.signature.inputs, shapes, strict=True)))


def _operator(name: str, signature: Signature, forms: dict[str, Form], on_cuda: bool) -> Any:
    """Register a custom operator, whose fake is its own code with kernels that do not run."""
    schema = signature.schema
    op = torch.library.custom_op(
        f"zoo::{name}", forms["cpu"], mutates_args=(), device_types="cpu", schema=schema
    )
    if on_cuda:
        op.register_kernel("cuda", forms["cuda"])

    def fake(*inputs: Any) -> Any:
        device = next(x.device.type for x in inputs if isinstance(x, Tensor))
        with shapes_only:
            return forms["cuda" if device == "cuda" else "cpu"](*inputs)

    op.register_fake(fake)
    return op


# Parts of PyTorch that every call passes through, whatever acts on it.
_ALWAYS = torch._C.DispatchKeySet(torch._C.DispatchKey.BackendSelect) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.ADInplaceOrView
)


def can_bypass_dispatcher(*inputs: Any) -> bool:
    """Return whether an op may call its kernel directly, which saves PyTorch's dispatch of 0.1 ms.

    That is so where no gradient is recorded and nothing acts on operators: no compiler or tracer,
    no dispatch mode (a FLOP counter, fake tensors), no function transform, no forward gradients, no
    subclass of tensors.
    """
    if torch.compiler.is_compiling() or forward_ad._current_level >= 0:
        return False
    grad = torch.is_grad_enabled()
    for x in inputs:
        kind = type(x)
        if kind is Tensor or kind is torch.nn.Parameter:
            if grad and x.requires_grad:
                return False
        elif isinstance(x, Tensor):
            return False
    return (torch._C._dispatch_tls_local_include_set() - _ALWAYS).raw_repr() == 0


def common_dtype(*sequences: Tensor | None) -> torch.dtype:
    """Return the type that all of them are promoted to."""
    dtypes = {x.dtype for x in sequences if x is not None}
    return dtypes.pop() if len(dtypes) == 1 else reduce(torch.promote_types, dtypes)


def compute_dtypes(backend: str, *sequences: Tensor | None) -> tuple[torch.dtype, torch.dtype]:
    """Return the types in which a backend computes: of sequences, and of everything else.

    Both are float32, or float64 where a sequence is; but CUDA kernels read narrow sequences.
    """
    common = common_dtype(*sequences)
    wide = torch.promote_types(common, torch.float32)
    narrow = backend == "native" and any(x is not None and x.is_cuda for x in sequences)
    return (common if narrow else wide), wide


def every_kernel() -> dict[str, tuple[CpuKernel, CudaKernel | None]]:
    """Return every op's kernels, by folder of kernels/: that of the CPU, and of CUDA or None."""
    package = importlib.import_module("zoo.ops")
    found = {}
    for info in pkgutil.iter_modules(package.__path__):
        module = vars(importlib.import_module(f"zoo.ops.{info.name}"))
        on_cpu = [x for x in module.values() if isinstance(x, CpuKernel)]
        on_cuda = [x for x in module.values() if isinstance(x, CudaKernel)]
        if on_cpu:
            found[Path(on_cpu[0].source).parent.name] = (on_cpu[0], on_cuda[0] if on_cuda else None)
    return found
