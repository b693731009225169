"""Makes models smaller after training: matrices of low rank, or zeros in place of small numbers.

    rank        W ~ E D, the nearest product of that rank (Eckart & Young 1936, by SVD): the LED
                units of Winata 2020 (arXiv 1910.13923) out of a trained model
    sparsity    a share of each matrix, its smallest numbers, is zero (Han 2015, section 3, arXiv
                1506.02626), or the two smallest of every four inputs, "2:4" (Mishra 2021, section
                3, arXiv 2104.08378)

Both act on the linear layers of the blocks: not on the embedding, the head, norms or recurrent
parameters. Layers that are too small to gain from the rank, or do not cut into fours, stay.
Departure from Han 2015, which prunes and trains in turn: once, at one share for every matrix.

Zeros are stored as numbers: a model with them is as large and as fast as before.
"""

from collections.abc import Callable, Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from zoo.config.schema.model import PAIRS, Shrunk
from zoo.errors import refuse
from zoo.mixers.low_rank import LowRank
from zoo.model.backbone import Backbone
from zoo.ops.linear import Linear

MATRICES = (nn.Linear, Linear)  # these very types: what is more than a matrix stays


def shrink(model: Backbone, how: Shrunk) -> Backbone:
    """Make a trained model smaller in place; return it.

    Raises:
        UserError: no layer of it can be.
    """
    if how.rank is not None:
        factorize(model, how.rank, LowRank.from_dense)
    else:
        assert how.sparsity is not None
        prune_matrices(model, how.sparsity)
    return model


def factorize(model: Backbone, rank: int, unit: Callable[[nn.Linear, int], LowRank]) -> None:
    """Put a unit of that rank in place of each matrix that has more numbers, in place.

    Args:
        unit: makes it; `LowRank.in_place_of` has new weights, `LowRank.from_dense` the nearest.

    Raises:
        UserError: no matrix has more, or the model has such units already.
    """
    if any(isinstance(one, LowRank) for one in model.blocks.modules()):
        refuse("rank", rank, "the model is made of units of low rank already", "Use sparsity=")
    layers = [
        (parent, name, layer)
        for parent in model.blocks.modules()
        for name, layer in parent.named_children()
        if isinstance(layer, nn.Linear)
        and type(layer) in MATRICES
        and rank * (layer.in_features + layer.out_features) < layer.weight.numel()
    ]
    if not layers:
        rule = "products of that rank have no fewer numbers than the model's matrices"
        refuse("rank", rank, rule, "Use a smaller rank")
    for parent, name, layer in layers:
        setattr(parent, name, unit(layer, rank))


def multiplied_out(model: Backbone) -> Backbone:
    """Put plain matrices in place of units of low rank, in place; return the model."""
    for parent in [*model.blocks.modules()]:
        for name, layer in parent.named_children():
            if isinstance(layer, LowRank):
                outputs, inputs = layer.weight.shape
                dense = Linear(inputs, outputs, bias=layer.bias is not None)
                dense.weight = nn.Parameter(layer.weight.detach())
                if layer.bias is not None:
                    dense.bias = nn.Parameter(layer.bias.detach())
                setattr(parent, name, dense.requires_grad_(False))
    return model


def prune_matrices(model: Backbone, sparsity: float | str) -> None:
    """Set the smallest numbers of each matrix to zero, in place; see the module."""
    layers = _matrices(model)
    if sparsity == PAIRS:
        layers = [layer for layer in layers if layer.in_features % 4 == 0]
    if not layers and sparsity == PAIRS:
        rule = "acts on linear layers whose inputs cut into fours, and the model has none"
        refuse("sparsity", sparsity, rule, "Use a share, such as sparsity=0.5")
    if not layers:
        rule = "acts on linear layers, and the model has none"
        refuse("sparsity", sparsity, rule, "Choose another run")
    if sparsity != PAIRS:
        sizes = [layer.weight.numel() for layer in layers]
        zeros = [round(float(sparsity) * size) for size in sizes]  # as torch.nn.utils.prune counts
        if not any(zeros):
            refuse(
                "sparsity",
                sparsity,
                f"rounds to none of {max(sizes)} numbers",
                "Use a larger share",
            )
        if any(zero == size for zero, size in zip(zeros, sizes, strict=True)):
            rule = f"leaves nothing of a matrix of {min(sizes)} numbers"
            refuse("sparsity", sparsity, rule, "Use a smaller share")
    for layer in layers:
        if sparsity == PAIRS:
            prune.custom_from_mask(layer, "weight", _larger_pairs(layer.weight.detach()))
        else:
            prune.l1_unstructured(layer, "weight", float(sparsity))
        prune.remove(layer, "weight")


def _larger_pairs(weight: Tensor) -> Tensor:
    """1 at the two largest of every four inputs of each output, else 0."""
    fours = weight.abs().unflatten(1, (-1, 4))
    places = fours.topk(2, -1).indices
    return torch.zeros_like(fours).scatter_(-1, places, 1).flatten(1)


def pruned(model: Backbone) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each matrix that has zeros, with True where it has none."""
    for layer in _matrices(model):
        nonzero = layer.weight.detach() != 0
        if not nonzero.all():
            yield layer.weight, nonzero


def _matrices(model: Backbone) -> list[nn.Linear]:
    return [cast(nn.Linear, one) for one in model.blocks.modules() if type(one) in MATRICES]
