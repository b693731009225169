"""Peak memory of a training step: plain attention, fused, blocks recomputed whole and in chunks.

    python kernels/bench/blockwise.py [--json FILE] [--lengths 8k 16k 32k 64k] [--only FORM ...]

One transformer block of width 128 (2 heads of 64, SwiGLU), one window of bytes: forward, loss and
backward. Each cell has a process of its own; memory is what the step adds to it at its peak. A cell
whose scores alone exceed the machine's memory is not run. The longest window in a given memory is
what the table is for: bytes per token of the longest length that was run, against those of `fused`.
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
    "blockwise 2048": ["checkpoint_activations=2048"],
    "blockwise 512": ["checkpoint_activations=512"],
}


def memory(field: str) -> int:
    """Bytes of this process by /proc."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def cell(form: str, length: int) -> dict[str, Any]:
    """One step in this process, after a short one that loads and compiles what it needs."""
    tune_allocator()
    size = [f"size.width={WIDTH}", "size.layers=1", f"size.heads={HEADS}", f"seq_len={length}"]
    config = compose("train", ["model=transformer", "match=none", *size, *FORMS[form]])
    torch.manual_seed(0)
    model = build_model(config, VOCABULARY)[0]
    model.loss(torch.randint(VOCABULARY, (1, 257))).backward()
    before, start = memory("VmRSS"), time.perf_counter()
    loss = model.loss(torch.randint(VOCABULARY, (1, length + 1)))
    loss.backward()
    seconds = time.perf_counter() - start
    return {"peak_bytes": memory("VmHWM") - before, "seconds": seconds, "loss": loss.item()}


def cell_apart(form: str, length: int) -> dict[str, Any]:
    about = {"form": form, "length": length}
    scores = 2 * 4 * HEADS * length**2  # scores and probabilities of a forward pass
    if form == "plain" and scores > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        return about | {"skipped": f"scores alone take {scores / 2**30:.0f} GiB"}
    command = [sys.executable, __file__, "--cell", form, str(length)]
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
    words.add_argument("--cell", nargs=2, metavar=("FORM", "LENGTH"))
    given = words.parse_args()
    if given.cell:
        sys.stdout.write(json.dumps(cell(given.cell[0], int(given.cell[1]))) + "\n")
        return
    rows = []
    for length in given.lengths:
        for form in given.only:
            rows.append(row := cell_apart(form, length))
            figures = row.get("skipped") or (
                f"{row['peak_bytes'] / 2**20:8.0f} MiB {row['peak_bytes'] / length:8.0f} bytes a "
                f"token {row['seconds']:7.1f} s"
            )
            sys.stdout.write(f"{length:>6} {form:<24}{figures}\n")
            sys.stdout.flush()
    record(given.json, rows=rows)


if __name__ == "__main__":
    main()
