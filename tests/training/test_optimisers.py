"""AdamW and Muon against their papers' own steps, each on the parameters it is meant for."""

import copy

import pytest
import torch
from building import train_config
from torch import Tensor, nn

from zoo.config.effects import check_names
from zoo.config.schema.optim import Optim
from zoo.errors import UserError
from zoo.model.build import build_model
from zoo.training.optimisers import hidden_matrices, make_optimiser

SETTINGS = {
    "lr": 0.02,
    "weight_decay": 0.5,
    "betas": (0.8, 0.95),
    "eps": 1e-4,
    "warmup_steps": 0,
    "min_lr_ratio": 1.0,
    "clip": 1.0,
}
MUON = Optim(name="muon", momentum=0.9, **SETTINGS)


def model(name: str) -> nn.Module:
    torch.manual_seed(0)
    config = train_config(f"model={name}", "size=tiny", "match=none", "logger=none")
    return build_model(config, 50)[0]


def loss(net: nn.Module, step: int) -> Tensor:
    tokens = torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(step))
    return net.loss(tokens)  # type: ignore[operator]


def rounded(x: Tensor) -> Tensor:
    return x.bfloat16().float()


def orthogonal(x: Tensor) -> Tensor:
    """Jordan 2024: five steps of the quintic iteration on the wide form, kept in bfloat16."""
    y = rounded(x if len(x) <= x.shape[1] else x.T)
    y = rounded(y / rounded(y.norm()))
    for _ in range(5):
        gram = rounded(y @ y.T)
        y = rounded(3.4445 * y + rounded(-4.775 * gram + 2.0315 * gram @ gram) @ y)
    return y if len(x) <= x.shape[1] else y.T


class ByHand:
    """Muon on the matrices, AdamW on the rest, as their papers write them."""

    def __init__(self, net: nn.Module, matrices: list[nn.Parameter]) -> None:
        self.parameters, self.taken = list(net.parameters()), 0
        self.muon = {id(p) for p in matrices}
        self.m = [torch.zeros_like(p) for p in self.parameters]
        self.v = [torch.zeros_like(p) for p in self.parameters]

    @torch.no_grad()
    def step(self, gradients: list[Tensor]) -> None:
        self.taken += 1
        for p, m, v, g in zip(self.parameters, self.m, self.v, gradients, strict=True):
            if p.ndim >= 2 and not hasattr(p, "no_weight_decay"):
                p.mul_(1 - 0.02 * 0.5)
            if id(p) in self.muon:
                m.mul_(0.9).add_(0.1 * g)
                p.sub_(0.02 * 0.2 * max(p.shape) ** 0.5 * orthogonal(0.1 * g + 0.9 * m))
                continue
            m.mul_(0.8).add_(0.2 * g)
            v.mul_(0.95).add_(0.05 * g * g)
            mean, square = m / (1 - 0.8**self.taken), v / (1 - 0.95**self.taken)
            p.sub_(0.02 * mean / (square.sqrt() + 1e-4))


@pytest.mark.parametrize("name", ["transformer", "mamba"])
def test_each_step_of_muon_is_the_plain_one(name):
    """From equal weights: bfloat16 rounds differently, which a few steps would carry far apart."""
    net, other = model(name), model(name)
    optimiser = make_optimiser(net, MUON)
    by_hand = ByHand(other, hidden_matrices(other))
    by_muon = {key for key, p in other.named_parameters() if id(p) in by_hand.muon}
    for step in range(4):
        before = copy.deepcopy(net.state_dict())
        other.load_state_dict(before)
        optimiser.zero_grad()
        loss(net, step).backward()
        optimiser.step()
        by_hand.step([*torch.autograd.grad(loss(other, step), list(other.parameters()))])
        for key, weight in other.state_dict().items():
            moved, apart = (weight - before[key]).norm(), (net.state_dict()[key] - weight).norm()
            assert apart <= (0.06 if key in by_muon else 1e-4) * moved, (step, key)


def test_muon_has_the_linear_layers_of_the_blocks_and_nothing_else():
    net = model("mamba")
    names = {id(p): name for name, p in net.named_parameters()}
    found = {names[id(p)].partition(".mixer.")[2] for p in hidden_matrices(net)}
    assert found == {f"{name}_proj.weight" for name in ("in", "x", "dt", "out")}
    assert len(hidden_matrices(net)) == len({id(p) for p in hidden_matrices(net)})


def test_every_parameter_has_one_optimiser_and_its_decay():
    net = model("mamba")
    groups = make_optimiser(net, MUON).param_groups
    every = [p for group in groups for p in group["params"]]
    assert sorted(map(id, every)) == sorted(map(id, net.parameters()))
    for group in groups:
        for p in group["params"]:
            exempt = p.ndim < 2 or hasattr(p, "no_weight_decay")
            assert group["weight_decay"] == (0.0 if exempt else 0.5)


def test_muon_goes_on_from_its_own_state_bit_for_bit():
    net, optimiser = model("transformer"), None
    weights = []
    for interrupted in (False, True):
        net = model("transformer")
        optimiser = make_optimiser(net, MUON)
        for step in range(6):
            if interrupted and step == 3:
                kept = copy.deepcopy([net.state_dict(), optimiser.state_dict()])
                net = model("transformer")
                optimiser = make_optimiser(net, MUON)
                net.load_state_dict(kept[0])
                optimiser.load_state_dict(kept[1])
            for group in optimiser.param_groups:  # as a schedule does
                group["lr"] = 0.02 / (1 + step)
            optimiser.zero_grad()
            loss(net, step).backward()
            optimiser.step()
        weights.append(net.state_dict())
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_a_change_of_the_rate_reaches_every_parameter():
    net = model("transformer")
    optimiser = make_optimiser(net, MUON)
    before = copy.deepcopy(net.state_dict())
    loss(net, 0).backward()
    for group in optimiser.param_groups:
        group["lr"] = 0.0
    optimiser.step()
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_muon_is_refused_where_there_is_no_matrix_for_it():
    with pytest.raises(UserError, match="optim=muon: the model has no linear layer"):
        make_optimiser(nn.Embedding(5, 3), MUON)


def test_momentum_is_of_muon_alone():
    assert train_config("optim=muon", "optim.momentum=0.8").optim.momentum == 0.8
    tree = {"optim": {"name": "muon", "momentum": 0.8}}
    check_names("train", tree, ["optim", "optim.momentum"])  # on the command line too
    with pytest.raises(UserError, match=r"^optim\.momentum=0\.8: unknown option\."):
        train_config("optim.momentum=0.8")
