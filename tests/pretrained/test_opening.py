"""What opening a checkpoint costs: seconds and memory, measured in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from building import ROOT

SECONDS, SHARE = 5.0, 1.15  # of CPU, from a warm cache; peak memory over the weights' size
WIDTH, HIDDEN, LAYERS, VOCAB = 1024, 4096, 15, 8192
CODE = """
import json, sys, time
from pathlib import Path
import torch
import zoo.model.pretrained as pretrained
from zoo.pretrained.checkpoint import read_checkpoint
def peak():  # of this program alone: ru_maxrss begins with that of the process that started it
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
folder = Path(sys.argv[1])
data = {"name": "text", "path": "books", "tokenizer": "bytes", "cache": ".data"}
data |= {"eval_documents": "whole", "passkey": 0.0}
described, _ = read_checkpoint(folder, None)
config = pretrained.pretrained_config(described, folder, data, folder)
for part in folder.glob("*.safetensors"):  # a warm cache
    with open(part, "rb") as file:
        while file.read(2**24):
            pass
before, began = peak(), time.process_time()
model = pretrained.load_pretrained(config, None if sys.argv[2] == "stored" else torch.float32)
size = sum(weight.numel() * weight.element_size() for weight in model.parameters())
assert {str(weight.dtype) for weight in model.parameters()} == {sys.argv[3]}
seconds = time.process_time() - began
after = peak()
print(json.dumps({"seconds": seconds, "bytes": (after - before) * 1024, "size": size}))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's peak memory in kilobytes")
@pytest.mark.parametrize("shards", [1, 8])
@pytest.mark.parametrize(
    ("stored", "weights"),
    [
        ("float32", "float32"),
        ("bfloat16", "stored"),
        ("bfloat16", "float32"),
        ("float16", "stored"),
    ],
)
def test_a_checkpoint_is_opened_in_seconds_and_in_no_more_memory_than_its_model(
    stored, weights, shards, tmp_path
):
    write_llama(tmp_path, getattr(torch, stored), shards)
    dtype = "torch.float32" if weights == "float32" else f"torch.{stored}"
    words = [sys.executable, "-c", CODE, str(tmp_path), weights, dtype]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["seconds"] < SECONDS, found
    assert found["bytes"] < SHARE * found["size"], found


def write_llama(folder: Path, dtype: torch.dtype, shards: int) -> None:
    """A Llama of ones, 1 GB in float32, in files of some of its layers each."""
    from safetensors.torch import save_file

    shapes = {"model.embed_tokens": (VOCAB, WIDTH), "model.norm": (WIDTH,)}
    for layer in range(LAYERS):
        place = f"model.layers.{layer}"
        shapes |= {f"{place}.self_attn.{x}_proj": (WIDTH, WIDTH) for x in "qkvo"}
        shapes |= {f"{place}.mlp.{x}_proj": (HIDDEN, WIDTH) for x in ("gate", "up")}
        shapes |= {f"{place}.mlp.down_proj": (WIDTH, HIDDEN)}
        shapes |= {f"{place}.input_layernorm": (WIDTH,)}
        shapes |= {f"{place}.post_attention_layernorm": (WIDTH,)}
    names, placed = [f"{name}.weight" for name in shapes], {}
    sizes = dict(zip(names, shapes.values(), strict=True))
    for shard in range(shards):
        file = "model.safetensors" if shards == 1 else f"model-{shard}.safetensors"
        mine = {name: torch.ones(sizes[name], dtype=dtype) for name in names[shard::shards]}
        save_file(mine, folder / file, {"format": "pt"})
        placed |= dict.fromkeys(mine, file)
    if shards > 1:
        index = json.dumps({"weight_map": placed})
        (folder / "model.safetensors.index.json").write_text(index)
    config = {"model_type": "llama", "vocab_size": VOCAB, "hidden_size": WIDTH}
    config |= {"intermediate_size": HIDDEN, "num_hidden_layers": LAYERS, "rms_norm_eps": 1e-5}
    config |= {"num_attention_heads": 16, "max_position_embeddings": 4096}
    config |= {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
