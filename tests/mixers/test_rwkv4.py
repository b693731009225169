"""RWKV-4 is its equations, and the implementation in transformers."""

import pytest
import torch
from torch import Tensor, nn

from zoo.mixers.rwkv4 import RWKV4, ChannelMixing

WIDTH = 12


def random_parameters(mixer):
    """Every parameter away from its initial value, in float64."""
    torch.manual_seed(0)
    mixer = mixer.double()
    for parameter in mixer.parameters():
        nn.init.normal_(parameter, std=0.7)
    return mixer


def predecessors(x: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)


def blend(x: Tensor, share: Tensor) -> Tensor:
    return share * x + (1 - share) * predecessors(x)


@pytest.mark.parametrize("t", [1, 2, 41])
def test_time_mixing_is_the_papers_sum_over_all_tokens(t):
    """Section 3.1 literally: quadratic, without a maximum."""
    mixer, x = random_parameters(RWKV4(width=WIDTH)), torch.randn(2, t, WIDTH).double()
    r = mixer.r_proj(blend(x, mixer.mix_r))
    k = mixer.k_proj(blend(x, mixer.mix_k))
    v = mixer.v_proj(blend(x, mixer.mix_v))
    w, u = mixer.decay.exp(), mixer.bonus
    outs = []
    for i in range(t):
        ages = (i - 1 - torch.arange(i)).double()[:, None]
        weights = torch.cat([k[:, :i] - ages * w, (u + k[:, i])[:, None]], 1).exp()
        outs.append((weights * v[:, : i + 1]).sum(1) / weights.sum(1))
    wanted = mixer.o_proj(torch.sigmoid(r) * torch.stack(outs, 1))
    torch.testing.assert_close(mixer(x), wanted, rtol=1e-10, atol=1e-10)


def test_channel_mixing_is_the_papers():
    mixer = random_parameters(ChannelMixing(width=WIDTH, hidden_width=20))
    x = torch.randn(2, 7, WIDTH).double()
    r = mixer.r_proj(blend(x, mixer.mix_r))
    k = mixer.k_proj(blend(x, mixer.mix_k))
    wanted = torch.sigmoid(r) * mixer.v_proj(k.clamp(min=0) ** 2)
    torch.testing.assert_close(mixer(x), wanted)


def time_mixing(theirs: nn.Module) -> dict[str, Tensor]:
    """Weights of transformers' RwkvSelfAttention under our names."""
    names = {"time_decay": "decay", "time_first": "bonus", "output.weight": "o_proj.weight"}
    return rename(theirs, names)


def rename(theirs: nn.Module, names: dict[str, str]) -> dict[str, Tensor]:
    for long, short in (("key", "k"), ("value", "v"), ("receptance", "r")):
        names = {**names, f"{long}.weight": f"{short}_proj.weight"}
        names[f"time_mix_{long}"] = f"mix_{short}"
    return {
        names[name]: tensor.flatten() if name.startswith("time") else tensor
        for name, tensor in theirs.state_dict().items()
    }


def test_rwkv_weights_give_rwkvs_logits():
    """Our two halves of each block between transformers' norms, embedding and head."""
    transformers = pytest.importorskip("transformers")
    config = transformers.RwkvConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=3, intermediate_size=24,
        attention_hidden_size=16, context_length=64, rescale_every=0,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.RwkvForCausalLM(config).double().eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.5)
    tokens = torch.randint(50, (2, 37))
    with torch.no_grad():
        x = theirs.rwkv.embeddings(tokens)
        for index, block in enumerate(theirs.rwkv.blocks):
            mixer, channel = (
                RWKV4(width=16).double(),
                ChannelMixing(width=16, hidden_width=24).double(),
            )
            mixer.load_state_dict(time_mixing(block.attention))
            channel.load_state_dict(rename(block.feed_forward, {}))
            x = block.pre_ln(x) if index == 0 else x
            x = x + mixer(block.ln1(x))
            x = x + channel(block.ln2(x))
        logits = theirs.head(theirs.rwkv.ln_out(x))
        # their recurrence runs in float32
        wanted = theirs(tokens).logits
    torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-5)


def test_decoding_costs_the_same_state_after_any_number_of_tokens():
    mixer = RWKV4(width=WIDTH)
    state = mixer.empty_state(1)
    for tokens in (1, 100):
        _, state = mixer(torch.randn(1, tokens, WIDTH), state)
        assert sum(a.numel() for a in state) == 4 * WIDTH
    assert mixer.state_bytes(10**6) == 4 * WIDTH * 4


def test_an_unknown_backend_is_refused_in_one_line():
    with pytest.raises(ValueError, match="Did you mean 'native'") as error:
        RWKV4(width=WIDTH, backend="nativ")(torch.randn(1, 2, WIDTH))
    assert "\n" not in str(error.value)
