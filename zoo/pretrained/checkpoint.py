"""What a checkpoint's folder or GGUF file says of its model, and where its tokenizer is."""

import copy
import functools
import hashlib
from pathlib import Path

from zoo.errors import UserError, refuse
from zoo.pretrained.families import Description, describe, with_generation
from zoo.pretrained.gguf import GGUFFile
from zoo.pretrained.weights import read_json, weight_files
from zoo.runs.files import as_it_is, write_text

TOKENIZER, GENERATION = "tokenizer.json", "generation_config.json"


def check_checkpoint(checkpoint: Path, tokenizer: str | None = None) -> None:
    """Refuse a checkpoint that could not be read. Opens no weights, imports nothing heavy.

    `tokenizer` is the file of a tokenizer where it is not the checkpoint's own. Raises UserError as
    `read_checkpoint` does, and where a file of weights is missing.
    """
    if not checkpoint.is_file():
        _describe_folder(checkpoint)
        weight_files(checkpoint)
        if tokenizer is None:
            _tokenizer_of_folder(checkpoint)
    elif checkpoint.suffix != ".gguf":
        refuse("checkpoint", str(checkpoint), "must be a folder or a .gguf file")


def read_checkpoint(checkpoint: Path, tokenizers: Path | None) -> tuple[Description, Path | None]:
    """The model's description, and the file of its tokenizer; None where that is not requested.

    Args:
        checkpoint: a folder, or a GGUF file.
        tokenizers: the folder into which the tokenizer of a GGUF file is written, named after its
            contents; None where another tokenizer is used.

    Raises:
        UserError: where there is no checkpoint, it has no tokenizer, or it needs what the zoo
            does not compute.
    """
    if not checkpoint.is_file():
        described = _describe_folder(checkpoint)
        return described, None if tokenizers is None else _tokenizer_of_folder(checkpoint)
    described, text = copy.deepcopy(_of_gguf(*as_it_is(checkpoint)))
    if tokenizers is None:
        return described, None
    text = text or GGUFFile(checkpoint).tokenizer()  # which says why there is none
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    target = tokenizers / f"{checkpoint.stem}-{digest}.json"
    if not target.is_file():
        tokenizers.mkdir(parents=True, exist_ok=True)
        write_text(target, text)
    return described, target


@functools.lru_cache(maxsize=4)
def _of_gguf(checkpoint: Path, *_: int) -> tuple[Description, str | None]:
    """The description, and the tokenizer if it can be read: to open such a file takes seconds, and
    to keep it open memory."""
    file = GGUFFile(checkpoint)
    described = describe(file.config())
    try:
        return described, file.tokenizer()
    except UserError:
        return described, None


def _describe_folder(checkpoint: Path) -> Description:
    if not checkpoint.is_dir():
        refuse(
            "checkpoint",
            str(checkpoint),
            "no folder and no .gguf file is there",
            "Nothing is downloaded: give the path of a checkpoint on this machine",
        )
    described, file = describe(read_json(checkpoint / "config.json")), checkpoint / GENERATION
    return with_generation(described, read_json(file), file.name) if file.is_file() else described


def _tokenizer_of_folder(checkpoint: Path) -> Path:
    file = checkpoint / TOKENIZER
    if not file.is_file():
        raise UserError(
            f"checkpoint={checkpoint}: it has no {TOKENIZER}. Save the model's fast tokenizer "
            "there, or name one: data.tokenizer=<file>."
        )
    return file
