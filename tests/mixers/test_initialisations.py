"""Every parameter of every architecture starts as published, and weight decay spares those it must.

Cases are found from configs/model; `initialisations` holds what is expected. A parameter without a
stated law fails. What is drawn at random is checked by its distribution over a thousand numbers or
more: a scale wrong by a factor of 1.2 fails.
"""

import functools
import math
from collections import defaultdict

import pytest
import torch
from building import ARCHITECTURES, ENCODERS, train_config
from initialisations import (
    NOT_DECAYED,
    Exactly,
    Law,
    Normal,
    Orthonormal,
    Through,
    Uniform,
    of_class,
)
from torch import Tensor, nn

from zoo.model.build import build_model
from zoo.model.extend import extend
from zoo.training.learner import Learner

SAMPLES = 1000  # numbers that a law is judged by
WIDTHS = ["size=small", "size.width=96"]  # four layers; no two widths inside are the same
SWITCHES = ["qk_norm", "logit_scale", "output_gate", "qkv_bias", "output_bias"]
VARIANTS = [
    *[(f"model={name}",) for name in ARCHITECTURES],
    *[(f"model={name}", "objective=masked") for name in ENCODERS],
    ("model=aft", "model.mixer.variant=simple"),
    ("model=aft", "model.mixer.variant=local"),
    ("model=aft", "model.mixer.variant=full"),
    ("model=relu", "model.mixer.normalise=rms", "model.mixer.gated=true"),
    ("model=low_rank", "model.feed_forward.gated=false"),
    ("model=linformer", "model.mixer.sharing=none"),
    ("model=linformer", "model.mixer.sharing=headwise"),
    ("model=longformer", "model.mixer.global_tokens=2"),
    ("model=soft", "model.mixer.form=exact"),
    ("model=transformer", "model.mixer.kv_heads=2"),
    ("model=transformer", *(f"model.mixer.{name}=true" for name in SWITCHES)),
    ("model=transformer", "model.feed_forward._target_=zoo.mixers.feed_forward.MLP"),
    ("model=transformer", "extension=clex", "extension.factor=4", "finetune=runs/x"),
]


def path(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


@functools.cache
def built(words: tuple[str, ...]):
    config = train_config(*WIDTHS, "match=none", "seq_len=256", *words)
    torch.manual_seed(0)
    model = build_model(config, 256 + (config.objective == "masked"))[0]
    return config, extend(model, config.extension, 256)


@pytest.fixture(params=VARIANTS, ids=lambda words: ",".join(words))
def words(request) -> tuple[str, ...]:
    return request.param


def laws(model: nn.Module, layer: int = 0, layers: int = 1) -> dict[str, tuple[Law, str]]:
    """Name of each parameter -> its law, and the class and name it has there."""
    found: dict[str, tuple[Law, str]] = {}
    for name, module in model.named_modules():
        if path(module) not in of_class:
            continue
        at = int(name.split(".")[1]) if name.startswith("blocks.") else layer
        for parameter, law in of_class[path(module)](module, at, layers).items():
            module.get_parameter(parameter)  # a law for what is not there is a mistake
            full = f"{name}.{parameter}" if name else parameter
            found.setdefault(full, (law, f"{path(module)} {parameter}"))
    return found


def draw_more(config, model: nn.Module, seed: int) -> list[tuple[nn.Module, int, int]]:
    """The mixers of a layer, alone: those with few numbers need many draws. So do frequencies."""
    torch.manual_seed(seed)
    layers, found = config.size.layers, []
    if model.frequencies is not None:
        of = {"factor": config.extension.factor, "original_length": config.seq_len}
        found.append(
            (
                config.extension.scaling.load()(width=model.blocks[0].mixer.head_width, **of),
                0,
                layers,
            )
        )
    for block in config.model.blocks:
        options = {} if config.objective == "causal" else {"causal": False}
        layer = seed % layers
        place = {"width": config.size.width, "layer": layer, "layers": layers}
        found.append((block.mixer.load()(**place, **options), layer, layers))
    return found


def test_every_parameter_starts_as_published(words):
    config, model = built(words)
    stated = laws(model, layers=config.size.layers)
    parameters = dict(model.named_parameters())
    assert not parameters.keys() - stated.keys(), "no initialisation is stated for these"

    drawn: dict[tuple[str, Law], list[Tensor]] = defaultdict(list)

    def note(law: Law, where: str, values: Tensor) -> None:
        if isinstance(law, Exactly):
            wanted = torch.as_tensor(law.values, dtype=torch.float64).expand_as(values)
            torch.testing.assert_close(
                values.double(), wanted, rtol=1e-5, atol=2e-6, msg=lambda m: f"{where}: {m}"
            )
        elif isinstance(law, Orthonormal):
            gram = values.double().mT @ values.double()
            wanted = law.gain**2 * torch.eye(len(gram), dtype=torch.float64)
            torch.testing.assert_close(gram, wanted, rtol=0, atol=1e-6)
        else:
            drawn[where, law].append(values.flatten().double())

    for name, parameter in parameters.items():
        note(*stated[name], parameter.detach())

    def lacking() -> set[tuple[str, Law]]:
        return {key for key, found in drawn.items() if sum(map(len, found)) < SAMPLES}

    seed = 0
    while too_few := lacking():
        seed += 1
        assert seed < 1000, f"not drawn again by the mixer alone: {too_few}"
        for mixer, layer, layers in draw_more(config, model, seed):
            for name, (law, where) in laws(mixer, layer, layers).items():
                if (where, law) in too_few:
                    note(law, where, mixer.get_parameter(name).detach())
    for (where, law), found in drawn.items():
        check(torch.cat(found), law, where)


def check(values: Tensor, law: Normal | Uniform | Through, where: str) -> None:
    """Kolmogorov and Smirnov's greatest distance, the spread, and for a range its ends."""
    if isinstance(law, Through):
        return check(law.function(values), law.law, where)
    n, values = len(values), values.sort().values
    if isinstance(law, Normal):
        spread, below = law.std, 0.5 * (1 + torch.erf(values / law.std / 2**0.5))
    else:
        width = law.high - law.low
        spread, below = width / 12**0.5, ((values - law.low) / width).clamp(0, 1)
        edge = 1e-5 * width
        assert law.low - edge <= values[0] <= law.low + 20 / n * width, (where, values[0])
        assert law.high - 20 / n * width <= values[-1] <= law.high + edge, (where, values[-1])
    apart = (below - (torch.arange(n) + 0.5) / n).abs().max()
    assert apart < 2.4 / math.sqrt(n), f"{where}: not {law}"  # one in 100,000 by chance
    scatter = values.std().item() / spread
    assert abs(scatter - 1) < 4.5 / math.sqrt(2 * n), f"{where}: spread {scatter:.3f} of {law}"


def test_a_scale_wrong_by_a_factor_of_1_2_is_found():
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(SAMPLES, generator=generator, dtype=torch.float64)
    uniform = torch.rand(SAMPLES, generator=generator, dtype=torch.float64)
    check(normal, Normal(1.0), "itself")
    check(uniform, Uniform(0.0, 1.0), "itself")
    for wrong in (1 / 1.2, 1.2):
        with pytest.raises(AssertionError):
            check(wrong * normal, Normal(1.0), "scaled")
        with pytest.raises(AssertionError):
            check(wrong * uniform, Uniform(0.0, 1.0), "scaled")
    cut = normal.clamp(-1, 1)
    with pytest.raises(AssertionError, match="not Normal"):
        check(cut, Normal(cut.std().item()), "cut")


def test_no_two_parameters_are_drawn_alike(words):
    """Layers and parts draw numbers of their own: none is another's over again."""
    _, model = built(words)
    stated = laws(model, layers=4)
    firsts = defaultdict(list)
    for name, parameter in model.named_parameters():
        if not isinstance(stated[name][0], Exactly):
            standard = parameter.detach().double().flatten()[:6]
            firsts[tuple((standard / standard[0]).round(decimals=4).tolist())].append(name)
    assert all(len(names) == 1 for names in firsts.values()), firsts


def test_retention_decays_are_the_published_ones():
    _, model = built(("model=retnet",))
    for block in model.blocks:
        found = torch.tensor(block.mixer.log_decay, dtype=torch.float64).exp()
        wanted = 1 - 2.0 ** -(5 + torch.arange(4, dtype=torch.float64))  # Sun 2023, section 2.2
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)


def test_weight_decay_takes_matrices_and_spares_those_that_zero_is_wrong_for(words):
    config, model = built(words)
    learner = Learner(model=model, optim=config.optim, max_steps=1, seq_len=256)
    (optimizer,), _ = learner.configure_optimizers()
    decayed, undecayed = optimizer.param_groups
    assert (decayed["weight_decay"], undecayed["weight_decay"]) == (config.optim.weight_decay, 0.0)
    spared = set()
    for name, module in model.named_modules():
        spared |= {f"{name}.{own}" for own in NOT_DECAYED.get(path(module), ())}
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)] for p in decayed["params"]}
    wanted = {name for name, p in model.named_parameters() if p.ndim >= 2} - spared
    assert found == wanted
    assert {names[id(p)] for p in undecayed["params"]} == set(names.values()) - wanted
    assert len(decayed["params"]) + len(undecayed["params"]) == len(names)
