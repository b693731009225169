"""Judges how runs are to be read, for all of them before the first is measured."""

from collections.abc import Iterable, Mapping

import torch

from zoo.config.longrope_factors import with_found_factors
from zoo.config.schema.model import Extension
from zoo.config.schema.train import TrainConfig
from zoo.config.validate import plain
from zoo.errors import UserError
from zoo.mixers.quantized_cache import CacheBits
from zoo.model.backbone import Backbone
from zoo.model.build import assemble
from zoo.model.extend import extend, extend_as_trained
from zoo.model.quantization import quantize_cache
from zoo.runs.folder import RunFolder

VOCABULARY = 8  # no extension depends on it


def check_extension(
    extension: Extension, folders: Iterable[RunFolder], kv_cache: CacheBits | None = None
) -> None:
    """Refuse an extension, or bits of a cache, that no run can be read under; of several, one that
    cannot has its row.

    Models are built without weights, one for all runs that are alike. Raises the UserError of the
    first run.
    """
    if extension.name == "none" and kv_cache is None:
        return
    judged: dict[str, UserError | None] = {}
    for folder in folders:
        try:
            config = RunFolder.open(folder.path).config
            found = with_found_factors(plain(extension), folder.path)
        except UserError:  # damaged: reported when it is opened
            return
        tree = plain(config)
        sections = ("model", "size", "match", "seq_len", "extension", "stages")
        alike = [tree.get(name) for name in sections]
        key = str([alike, found])
        if key not in judged:
            judged[key] = _refused(config, Extension.model_validate(found), kv_cache)
        if judged[key] is None:
            return
    if errors := [error for error in judged.values() if error]:
        raise errors[0]


def without_weights(
    config: TrainConfig,
    extension: Extension,
    kv_cache: CacheBits | None = None,
    sized: Mapping[str, int] | None = None,
) -> Backbone | None:
    """A run's model as it is read, with no numbers in its weights; None where it takes these to
    build it.

    Args:
        sized: what the run's `match` chose, without which the sizes are those of the options.

    Raises:
        UserError: it cannot be read under the extension, or with such a cache.
    """
    try:
        with torch.device("meta"):
            model = assemble(config, VOCABULARY, sized or {})
        extend_as_trained(model, config)
    except Exception:  # a layer that computes while it is built, say: reported when it is opened
        return None
    extend(model, extension, config.seq_len)
    if kv_cache is not None:
        quantize_cache(model, kv_cache)
    return model


def _refused(
    config: TrainConfig, extension: Extension, kv_cache: CacheBits | None
) -> UserError | None:
    """Why a run's model cannot be read so; None where it can, or where it takes its weights to
    know."""
    try:
        without_weights(config, extension, kv_cache)
    except UserError as error:
        return error
    return None
