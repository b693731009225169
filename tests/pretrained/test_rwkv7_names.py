"""RWKV-7 checkpoints by the names of flash-linear-attention, against the recurrence in float64.

That library runs on GPUs alone, so the reference is written here from the paper (Peng 2025, section
4, arXiv 2503.14456), a loop over tokens; names and shapes of weights are those of its module. The
package of RWKV's author, which has other names for them, gives the same logits.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from checkpoints import opened

from zoo.errors import UserError
from zoo.pretrained.checkpoint import check_checkpoint
from zoo.pretrained.families import describe

VOCAB, D, HEAD, LAYERS, HIDDEN = 96, 24, 6, 3, 64
RANKS = {"decay": 3, "a": 5, "v": 4, "gate": 7}
CONFIG = {
    **{"model_type": "rwkv7", "vocab_size": VOCAB, "hidden_size": D, "head_dim": HEAD},
    **{"num_hidden_layers": LAYERS, "intermediate_size": HIDDEN, "hidden_ratio": 4.0},
    **{f"{name}_low_rank_dim": rank for name, rank in RANKS.items()},
    **{"hidden_act": "sqrelu", "norm_first": True, "norm_bias": True, "norm_eps": 1e-4},
    **{"max_position_embeddings": 64, "tie_word_embeddings": False, "attn": None},
    **{"num_heads": 32, "value_dim": [D] * LAYERS, "fuse_norm": True, "attn_mode": "chunk"},
}


def weights(config: dict) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shapes = {"model.embeddings.weight": (VOCAB, D), "lm_head.weight": (VOCAB, D)}
    norms = ["model.norm", "model.layers.0.pre_norm"]
    for n in range(LAYERS):
        attn = f"model.layers.{n}.attn"
        shapes |= {f"{attn}.x_{x}": (1, 1, D) for x in "rwkvag"}
        shapes |= {f"{attn}.{name}": (D,) for name in ("k_k", "k_a")}
        shapes |= {f"{attn}.r_k": (D // HEAD, HEAD)}
        shapes |= {f"{attn}.{x}_proj.weight": (D, D) for x in "rkvo"}
        for letter, name in (("w", "decay"), ("a", "a"), ("v", "v"), ("g", "gate")):
            if letter == "v" and n == 0:
                continue
            rank = config[f"{name}_low_rank_dim"]
            shapes |= {f"{attn}.{letter}_lora.lora.0.weight": (rank, D)}
            shapes |= {f"{attn}.{letter}_lora.lora.2.weight": (D, rank)}
            shapes |= {f"{attn}.{letter}_lora.lora.2.bias": (D,)} if letter != "g" else {}
        ffn = f"model.layers.{n}.ffn"
        shapes |= {f"{ffn}.x_k": (D,), f"{ffn}.key.weight": (HIDDEN, D)}
        shapes |= {f"{ffn}.value.weight": (D, HIDDEN)}
        norms += [f"model.layers.{n}.attn_norm", f"model.layers.{n}.ffn_norm", f"{attn}.g_norm"]
    found = {name: torch.randn(shape) * 0.5 for name, shape in shapes.items()}
    for name in norms:
        found[f"{name}.weight"] = 1 + 0.1 * torch.randn(D)
        found[f"{name}.bias"] = 0.1 * torch.randn(D)
    return found


def write(folder: Path, **changes) -> dict[str, torch.Tensor]:
    from safetensors.torch import save_file

    config = CONFIG | changes
    found = weights(config)
    save_file(found, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    return found


def reference(w: dict[str, torch.Tensor], tokens: list[int], eps: float) -> torch.Tensor:
    """Logits (t, vocabulary) in float64, one token after another."""
    w = {name: weight.double() for name, weight in w.items()}
    zero = torch.zeros(D, dtype=torch.float64)
    before = [[zero, zero] for _ in range(LAYERS)]
    states = torch.zeros(LAYERS, D // HEAD, HEAD, HEAD, dtype=torch.float64)

    def normed(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, (D,), w[f"{name}.weight"], w[f"{name}.bias"], eps)

    def low_rank(name: str, x: torch.Tensor, between=lambda y: y) -> torch.Tensor:
        y = w[f"{name}.lora.2.weight"] @ between(w[f"{name}.lora.0.weight"] @ x)
        return y + w.get(f"{name}.lora.2.bias", zero)

    logits = []
    for token in tokens:
        x, v_first = normed("model.layers.0.pre_norm", w["model.embeddings.weight"][token]), zero
        for n in range(LAYERS):
            attn, ffn = f"model.layers.{n}.attn", f"model.layers.{n}.ffn"
            u = normed(f"model.layers.{n}.attn_norm", x)
            mixed = {c: u + (before[n][0] - u) * w[f"{attn}.x_{c}"].flatten() for c in "rwkvag"}
            before[n][0] = u
            r, k, v = (w[f"{attn}.{c}_proj.weight"] @ mixed[c] for c in "rkv")
            decay = low_rank(f"{attn}.w_lora", mixed["w"], torch.tanh).sigmoid()
            decay = torch.exp(-torch.exp(torch.tensor(-0.5, dtype=torch.float64)) * decay)
            a = low_rank(f"{attn}.a_lora", mixed["a"]).sigmoid()
            g = low_rank(f"{attn}.g_lora", mixed["g"], torch.sigmoid)
            if n == 0:
                v_first = v
            else:
                v = v + (v_first - v) * low_rank(f"{attn}.v_lora", mixed["v"]).sigmoid()
            kappa = (k * w[f"{attn}.k_k"]).view(-1, HEAD)
            kappa = kappa / kappa.norm(dim=-1, keepdim=True)
            k = k * (1 + (a - 1) * w[f"{attn}.k_a"])
            out = []
            for h in range(D // HEAD):
                here = slice(h * HEAD, (h + 1) * HEAD)
                S, erased = states[n, h], kappa[h]  # (value, key)
                S = S * decay[here] - (S @ erased)[:, None] * (a[here] * erased)
                S = S + v[here][:, None] * k[here]
                states[n, h], y = S, S @ r[here]
                y = (y - y.mean()) / torch.sqrt(y.var(unbiased=False) + HEAD * eps)
                y = y * w[f"{attn}.g_norm.weight"][here] + w[f"{attn}.g_norm.bias"][here]
                out.append(y + (r[here] * k[here] * w[f"{attn}.r_k"][h]).sum() * v[here])
            x = x + w[f"{attn}.o_proj.weight"] @ (torch.cat(out) * g)
            u = normed(f"model.layers.{n}.ffn_norm", x)
            shifted = u + (before[n][1] - u) * w[f"{ffn}.x_k"]
            before[n][1] = u
            x = x + w[f"{ffn}.value.weight"] @ torch.relu(w[f"{ffn}.key.weight"] @ shifted) ** 2
        logits.append(w["lm_head.weight"] @ normed("model.norm", x))
    return torch.stack(logits)


@pytest.mark.parametrize("changes", [{}, {"model_type": "rwkv7_fla", "norm_eps": 0.01}])
def test_logits_are_those_of_the_published_recurrence(changes, tmp_path):
    found = write(tmp_path, **changes)
    tokens = torch.randint(VOCAB, (200,)).tolist()
    expected = reference(found, tokens, (CONFIG | changes)["norm_eps"])
    model = opened(tmp_path).double()
    for length in (1, 2, 63, 200):
        logits = model(torch.tensor([tokens[:length]]))[0]
        torch.testing.assert_close(logits, expected[:length], atol=1e-5, rtol=1e-5)
    logits, state = model(torch.tensor([tokens[:150]]), model.empty_state(1))
    for at in range(150, 200):  # token by token behind a whole
        logits, state = model(torch.tensor([tokens[at : at + 1]]), state)
        torch.testing.assert_close(logits[0, 0], expected[at], atol=1e-5, rtol=1e-5)


AUTHOR = """
import sys, torch
from rwkv.model import RWKV
folder, *tokens = sys.argv[1:]
logits, _ = RWKV(f"{folder}/author", "cpu fp32").forward([*map(int, tokens)], None, True)
torch.save(logits, f"{folder}/logits.pt")
"""


def author_names(w: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights by the names of RWKV-LM, whose low-rank matrices are transposed."""
    names = {"model.embeddings": "emb", "lm_head": "head", "model.norm": "ln_out"}
    names |= {"pre_norm": "ln0", "attn_norm": "ln1", "ffn_norm": "ln2", "g_norm": "ln_x"}
    names |= {"r_proj": "receptance", "k_proj": "key", "v_proj": "value", "o_proj": "output"}
    names |= {"model.layers": "blocks", "attn": "att"}
    found = {"blocks.0.att.v0": torch.zeros(D)}  # the first layer reads none
    for name, weight in w.items():
        for theirs, his in names.items():
            name = re.sub(rf"(?<![a-z_]){theirs}(?![a-z_])", his, name)
        if match := re.fullmatch(r"(.*)\.([wavg])_lora\.lora\.(0|2)\.(weight|bias)", name):
            place = 0 if match[4] == "bias" else 1 + int(match[3]) // 2
            name = f"{match[1]}.{match[2]}{place}"
            weight = weight if match[4] == "bias" else weight.T.contiguous()
        found[name] = weight
    return found


def test_logits_are_those_of_the_package_of_its_author(tmp_path, monkeypatch):
    pytest.importorskip("rwkv")
    for name, value in {"D": 128, "HEAD": 64, "HIDDEN": 256}.items():  # his heads have 64 channels
        monkeypatch.setitem(globals(), name, value)
    sizes = {"hidden_size": 128, "head_dim": 64, "intermediate_size": 256}
    found = write(tmp_path, **sizes, value_dim=[128] * LAYERS, norm_eps=1e-5)
    torch.save(author_names(found), tmp_path / "author.pth")
    tokens = torch.randint(VOCAB, (200,)).tolist()
    environment = {**os.environ, "RWKV_V7_ON": "1", "RWKV_JIT_ON": "0"}
    command = [sys.executable, "-c", AUTHOR, str(tmp_path), *map(str, tokens)]
    subprocess.run(
        command, env=environment, check=True, capture_output=True
    )  # it sets global flags
    theirs = torch.load(tmp_path / "logits.pt", weights_only=True)
    ours = opened(tmp_path)(torch.tensor([tokens]))[0]
    torch.testing.assert_close(ours, theirs, atol=1e-5 * theirs.abs().max().item(), rtol=1e-5)


def test_shifts_in_one_tensor_are_those_in_six(tmp_path):
    from safetensors.torch import save_file

    tokens = torch.randint(VOCAB, (1, 20))
    found = write(tmp_path)
    before = opened(tmp_path)(tokens)
    for n in range(LAYERS):
        rows = [found.pop(f"model.layers.{n}.attn.x_{x}").flatten() for x in "rwkvag"]
        found[f"model.layers.{n}.attn.x_x"] = torch.stack(rows)
    save_file(found, tmp_path / "model.safetensors")
    assert torch.equal(opened(tmp_path)(tokens), before)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("attn", {"layers": [1], "num_heads": 4}), ("hidden_act", "relu"), ("norm_bias", False)],
        *[("norm_first", False), ("value_dim", [2 * D] * LAYERS), ("scale_decay", 2.0)],
    ],
)
def test_what_the_zoo_does_not_compute_is_refused_by_name(key, value):
    with pytest.raises(UserError, match=key):
        describe(CONFIG | {key: value})


def test_a_weight_that_is_missing_or_of_another_rank_is_refused_in_one_line(tmp_path):
    from safetensors.torch import save_file

    found = write(tmp_path)
    del found["model.layers.1.attn.x_v"]
    save_file(found, tmp_path / "model.safetensors")
    check_checkpoint(tmp_path)
    with pytest.raises(UserError, match=r"blocks\.1\.mixer\.mu, which is \(6, 24\) there and \(5"):
        opened(tmp_path)
