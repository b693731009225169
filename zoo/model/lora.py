"""Trains low-rank adapters in place of a model's weights (LoRA; Hu 2021, arXiv 2106.09685).

Beside a linear layer W of the blocks, `peft` trains A (rank, inputs) and B (outputs, rank):

    y = W x + (alpha / rank) B A x,    B = 0 before training

What is trained is all that a run's checkpoints hold; the frequencies of CLEX are, too. Where the
model is opened, (alpha / rank) B A is added to the W of the run that was tuned, without `peft`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zoo.config.schema.model import Lora
from zoo.errors import refuse_unknown
from zoo.model.backbone import Backbone
from zoo.model.later import Later, read

A, B = ".lora_A.default.weight", ".lora_B.default.weight"  # peft's names, behind the layer's


def add_adapters(model: Backbone, lora: Lora) -> None:
    """Put adapters beside the linear layers that `lora` names, and freeze the other weights.

    Raises UserError where it names a layer that the model does not have, or one whose weight its
    mixer reads without calling the layer, as Mamba's in_proj.
    """
    from peft import LoraConfig, inject_adapter_in_model  # pyright: ignore[reportMissingImports]

    layers = adapted_layers(model, lora)
    alpha: Any = lora.alpha_or_default  # peft declares an int and computes with any number
    options = LoraConfig(r=lora.rank or 0, lora_alpha=alpha, target_modules=layers)
    inject_adapter_in_model(options, model)
    if model.frequencies is not None:  # new, so there is nothing to adapt
        model.frequencies.requires_grad_(True)


def adapted_layers(model: Backbone, lora: Lora) -> list[str]:
    """Names of the linear layers that get an adapter: those whose names end as a target says."""
    layers = _called_layers(model)
    if lora.targets is None:
        return layers
    ends = {name: name.split(".", 2)[2] for name in layers}  # without blocks.<number>
    for target in lora.targets:
        if not any(_ends_in(name, target) for name in layers):
            allowed = sorted({*ends.values()})
            refuse_unknown(f"lora.targets=[{target}]", "linear layer", target, allowed)
    return [name for name in layers if any(_ends_in(name, target) for target in lora.targets)]


def _ends_in(name: str, target: str) -> bool:
    return name.endswith(f".{target}")


def _called_layers(model: Backbone) -> list[str]:
    """Names of the linear layers of the blocks that the model calls to read a short text."""
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if name.startswith("blocks.") and isinstance(layer, nn.Linear)
    }
    called: set[str] = set()
    hooks = [
        layer.register_forward_pre_hook(lambda *_, name=name: called.add(name))
        for name, layer in layers.items()
    ]
    tokens = torch.zeros(1, max(2, model.min_window), dtype=torch.long)
    try:
        with torch.no_grad():
            model(tokens.to(model.embedding.weight.device))
    finally:
        for hook in hooks:
            hook.remove()
    return [name for name in layers if name in called]


def trained_names(model: nn.Module) -> set[str]:
    """Names of the parameters that are trained."""
    return {name for name, weight in model.named_parameters() if weight.requires_grad}


class _Merged(Later):
    """A weight and (alpha / rank) B A."""

    def __init__(self, weight: Tensor | Later, a: Tensor, b: Tensor, scale: float) -> None:
        self.weight, self.a, self.b, self.scale = weight, a, b, scale
        self.shape, self.dtype = weight.shape, weight.dtype

    def read(self) -> Tensor:
        return read(self.weight) + self.scale * (self.b @ self.a)


def merged(
    base: Mapping[str, Any], trained: Mapping[str, Tensor], lora: Lora, later: bool = False
) -> dict[str, Any]:
    """The weights of a tuned model: those of its base, the adapters added, and what is new.

    Args:
        base: every weight of the model that was tuned, by its name in a Backbone.
        trained: what a checkpoint of the tuned run holds, by its name there.
        later: leave each sum to be computed when it is read.
    """
    assert lora.rank is not None
    scale = lora.alpha_or_default / lora.rank
    found = {name: base[name] for name in base if not name.startswith("frequencies.")}
    for name, weight in trained.items():
        if name.endswith(A):
            layer = name.removesuffix(A)
            one = _Merged(base[f"{layer}.weight"], weight, trained[layer + B], scale)
            found[f"{layer}.weight"] = one if later else one.read()
        elif not name.endswith(B):
            found[name] = weight
    return found


def in_peft_format(
    trained: Mapping[str, Tensor], lora: Lora, base: str, layer_name: Callable[[str], str]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The contents of `peft`'s adapter_config.json and adapter_model.safetensors.

    Args:
        trained: what a checkpoint holds, by its name there.
        base: names the model that is adapted.
        layer_name: the name that a layer has in that model.
    """
    tensors: dict[str, Tensor] = {}
    for end in (A, B):
        for name in (name for name in trained if name.endswith(end)):
            layer = layer_name(name.removesuffix(end))
            tensors[f"base_model.model.{layer}{end.replace('.default', '')}"] = trained[name]
    layers = [name.removesuffix(A) for name in trained if name.endswith(A)]
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha_or_default,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": [layer_name(layer) for layer in layers],
    }, tensors
