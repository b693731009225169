"""Low-rank adapters: what they compute, what is trained, and how they are merged."""

import pytest
import torch
from building import ENCODERS

from zoo.config.schema.model import Lora
from zoo.errors import UserError
from zoo.model.lora import A, B, add_adapters, in_peft_format, merged, trained_names

pytestmark = pytest.mark.slow  # half a minute

LORA = Lora(rank=2, alpha=3.0)


def read(model, tokens):
    return model(tokens) if not model.causal else model(tokens, model.empty_state(len(tokens)))[0]


def check(model, adapted) -> None:
    """Adapters that are not zero: every one is trained, and merging them computes the same.

    Args:
        model: without adapters.
        adapted: its copy, which gets them.
    """
    add_adapters(adapted, LORA)
    adapted.double()
    weights = dict(adapted.named_parameters())
    adapters = {name: weight for name, weight in weights.items() if name.endswith((A, B))}
    assert trained_names(adapted) == adapters.keys()
    for weight in adapters.values():
        torch.nn.init.normal_(weight, std=0.05)
    tokens = torch.randint(32, (2, 48))
    logits = read(adapted, tokens)
    (logits * torch.randn_like(logits)).sum().backward()
    assert all(weight.grad.abs().max() > 0 for weight in adapters.values())
    assert all(weight.grad is None for name, weight in weights.items() if name not in adapters)
    before = read(model, tokens)
    trained = {name: weight.detach() for name, weight in adapters.items()}
    model.load_state_dict(merged(model.state_dict(), trained, LORA))
    torch.testing.assert_close(logits, read(model, tokens))
    assert not torch.allclose(before, logits)


def test_adapters_of_every_architecture_are_trained_and_merge_to_the_same_logits(
    tiny, architecture
):
    pytest.importorskip("peft")
    check(tiny(architecture), tiny(architecture))


@pytest.mark.parametrize("encoder", ENCODERS)
def test_adapters_of_every_encoder_are_trained_and_merge_to_the_same_logits(tiny, encoder):
    pytest.importorskip("peft")
    check(*(tiny(encoder, "objective=masked") for _ in range(2)))


def test_a_mixer_that_reads_a_layers_weight_itself_has_no_adapter_there(tiny):
    pytest.importorskip("peft")
    with pytest.raises(UserError, match=r"in_proj.*unknown linear layer.*out_proj"):
        add_adapters(tiny("mamba"), Lora(rank=2, targets=["in_proj"]))


def test_targets_are_the_ends_of_names(tiny):
    pytest.importorskip("peft")
    model = tiny("rwkv4")
    add_adapters(model, Lora(rank=2, targets=["mixer.k_proj", "v_proj"]))
    layers = {name.removesuffix(A).split(".", 2)[2] for name in trained_names(model)}
    layers = {name for name in layers if not name.endswith(B)}
    assert layers == {"mixer.k_proj", "mixer.v_proj", "feed_forward.v_proj"}


def test_merging_adds_alpha_over_rank_times_b_a_and_takes_what_is_new():
    base = {"x.weight": torch.eye(2), "y.weight": torch.ones(1), "frequencies.old": torch.ones(1)}
    trained = {f"x{A}": torch.tensor([[1.0, 2.0]]), f"x{B}": torch.tensor([[3.0], [5.0]])}
    trained |= {"frequencies.new": torch.zeros(1)}
    found = merged(base, trained, Lora(rank=1, alpha=0.5))
    assert found["x.weight"].tolist() == [[2.5, 3.0], [2.5, 6.0]]
    assert found.keys() == {"x.weight", "y.weight", "frequencies.new"}
    assert base["x.weight"].equal(torch.eye(2))
    assert merged(base, trained, Lora(rank=1))["x.weight"][0, 0] == 7.0  # alpha: twice the rank


def test_the_form_of_peft_has_its_names_and_settings():
    trained = {f"x.1{A}": torch.zeros(2, 3), f"x.1{B}": torch.zeros(4, 2)}
    config, tensors = in_peft_format(trained, LORA, "base", lambda name: name.upper())
    assert [*tensors] == [f"base_model.model.X.1.lora_{part}.weight" for part in "AB"]
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (2, 3.0, ["X.1"])
