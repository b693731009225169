"""Weights of `transformers` checkpoints under this package's names.

    transformers Llama                        here
    model.embed_tokens.weight                 embedding.weight
    model.layers.N.input_layernorm            blocks.N.mixer_norm
    model.layers.N.self_attn.{q,k,v,o}_proj   blocks.N.mixer.{q,k,v,o}_proj
    model.layers.N.post_attention_layernorm   blocks.N.feed_forward_norm
    model.layers.N.mlp.{gate,up,down}_proj    blocks.N.feed_forward.{gate,up,down}_proj
    model.norm, lm_head                       norm, head

    transformers Mamba and Mamba-2            here
    backbone.embeddings.weight                embedding.weight
    backbone.layers.N.norm                    blocks.N.mixer_norm
    backbone.layers.N.mixer.conv1d.weight     blocks.N.mixer.conv_weight, (c, 1, w) as (c, w)
    backbone.layers.N.mixer.conv1d.bias       blocks.N.mixer.conv_bias
    backbone.layers.N.mixer.*                 blocks.N.mixer.*, all other names the same
    backbone.norm_f, lm_head                  norm, head

Rotary pairs are laid out as in Llama (i, i + d/2), so no weight is permuted.
"""

import re
from collections.abc import Mapping

from torch import Tensor

from zoo.errors import refuse_path

LLAMA = [
    (r"model\.embed_tokens\.", "embedding."),
    (r"model\.layers\.(\d+)\.input_layernorm\.", r"blocks.\1.mixer_norm."),
    (r"model\.layers\.(\d+)\.self_attn\.([qkvo]_proj)\.", r"blocks.\1.mixer.\2."),
    (r"model\.layers\.(\d+)\.post_attention_layernorm\.", r"blocks.\1.feed_forward_norm."),
    (r"model\.layers\.(\d+)\.mlp\.(gate|up|down)_proj\.", r"blocks.\1.feed_forward.\2_proj."),
    (r"model\.norm\.", "norm."),
    (r"lm_head\.", "head."),
]
MAMBA = [
    (r"backbone\.embeddings\.", "embedding."),
    (r"backbone\.layers\.(\d+)\.norm\.", r"blocks.\1.mixer_norm."),
    (r"backbone\.layers\.(\d+)\.mixer\.conv1d\.(weight|bias)$", r"blocks.\1.mixer.conv_\2"),
    (r"backbone\.layers\.(\d+)\.mixer\.", r"blocks.\1.mixer."),
    (r"backbone\.norm_f\.", "norm."),
    (r"lm_head\.", "head."),
]


def from_transformers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a `Backbone` from that of a LlamaForCausalLM, MambaForCausalLM or
    Mamba2ForCausalLM (of one group).

    Raises UserError for a tensor that neither table names. Weights whose head is not their
    embedding are refused by a Backbone that is tied, as it is by default. What is not in the
    weights the model must be given: the number of heads, `rope_base` and `norm_eps`.
    """
    table = MAMBA if any(name.startswith("backbone.") for name in weights) else LLAMA
    renamed = {}
    for name, tensor in weights.items():
        for pattern, replacement in table:
            ours, hits = re.subn(f"^{pattern}", replacement, name)
            if hits:
                renamed[ours] = tensor.squeeze(1) if ours.endswith("conv_weight") else tensor
                break
        else:
            refuse_path(name, "is no weight of a Llama or a Mamba", "Convert one of these")
    if "head.weight" not in renamed and "embedding.weight" in renamed:
        renamed["head.weight"] = renamed["embedding.weight"]
    return renamed
