"""What a checkpoint's folder or GGUF file says of its model, and where its tokenizer is."""

from pathlib import Path

from zoo.errors import UserError, refuse
from zoo.pretrained.families import Description, describe
from zoo.pretrained.gguf import GGUFFile
from zoo.pretrained.weights import read_json, weight_files

TOKENIZER = "tokenizer.json"


def check_checkpoint(checkpoint: Path) -> None:
    """Refuse a checkpoint that could not be read. Opens no weights, imports nothing heavy.

    Raises UserError as `read_checkpoint` does, and where a file of weights is missing.
    """
    if not checkpoint.is_file():
        _read_folder(checkpoint)
        weight_files(checkpoint)
    elif checkpoint.suffix != ".gguf":
        refuse("checkpoint", str(checkpoint), "must be a folder or a .gguf file")


def read_checkpoint(checkpoint: Path, tokenizers: Path) -> tuple[Description, Path]:
    """The model's description and the file of its tokenizer.

    The tokenizer of a GGUF file is written into the folder `tokenizers`.

    Raises:
        UserError: where there is no checkpoint, it has no tokenizer, or it asks for what the zoo
            does not compute.
    """
    if not checkpoint.is_file():
        return _read_folder(checkpoint)
    file, target = GGUFFile(checkpoint), tokenizers / f"{checkpoint.stem}.json"
    text = file.tokenizer()
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.is_file() or target.read_text(encoding="utf-8") != text:
        target.write_text(text, encoding="utf-8")
    return describe(file.config()), target


def _read_folder(checkpoint: Path) -> tuple[Description, Path]:
    if not checkpoint.is_dir():
        refuse(
            "checkpoint",
            str(checkpoint),
            "no folder and no .gguf file is there",
            "Nothing is downloaded: give the path of a checkpoint on this machine",
        )
    described = describe(read_json(checkpoint / "config.json"))
    if not (checkpoint / TOKENIZER).is_file():
        raise UserError(
            f"checkpoint={checkpoint}: it has no {TOKENIZER}. Save the model's fast tokenizer "
            "there, or name one: data.tokenizer=<file>."
        )
    return described, checkpoint / TOKENIZER
