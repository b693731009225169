"""Peak memory of a training step: plain attention, fused, blocks recomputed whole and in chunks.

    python kernels/bench/blockwise.py [--json FILE] [--lengths 8k 16k ..] [--layers 1]

Transformer blocks of width 128 (2 heads of 64, SwiGLU), one window of bytes: forward, loss and
backward on one thread. Each cell has a process of its own; memory is what the step adds to it at
its peak, seconds are CPU time. A cell whose scores alone exceed the machine is not run.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from record import record

from zoo.config.compose import compose
from zoo.config.sizes import read_count
from zoo.model.build import build_model
from zoo.ops.runtime.allocator import tune_allocator

WIDTH, HEADS, VOCABULARY = 128, 2, 256
FORMS = {  # options of train.py
    "plain": ["model.mixer.backend=reference"],
    "fused": [],
    "fused, recomputed whole": ["checkpoint_activations=true"],
    "blockwise": ["checkpoint_activations=2048"],
}


def memory(field: str) -> int:
    """Bytes of this process by /proc."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def cell(form: str, length: int, layers: int) -> dict[str, Any]:
    """One step in this process, after a short one that loads and compiles what it needs."""
    tune_allocator()
    torch.set_num_threads(1)
    size = [
        f"size.width={WIDTH}",
        f"size.layers={layers}",
        f"size.heads={HEADS}",
        f"seq_len={length}",
    ]
    config = compose("train", ["model=transformer", "match=none", *size, *FORMS[form]])
    torch.manual_seed(0)
    model = build_model(config, VOCABULARY)[0]
    model.loss(torch.randint(VOCABULARY, (1, 257))).backward()
    before, start = memory("VmRSS"), time.process_time()
    loss = model.loss(torch.randint(VOCABULARY, (1, length + 1)))
    loss.backward()
    seconds = time.process_time() - start
    return {"peak_bytes": memory("VmHWM") - before, "seconds": seconds, "loss": loss.item()}


def cell_apart(form: str, length: int, layers: int) -> dict[str, Any]:
    about = {"form": form, "layers": layers, "length": length}
    scores = 5 * 4 * HEADS * length**2 * layers  # in five forms, as measured at 16k
    if form == "plain" and scores > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        return about | {"skipped": f"scores alone take {scores / 2**30:.0f} GiB"}
    command = [sys.executable, __file__, "--cell", form, str(length), str(layers)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return about | {"skipped": f"the process ended with {done.returncode}"}
    return about | json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    words = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    words.add_argument("--json", type=Path)
    words.add_argument(
        "--lengths", nargs="+", type=read_count, default=[2**n for n in range(13, 17)]
    )
    words.add_argument("--only", nargs="+", choices=FORMS, default=[*FORMS])
    words.add_argument("--layers", type=int, default=1)
    words.add_argument("--cell", nargs=3, metavar=("FORM", "LENGTH", "LAYERS"))
    given = words.parse_args()
    if given.cell:
        sys.stdout.write(json.dumps(cell(given.cell[0], *map(int, given.cell[1:]))) + "\n")
        return
    rows = []
    for length in given.lengths:
        for form in given.only:
            rows.append(row := cell_apart(form, length, given.layers))
            figures = row.get("skipped") or (
                f"{row['peak_bytes'] / 2**20:8.0f} MiB {row['peak_bytes'] / length:8.0f} bytes a "
                f"token {row['seconds']:7.1f} s"
            )
            sys.stdout.write(f"{length:>6} {form:<24}{figures}\n")
            sys.stdout.flush()
    record(given.json, rows=rows)


if __name__ == "__main__":
    main()
