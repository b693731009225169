"""Writes a model for use elsewhere: a `transformers` checkpoint, or the zoo's own safetensors.

A model has the form of `transformers` where an architecture there computes the same: a Llama, a
Mistral, a Qwen, a GPT-NeoX, a Mamba, a Mamba-2 or an RWKV-4. Any other model is written with
`model_type: zoo`: its options in config.json and its weights under the zoo's names, which
checkpoint=<folder> and zoo.load open. Weights are the same numbers in both forms.
"""

import json
import os
from collections.abc import Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from zoo.config.schema.train import TrainConfig
from zoo.config.validate import plain
from zoo.data.tokenizers import BYTES, tokenizer_of
from zoo.errors import refuse, refuse_path
from zoo.model.backbone import Backbone
from zoo.model.checkpoint import base_of, checkpoint_weights, load
from zoo.model.convert import layer_there, to_transformers
from zoo.model.lora import in_peft_format
from zoo.model.shrink import multiplied_out
from zoo.model.transformers_config import Foreign, foreign
from zoo.pretrained.families import OWN_SECTIONS, STAGES, TRAINED
from zoo.pretrained.weights import read_json
from zoo.runs.files import cannot_write, drafted
from zoo.runs.folder import RunFolder

FORMATS = ("auto", "transformers", "zoo", "adapter")
BASE_OPTIONS = "base_options.json"  # of `from_pretrained`, beside adapters
END = "<|end_of_document|>"  # a token that the zoo added behind those of the file


class Exported(NamedTuple):
    """What was written: the class of `transformers` (or "zoo", "LoRA"), its weights' file, and
    about the tokenizer; why `transformers` has no such model, where that decided the form; and of
    adapters what they go over."""

    architecture: str
    weights: str
    tokenizer: str
    difference: str = ""
    base: str = ""


def export(folder: RunFolder, to: Path, form: str = "auto") -> Exported:
    """Write a run's model into a new folder, which appears whole or not at all.

    Args:
        folder: the run's.
        to: the folder to write; must not exist.
        form: transformers, zoo, or auto: that of transformers where there is one; adapter: that of
            peft, of a run with lora.rank.

    Raises:
        UserError: where the run has no weights, `to` exists or cannot be written, or the form is
            not possible. Of a run of a synthetic task, which has no tokenizer, the zoo's own is
            not: nothing would open it.
    """
    given, to = to, to.resolve()  # x/.. is no new folder
    if to.exists():
        refuse("to", given, "exists already", "Name a new folder")
    for package in ("safetensors", "tokenizers"):
        if find_spec(package) is None:
            refuse("to", given, f"needs the package {package}", f"Run pip install {package}")
    if form not in FORMATS:
        refuse("format", form, f"must be {', '.join(FORMATS[:-1])} or {FORMATS[-1]}")
    model, config = _dense(folder), folder.config
    if model.frequencies is not None:
        rule = "its frequencies are trained (extension=clex), which no exported form holds"
        refuse("run", folder, rule, "Open the run itself: zoo.load")
    found = foreign(model, config)
    difference = found if form == "auto" and isinstance(found, str) else ""
    own, changed, base = form == "zoo" or bool(difference), {}, ""
    if own and config.data.task is not None:
        why = f", and transformers has no architecture for it ({found})" if difference else ""
        rule = f"is a task without a tokenizer, which the zoo's form needs{why}"
        refuse("data", config.data.name, rule, "Open the run folder itself")
    if own:
        written, weights = _own(model, config)
        architecture = "zoo"
    elif form == "adapter":
        written, weights, changed, base = _adapter(folder, found)
        architecture = "LoRA"
    elif isinstance(found, str):
        refuse("format", form, f"has no architecture for this model ({found})", "Use format=zoo")
    else:
        written, weights = _of_transformers(model, config, found)
        architecture = found.architecture
    how_trained = {"seq_len": config.seq_len, "precision": config.trainer.precision}
    file = "adapter_model.safetensors" if form == "adapter" else "model.safetensors"
    draft = to.with_name(f".{to.name}.{os.getpid()}.tmp")
    try:
        with drafted(draft):
            if form == "adapter":
                about = "adapter_config.json"
                _write_json(draft / about, written)
                if changed:
                    _write_json(draft / BASE_OPTIONS, changed)
            else:
                end, about = _write_tokenizer(draft, config, model.vocab_size)
                written |= {"eos_token_id": end, TRAINED: how_trained}
                _write_json(draft / "config.json", written)
            _write_weights(draft / file, weights)
            os.rename(draft, to)
    except OSError as error:
        raise cannot_write(to, error) or error from error
    return Exported(architecture, file, about, difference, base)


def _of_transformers(
    model: Backbone, config: TrainConfig, found: Foreign
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    tied = config.model.tied
    weights = to_transformers(model.state_dict(), found.names, config.size.heads, tied)
    return {
        "architectures": [found.architecture],
        "model_type": found.model_type,
        "vocab_size": model.vocab_size,
        "tie_word_embeddings": tied,
        "dtype": "float32",
        **found.config,
    }, weights


def _adapter(
    folder: RunFolder, found: Foreign | str
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any], str]:
    """The adapters of a run, under the names of `transformers` where it has the model and its base.

    Returns the contents of adapter_config.json and of the weights' file, the options under which
    `transformers` opens the base as the run has it, and in words what the adapters go over.
    """
    config = folder.config
    if config.lora.rank is None:
        refuse("format", "adapter", "the run was trained without lora.rank", "Use format=auto")
    base = base_of(folder)
    place, before = base.config.checkpoint or str(base), foreign(_dense(base), base.config)
    adapters = partial(in_peft_format, checkpoint_weights(folder), config.lora)
    if isinstance(found, str) or isinstance(before, str):
        tuned = config.extension.name
        under = "" if tuned == "none" else f", under the run's extension={tuned}"
        over = f"names are the zoo's: they go over zoo.load({str(place)!r}).backbone{under}"
        return *adapters(place, lambda layer: layer), {}, over
    if config.shrunk is not None and config.shrunk.rank is not None:
        rule = "adapts units of low rank, which no model of transformers has"
        refuse("format", "adapter", rule, "Use format=auto")
    if found.architecture != before.architecture:
        rule = f"is a {found.architecture} there, and its base a {before.architecture}"
        refuse("format", "adapter", rule, "Use format=auto")
    keys = {*found.config, *before.config}
    changed = {key: found.config.get(key) for key in keys}
    changed = {key: one for key, one in changed.items() if before.config.get(key) != one}
    over = f"they go over {place}"
    if not _opened_there(Path(place), before):
        over = f"they go over an export of their base: zoo export run={base} to=<folder>"
    if changed:
        named = " and ".join(sorted(changed))
        over += f", opened with the {named} of {BASE_OPTIONS}: from_pretrained(<base>, **options)"
    return *adapters(place, partial(layer_there, names=found.names)), changed, over


def _opened_there(checkpoint: Path, found: Foreign) -> bool:
    """Whether `transformers` opens a checkpoint as the architecture that was found."""
    file = checkpoint / "config.json"
    return file.is_file() and read_json(file).get("model_type") == found.model_type


def _dense(folder: RunFolder) -> Backbone:
    """The model of a run, with plain matrices in place of units of low rank."""
    model, shrunk = load(folder), folder.config.shrunk
    return model if shrunk is None or shrunk.rank is None else multiplied_out(model)


def _own(model: Backbone, config: TrainConfig) -> tuple[dict[str, Any], dict[str, Tensor]]:
    tree = plain(config)
    weights = model.state_dict()
    if config.model.tied:
        weights = {name: one for name, one in weights.items() if name != "head.weight"}
    own = {key: tree[key] for key in OWN_SECTIONS if key in tree}
    if stages := tree.get(STAGES):  # their folders by name: where they lie is this machine's
        own[STAGES] = [{**stage, "run": Path(stage["run"]).name} for stage in stages]
    return {"model_type": "zoo", "vocab_size": model.vocab_size, "zoo": own}, weights


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=2, sort_keys=True, allow_nan=False)
    file.write_text(f"{text}\n", encoding="utf-8")


def _write_weights(file: Path, weights: Mapping[str, Tensor]) -> None:
    from safetensors.torch import save_file

    stored, addresses = {}, set()
    for name, one in weights.items():  # safetensors takes no tensor twice, as layers may share one
        stored[name] = one.clone() if one.data_ptr() in addresses else one.contiguous()
        addresses.add(one.data_ptr())
    save_file(stored, file, {"format": "pt"})


def _write_tokenizer(folder: Path, config: TrainConfig, vocabulary: int) -> tuple[int | None, str]:
    """Write tokenizer.json; returns the token that ends a document, and what was written."""
    if config.data.task is not None:
        return None, f"no tokenizer (data={config.data.name} has no text)"
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    choice, end = config.data.options["tokenizer"], config.data.options.get("end_token")
    ours = tokenizer_of(config.data.options)
    if choice == BYTES:
        alphabet = {letter: byte for byte, letter in _letters().items()}
        tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        about = "tokenizer.json (a token for each byte, 0 ends a document)"
    else:
        tokenizer = Tokenizer.from_file(choice)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        about = f"tokenizer.json ({Path(choice).name})"
        if end is None:  # the zoo's own, behind those of the file
            tokenizer.add_special_tokens([END])
            if tokenizer.token_to_id(END) != ours.end:
                refuse_path(choice, "has gaps among its tokens", "Use format=zoo")
        tokenizer.post_processor = _template(tokenizer, ours.bos)  # texts begin as in training
    tokenizer.save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings["add_bos_token"] = ours.bos is not None
    for name, token in (("bos_token", ours.bos), ("eos_token", ours.end)):
        if token is not None and choice != BYTES:  # where a byte is no token of its own
            settings[name] = tokenizer.id_to_token(token)
    _write_json(folder / "tokenizer_config.json", settings)
    return ours.end, about


def _template(tokenizer: Any, bos: int | None) -> Any:
    """The post-processor that puts the token `bos` before a text, or nothing."""
    from tokenizers.processors import TemplateProcessing

    if bos is None:
        return TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    token = tokenizer.id_to_token(bos)
    parts = {"single": [token, "$A"], "pair": [token, "$A", "$B"]}
    return TemplateProcessing(**parts, special_tokens=[(token, bos)])


def _letters() -> dict[int, str]:
    """The letter by which a byte-level tokenizer writes each byte (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + index) for index, byte in enumerate(others)
    }
