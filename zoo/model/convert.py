"""Weights of `transformers` checkpoints under this package's names, and back.

One table for each layout of names serves both directions. A name stands for a module or a
parameter, `*` for the number of a layer. Beside the names three things differ:

    conv1d.weight, conv_1d.weight     (c, 1, w) there, (c, w) here
    Griffin's gate biases             (blocks, d / blocks) there, (d,) here
    Phi-3's qkv_proj, gate_up_proj    rows behind one another there, a projection each here
    RWKV-4's time_mix_*               (1, 1, d) there, (d,) here
    RWKV-7's x_r, x_w .. x_g          (1, 1, d) each there, the rows of mu here
    GPT-NeoX's query_key_value        of every head its q, k and v there, three projections here

Rotary pairs are laid out as in Llama (i, i + d/2), so no weight is permuted. Source: the modelling
files of `transformers`.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from zoo.errors import refuse, refuse_path

Names = Mapping[str, str]  # theirs -> ours

LLAMA: Names = {
    "model.embed_tokens": "embedding",
    "model.layers.*.input_layernorm": "blocks.*.mixer_norm",
    **{
        f"model.layers.*.self_attn.{name}": f"blocks.*.mixer.{name}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
    },
    "model.layers.*.post_attention_layernorm": "blocks.*.feed_forward_norm",
    **{
        f"model.layers.*.mlp.{name}": f"blocks.*.feed_forward.{name}"
        for name in ("gate_proj", "up_proj", "down_proj")
    },
    "model.norm": "norm",
    "lm_head": "head",
}
PHI3: Names = {
    **LLAMA,
    "model.layers.*.self_attn.qkv_proj": "blocks.*.mixer.q+k+v_proj",
    "model.layers.*.mlp.gate_up_proj": "blocks.*.feed_forward.gate+up_proj",
}
GEMMA2: Names = {  # Gemma 3 too
    **LLAMA,
    "model.layers.*.post_attention_layernorm": "blocks.*.mixer_post_norm",
    "model.layers.*.pre_feedforward_layernorm": "blocks.*.feed_forward_norm",
    "model.layers.*.post_feedforward_layernorm": "blocks.*.feed_forward_post_norm",
}
GRIFFIN: Names = {
    "model.embed_tokens": "embedding",
    "model.layers.*.temporal_pre_norm": "blocks.*.mixer_norm",
    "model.layers.*.temporal_block": "blocks.*.mixer",
    "model.layers.*.temporal_block.linear_x": "blocks.*.mixer.x_proj",
    "model.layers.*.temporal_block.linear_y": "blocks.*.mixer.gate_proj",
    "model.layers.*.temporal_block.linear_out": "blocks.*.mixer.out_proj",
    "model.layers.*.temporal_block.conv_1d.weight": "blocks.*.mixer.conv_weight",
    "model.layers.*.temporal_block.conv_1d.bias": "blocks.*.mixer.conv_bias",
    "model.layers.*.temporal_block.rg_lru.recurrent_param": "blocks.*.mixer.decay",
    **{
        f"model.layers.*.temporal_block.rg_lru.{theirs}_gate_{part}": (
            f"blocks.*.mixer.{ours}_gate.{part}"
        )
        for theirs, ours in (("recurrent", "decay"), ("input", "input"))
        for part in ("weight", "bias")
    },
    "model.layers.*.channel_pre_norm": "blocks.*.feed_forward_norm",
    "model.layers.*.mlp_block": "blocks.*.feed_forward",
    "model.final_norm": "norm",
    "lm_head": "head",
}
GPT_NEOX: Names = {
    "gpt_neox.embed_in": "embedding",
    "gpt_neox.layers.*.input_layernorm": "blocks.*.mixer_norm",
    "gpt_neox.layers.*.attention.query_key_value": "blocks.*.mixer.qkv_proj",
    "gpt_neox.layers.*.attention.dense": "blocks.*.mixer.o_proj",
    "gpt_neox.layers.*.post_attention_layernorm": "blocks.*.feed_forward_norm",
    "gpt_neox.layers.*.mlp.dense_h_to_4h": "blocks.*.feed_forward.up_proj",
    "gpt_neox.layers.*.mlp.dense_4h_to_h": "blocks.*.feed_forward.down_proj",
    "gpt_neox.final_layer_norm": "norm",
    "lm_head": "head",  # embed_out before transformers 5
}
MAMBA: Names = {
    "backbone.embeddings": "embedding",
    "backbone.layers.*.norm": "blocks.*.mixer_norm",
    "backbone.layers.*.mixer.conv1d.weight": "blocks.*.mixer.conv_weight",
    "backbone.layers.*.mixer.conv1d.bias": "blocks.*.mixer.conv_bias",
    "backbone.layers.*.mixer": "blocks.*.mixer",
    "backbone.norm_f": "norm",
    "lm_head": "head",
}
RWKV4: Names = {
    "rwkv.embeddings": "embedding",
    "rwkv.blocks.0.pre_ln": "embedding_norm",
    "rwkv.blocks.*.ln1": "blocks.*.mixer_norm",
    "rwkv.blocks.*.ln2": "blocks.*.feed_forward_norm",
    "rwkv.blocks.*.attention.time_decay": "blocks.*.mixer.decay",
    "rwkv.blocks.*.attention.time_first": "blocks.*.mixer.bonus",
    "rwkv.blocks.*.attention.time_mix_key": "blocks.*.mixer.mix_k",
    "rwkv.blocks.*.attention.time_mix_value": "blocks.*.mixer.mix_v",
    "rwkv.blocks.*.attention.time_mix_receptance": "blocks.*.mixer.mix_r",
    "rwkv.blocks.*.attention.key": "blocks.*.mixer.k_proj",
    "rwkv.blocks.*.attention.value": "blocks.*.mixer.v_proj",
    "rwkv.blocks.*.attention.receptance": "blocks.*.mixer.r_proj",
    "rwkv.blocks.*.attention.output": "blocks.*.mixer.o_proj",
    "rwkv.blocks.*.feed_forward.time_mix_key": "blocks.*.feed_forward.mix_k",
    "rwkv.blocks.*.feed_forward.time_mix_receptance": "blocks.*.feed_forward.mix_r",
    "rwkv.blocks.*.feed_forward.key": "blocks.*.feed_forward.k_proj",
    "rwkv.blocks.*.feed_forward.value": "blocks.*.feed_forward.v_proj",
    "rwkv.blocks.*.feed_forward.receptance": "blocks.*.feed_forward.r_proj",
    "rwkv.ln_out": "norm",
    "head": "head",
}
RWKV7: Names = {  # of flash-linear-attention
    "model.embeddings": "embedding",
    "model.layers.0.pre_norm": "embedding_norm",
    "model.layers.*.attn_norm": "blocks.*.mixer_norm",
    "model.layers.*.ffn_norm": "blocks.*.feed_forward_norm",
    "model.layers.*.attn": "blocks.*.mixer",
    **{f"model.layers.*.attn.x_{x}": f"blocks.*.mixer.mu.{x}" for x in "rwkvag"},
    "model.layers.*.attn.x_x": "blocks.*.mixer.mu",  # all six, in early checkpoints
    "model.layers.*.attn.g_norm": "blocks.*.mixer.norm",
    **{f"model.layers.*.attn.{x}_lora.lora.0": f"blocks.*.mixer.{x}_map.down" for x in "wavg"},
    **{f"model.layers.*.attn.{x}_lora.lora.2": f"blocks.*.mixer.{x}_map.up" for x in "wavg"},
    **{f"model.layers.*.attn.{x}_lora.lora.2.bias": f"blocks.*.mixer.{x}_0" for x in "wav"},
    "model.layers.*.ffn.x_k": "blocks.*.feed_forward.mu",
    "model.layers.*.ffn.key": "blocks.*.feed_forward.k_proj",
    "model.layers.*.ffn.value": "blocks.*.feed_forward.v_proj",
    "model.norm": "norm",
    "lm_head": "head",
}
LAYOUTS: dict[str, Names] = {  # by a part of some weights' names, the first that is found
    "gpt_neox.": GPT_NEOX,
    "backbone.": MAMBA,
    "rwkv.": RWKV4,
    ".attn.k_k": RWKV7,
    ".qkv_proj.": PHI3,
    ".pre_feedforward_layernorm.": GEMMA2,
    ".temporal_block.": GRIFFIN,
}
OLDER = {"embed_out.weight": "lm_head.weight"}  # names before transformers 5
# Buffers that older versions stored; they follow from the configuration.
BUFFERS = re.compile(r".*(\.rotary_emb\.inv_freq|\.attention\.(masked_)?bias)")


def from_transformers(weights: Mapping[str, Tensor], heads: int | None = None) -> dict[str, Tensor]:
    """The state dict of a `Backbone` from that of a model of `transformers`.

    Args:
        weights: those of a family that zoo.pretrained.families knows.
        heads: of the attention, which GPT-NeoX's weights do not say.

    Raises UserError for a tensor that is in no table, and for heads that do not divide the weights.
    Weights whose head is not their embedding are refused by a Backbone that is tied, as it is by
    default. What is not in the weights the model must be given: the number of heads, `rope_base`
    and `norm_eps`.
    """
    if "embedding.weight" in weights:  # the zoo's own
        return {**weights, "head.weight": weights.get("head.weight", weights["embedding.weight"])}
    names = next(
        (names for part, names in LAYOUTS.items() if any(part in name for name in weights)), LLAMA
    )
    renamed: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if BUFFERS.fullmatch(name):
            continue
        ours = _renamed(OLDER.get(name, name), names)
        if ours is None:
            rule = "is no weight of a Llama, nor of another family that the zoo reads"
            refuse_path(name, rule, "Convert one of these")
        if ".qkv_proj." in ours:
            renamed |= _split(ours, tensor, heads)
        elif "+" in ours:
            output = weights.get(name.replace("qkv_proj", "o_proj"), tensor)
            renamed |= _rows(ours, tensor, output.shape[1])
        else:
            renamed[ours] = _layout_here(ours, tensor)
    for first in [name for name in renamed if name.endswith(".mu.r")]:
        stem = first.removesuffix(".r")
        rows = [renamed.pop(f"{stem}.{x}", None) for x in "rwkvag"]
        renamed[stem] = torch.stack([row.flatten() for row in rows if row is not None])
    if "head.weight" not in renamed and "embedding.weight" in renamed:
        renamed["head.weight"] = renamed["embedding.weight"]
    return renamed


def to_transformers(
    weights: Mapping[str, Tensor], names: Names, heads: int | None = None, tied: bool = False
) -> dict[str, Tensor]:
    """The state dict of a model of `transformers` from that of a `Backbone`.

    Args:
        names: the table of the family.
        heads: as for `from_transformers`.
        tied: the head is the embedding, and is left out.

    Raises UserError for a tensor that is not in the table.
    """
    back, found = {ours: theirs for theirs, ours in names.items()}, {}
    fused = "blocks.*.mixer.qkv_proj" in back
    for name, tensor in weights.items():
        if tied and name == "head.weight":
            continue
        if fused and (part := re.fullmatch(r"(blocks\.\d+\.mixer\.)([qkv])_proj\.(\w+)", name)):
            if part[2] != "q":
                continue
            parts = [weights[f"{part[1]}{one}_proj.{part[3]}"] for one in "qkv"]
            name, tensor = f"{part[1]}qkv_proj.{part[3]}", _fused(parts, heads)
        theirs = _renamed(name, back)
        if theirs is None:
            refuse_path(name, "has no name in transformers", "Export it in the zoo's own format")
        found[theirs] = _layout_there(theirs, tensor)
    return found


def layer_there(layer: str, names: Names) -> str:
    """The name of a linear layer in a model of `transformers`. UserError where it has none."""
    theirs = _renamed(layer, {ours: theirs for theirs, ours in names.items()})
    if theirs is None:
        rule = "is a part of one layer in transformers, which has no adapter of its own"
        refuse_path(layer, rule, "Export the whole model: format=transformers")
    return theirs


def _renamed(name: str, names: Names) -> str | None:
    """The name with the longest entry that it begins with replaced; None where there is none."""
    plain = re.sub(r"(?<=\.)\d+(?=\.)", "*", name, count=1)
    layer = re.search(r"(?<=\.)\d+(?=\.)", name)
    for stem in (name, plain):  # an entry of one layer alone comes first
        parts = stem.split(".")
        for end in range(len(parts), 0, -1):
            if (found := names.get(".".join(parts[:end]))) is not None:
                rest = "".join(f".{part}" for part in parts[end:])
                return found.replace("*", layer[0] if layer else "*") + rest
    return None


def _layout_here(ours: str, tensor: Tensor) -> Tensor:
    if ours.endswith("conv_weight"):
        return tensor.squeeze(1)
    if ours.endswith("_gate.bias"):
        return tensor.flatten()
    return tensor.flatten() if re.search(r"\.mix_[kvr]$", ours) and tensor.dim() == 3 else tensor


def _layout_there(theirs: str, tensor: Tensor) -> Tensor:
    if theirs.endswith(("conv1d.weight", "conv_1d.weight")):
        return tensor.unsqueeze(1)
    return tensor[None, None] if ".time_mix_" in theirs else tensor


def _split(ours: str, tensor: Tensor, heads: int | None) -> dict[str, Tensor]:
    """Three projections from one whose rows are q, k and v of the first head, of the second ..."""
    if heads is None:
        raise ValueError("heads=None: must be given for weights of a GPT-NeoX.")
    if len(tensor) % (3 * heads):
        rule = f"must divide a third of the {len(tensor)} rows of its queries, keys and values"
        refuse("num_attention_heads", heads, rule, "Give a whole checkpoint")
    parts = tensor.unflatten(0, (heads, 3, -1)).unbind(1)
    return {
        ours.replace(".qkv_proj.", f".{one}_proj."): part.flatten(0, 1)
        for one, part in zip("qkv", parts, strict=True)
    }


def _rows(ours: str, tensor: Tensor, first: int) -> dict[str, Tensor]:
    """The projections whose rows lie behind one another: of queries, as many as `first`, keys and
    values; or of gate and up, halves."""
    stem, names, end = re.fullmatch(r"(.*\.)([\w+]+)(_proj\..*)", ours).groups()  # type: ignore[union-attr]
    parts = names.split("+")
    sizes = [first] * (len(parts) == 3)
    rest = len(tensor) - sum(sizes)
    sizes += [rest // 2, rest - rest // 2]
    split = zip(parts, tensor.split(sizes), strict=True)
    return {f"{stem}{part}{end}": rows for part, rows in split}


def _fused(parts: list[Tensor], heads: int | None) -> Tensor:
    assert heads is not None
    return torch.stack([part.unflatten(0, (heads, -1)) for part in parts], 1).flatten(0, 2)
