"""What opening a checkpoint of 1 GB costs: seconds and memory, measured in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from building import ROOT

SECONDS, SHARE = 5.0, 1.15  # from a warm cache; peak memory over the size of the weights
WIDTH, HIDDEN, LAYERS, VOCAB = 1024, 4096, 15, 8192
CODE = """
import json, sys, time
from pathlib import Path
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
before, began = peak(), time.perf_counter()
model = pretrained.load_pretrained(config)
seconds = time.perf_counter() - began
after = peak()
print(json.dumps({"seconds": seconds, "bytes": (after - before) * 1024}))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's peak memory in kilobytes")
def test_one_gigabyte_is_opened_in_seconds_and_in_no_more_memory(tmp_path):
    size = write_llama(tmp_path)
    assert size > 1e9
    words = [sys.executable, "-c", CODE, str(tmp_path)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["seconds"] < SECONDS, found
    assert found["bytes"] < SHARE * size, found


def write_llama(folder: Path) -> int:
    """A Llama of float32 weights; returns how many bytes they are."""
    from safetensors.torch import save_file

    shapes = {"model.embed_tokens": (VOCAB, WIDTH), "model.norm": (WIDTH,)}
    for layer in range(LAYERS):
        place = f"model.layers.{layer}"
        shapes |= {f"{place}.self_attn.{x}_proj": (WIDTH, WIDTH) for x in "qkvo"}
        shapes |= {f"{place}.mlp.{x}_proj": (HIDDEN, WIDTH) for x in ("gate", "up")}
        shapes |= {f"{place}.mlp.down_proj": (WIDTH, HIDDEN)}
        shapes |= {f"{place}.input_layernorm": (WIDTH,)}
        shapes |= {f"{place}.post_attention_layernorm": (WIDTH,)}
    weights = {f"{name}.weight": torch.ones(shape) for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = {"model_type": "llama", "vocab_size": VOCAB, "hidden_size": WIDTH}
    config |= {"intermediate_size": HIDDEN, "num_hidden_layers": LAYERS, "rms_norm_eps": 1e-5}
    config |= {"num_attention_heads": 16, "max_position_embeddings": 4096}
    config |= {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    return sum(4 * weight.numel() for weight in weights.values())
