"""The optimisers of `optim=`: AdamW, and Muon for the matrices of the hidden layers."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from zoo.config.schema.optim import Optim
from zoo.errors import UserError


def make_optimiser(model: nn.Module, optim: Optim) -> torch.optim.Optimizer:
    """The optimiser of a configuration over a model's trainable parameters.

    Weight decay acts on matrices alone, and not on those that an architecture exempts.
    Raises UserError where `optim=muon` would find no matrix of a hidden layer.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices: list[nn.Parameter] = []
    if optim.name == "muon":
        matrices = [p for p in hidden_matrices(model) if p.requires_grad]
        if not matrices:
            raise UserError("optim=muon: the model has no linear layer it acts on. Use adamw.")
    rest = _without(trained, matrices)
    decayed = [p for p in rest if p.ndim >= 2 and not getattr(p, "no_weight_decay", False)]
    adamw = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": optim.weight_decay},
            {"params": _without(rest, decayed), "weight_decay": 0.0},
        ],
        lr=optim.lr,
        betas=optim.betas,
        eps=optim.eps,
    )
    if not matrices:
        return adamw
    muon = torch.optim.Muon(
        matrices,
        lr=optim.lr,
        weight_decay=optim.weight_decay,
        momentum=optim.momentum or 0.0,
        adjust_lr_fn="match_rms_adamw",
    )
    return Together(adamw, muon)


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The weights of linear layers between the embedding and the head, each once.

    Not those that an architecture exempts from weight decay, and no convolutions, biases, gains or
    tables, which are no maps between two spaces of activations.
    """
    ends = [getattr(model, name).weight for name in ("embedding", "head") if hasattr(model, name)]
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    weights = {id(w): w for w in (layer.weight for layer in layers) if isinstance(w, nn.Parameter)}
    wanted = [w for w in weights.values() if not getattr(w, "no_weight_decay", False)]
    return _without(wanted, ends)


def _without(some: Iterable[nn.Parameter], others: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    known = {id(p) for p in others}
    return [p for p in some if id(p) not in known]


class Together(torch.optim.Optimizer):
    """Several optimisers as one: Lightning's loop, a schedule and a checkpoint know a single one.

    Its groups and its state are those of its parts, which see every change of a learning rate.
    """

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Let the parts work on this optimiser's own groups and state."""
        groups = iter(self.param_groups)
        for part in self.parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of each part, on the same gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss
