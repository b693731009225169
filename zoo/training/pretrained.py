"""Makes a run of a pretrained checkpoint, which is measured and fine-tuned like any other."""

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zoo.console import say
from zoo.data.corpora import Corpus
from zoo.data.tokenizers import BYTES, bos_of
from zoo.errors import refuse
from zoo.model.build import count_parameters
from zoo.model.flops import forward_flops
from zoo.model.pretrained import (
    check_unchanged,
    identify,
    load_pretrained,
)
from zoo.pretrained.checkpoint import read_checkpoint
from zoo.pretrained.options import pretrained_config
from zoo.runs.claim import check_same_run
from zoo.runs.folder import RunFolder
from zoo.runs.provenance import provenance
from zoo.training.data import open_data


def pretrained_run(checkpoint: Path, data: Mapping[str, Any], runs: Path) -> RunFolder:
    """The run of a checkpoint on a text: the one made before, or a new one.

    Args:
        checkpoint: a folder of `transformers` (config.json and safetensors), or a GGUF file.
        data: a data section, as configs/data has it. Without `tokenizer` the checkpoint's is used.
            Texts begin with the token that the tokenizer puts before them, if any.
        runs: the folder that holds the run folders.

    Raises:
        UserError: where the checkpoint is not whole, is of no known family or needs what the
            zoo does not compute, where its tokenizer is missing, and where its weights changed
            since the run was made.
    """
    section, own = dict(data), data.get("tokenizer") is None
    described, tokenizer = read_checkpoint(checkpoint, runs / ".tokenizers" if own else None)
    if own:
        section |= {"tokenizer": str(tokenizer), "end_token": described.end_token}
        section |= {"stop_tokens": [*described.end_tokens[1:]] or None}
    if section["tokenizer"] != BYTES:
        section["bos_token"] = bos_of(section["tokenizer"])
    config = pretrained_config(described, checkpoint, section, runs)
    ignored = "; ".join(described.notes)
    text = open_data(config.data, config.seq_len)
    assert isinstance(text, Corpus)
    if text.vocab_size == described.vocab_size + 1 and section.get("end_token") is None:
        refuse(
            "data.end_token",
            None,
            "adds a token behind each text, of which the checkpoint knows none",
            "Give the number of the tokenizer's token that ends a text",
        )
    if text.vocab_size > described.vocab_size:
        refuse(
            "data.tokenizer",
            section["tokenizer"],
            f"has {text.vocab_size:,} tokens, the checkpoint's embedding {described.vocab_size:,}",
            "Give the tokenizer that the checkpoint was trained with",
        )
    extension = config.extension
    if extension.name == "pi" and extension.factor > 1 and extension.original_length is None:
        counted = f"counts from max_position_embeddings, {config.seq_len:,}"
        say(
            f"{checkpoint}: the length before its linear rope_scaling is not in config.json; a "
            f"scaling in its place {counted}, or from extension.original_length=<tokens>"
        )
    model_name = checkpoint.stem if checkpoint.is_file() else checkpoint.resolve().name
    name = f"{model_name}-{config.data.name}-{text.fingerprint[:8]}"
    path = runs / "".join(c if c.isalnum() or c in "._+-" else "-" for c in name).lstrip(".-")
    if path.exists():
        folder = RunFolder.open(path)
        check_same_run(folder, config, "Put back its config.json, or use another runs=<folder>")
        check_unchanged(checkpoint, folder.info["checkpoint"])
        for note in described.notes:
            say(f"{checkpoint}: {note}")
        if ignored and "ignores" not in folder.info:  # an older version did not record it
            folder.update(ignores=ignored)
        return folder
    say(f"{checkpoint}: {described.family}, reading its weights")
    found = identify(checkpoint)
    model = load_pretrained(config, described=described)
    info = {
        "status": "done",
        "id": uuid.uuid4().hex[:12],
        **provenance(),
        "checkpoint": found,
        **({"ignores": ignored} if ignored else {}),
        "fingerprint": text.fingerprint,
        "tokenizer": text.tokenizer_name,
        "parameters": count_parameters(model),
        "flops_per_token": forward_flops(model, config.seq_len),
    }
    return RunFolder.create(path, config, info)
