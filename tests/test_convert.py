"""Against independent implementations: the same weights give the same logits."""

from functools import partial

import pytest
import torch

from zoo.errors import UserError
from zoo.mixers.feed_forward import SwiGLU
from zoo.mixers.mamba import Mamba
from zoo.mixers.mamba2 import Mamba2
from zoo.mixers.softmax import SoftmaxAttention
from zoo.model.backbone import Backbone
from zoo.model.convert import from_transformers


def test_llama_weights_give_llamas_logits():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5, rope_theta=10000.0,
        attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(config).double().eval()
    ours = Backbone(
        vocab_size=50, width=32, layers=3, norm_eps=1e-5, tied=False,
        mixers=[partial(SoftmaxAttention, heads=4, kv_heads=2)],
        feed_forwards=[partial(SwiGLU, hidden_width=48)],
    ).double()  # fmt: skip
    ours.load_state_dict(from_transformers(theirs.state_dict()))
    tokens = torch.randint(50, (2, 37))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits.double(), rtol=0, atol=1e-5)


def test_mamba_weights_give_mambas_logits(in_pytorch):
    transformers = pytest.importorskip("transformers")
    in_pytorch("transformers.models.mamba.modeling_mamba")
    config = transformers.MambaConfig(
        vocab_size=50, hidden_size=32, state_size=16, num_hidden_layers=3, layer_norm_epsilon=1e-5,
        use_mambapy=False,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.MambaForCausalLM(config).double().eval()
    ours = Backbone(
        vocab_size=50, width=32, layers=3, norm_eps=1e-5, mixers=[Mamba], feed_forwards=[None]
    ).double()
    ours.load_state_dict(from_transformers(theirs.state_dict()))
    tokens = torch.randint(50, (2, 37))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits.double(), rtol=0, atol=1e-5)


def test_mamba2_weights_give_mamba2s_logits(in_pytorch):
    transformers = pytest.importorskip("transformers")
    in_pytorch("transformers.models.mamba2.modeling_mamba2")
    config = transformers.Mamba2Config(
        vocab_size=50, hidden_size=32, state_size=16, num_hidden_layers=3, layer_norm_epsilon=1e-5,
        num_heads=4, head_dim=16, n_groups=1, chunk_size=8, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.Mamba2ForCausalLM(config).double().eval()
    ours = Backbone(
        vocab_size=50, width=32, layers=3, norm_eps=1e-5, feed_forwards=[None],
        mixers=[partial(Mamba2, heads=4, head_width=16, state_size=16)],
    ).double()  # fmt: skip
    ours.load_state_dict(from_transformers(theirs.state_dict()))
    tokens = torch.randint(50, (2, 37))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits.double(), rtol=0, atol=1e-5)


def test_a_foreign_checkpoint_is_refused_by_the_first_name_it_has():
    with pytest.raises(UserError, match=r"^transformer\.wte\.weight: is no weight of a Llama"):
        from_transformers({"transformer.wte.weight": torch.zeros(1)})


def test_an_untied_head_is_never_loaded_into_a_tied_model():
    def model(tied: bool) -> Backbone:
        parts = {"mixers": [partial(SoftmaxAttention, heads=2)], "feed_forwards": [SwiGLU]}
        return Backbone(vocab_size=20, width=16, layers=1, tied=tied, **parts)

    torch.manual_seed(0)
    untied, tokens = model(tied=False), torch.randint(20, (1, 9))
    head = from_transformers({"lm_head.weight": untied.head.weight.detach()})
    weights = untied.state_dict() | head
    tied = model(tied=True)
    before = {name: value.clone() for name, value in tied.state_dict().items()}
    with pytest.raises(UserError, match=r"a head of their own.*tied=False"):
        tied.load_state_dict(weights)
    for name, value in tied.state_dict().items():
        assert torch.equal(value, before[name])
    again = model(tied=False)
    again.load_state_dict(weights)
    assert torch.equal(again(tokens), untied(tokens))
    other = model(tied=True)  # of a tied model nothing is refused
    other.load_state_dict(tied.state_dict())
    assert torch.equal(other(tokens), tied(tokens))
