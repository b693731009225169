"""Which folder a configuration trains in, and which code a run was trained by."""

import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from zoo.config.schema.train import TrainConfig
from zoo.errors import UserError, refuse, refuse_path
from zoo.runs.folder import RunFolder
from zoo.runs.identity import identity, run_name
from zoo.runs.provenance import changed, digest, provenance, sources


def claim(config: TrainConfig) -> RunFolder:
    """The folder to train in: the one to resume, the one of the same command, or a new one.

    Raises UserError where the folder of that name holds another run.
    """
    if config.resume:
        return RunFolder.open(config.resume)
    path = first = Path(config.runs) / run_name(config)
    number = 1
    while config.fresh and path.exists():
        number += 1
        path = first.with_name(f"{first.name}-{number}")
    base = _base(config)
    if path.exists():
        folder = RunFolder.open(path)
    else:
        files = sources(config)
        made = {"id": uuid.uuid4().hex[:12], **provenance(), **base}
        info = {**made, "sources": digest(files), "files": files}
        folder = RunFolder.create(path, config, info)
        if folder.created:
            return folder
    check_same_run(folder, config, "Choose another name=, or use fresh=true")
    before = (folder.info.get("base") or {}).get("weights")
    if base and before is not None and before != base["base"]["weights"]:
        refuse_path(
            path,
            f"was fine-tuned from other weights than {config.finetune} now holds",
            "Use fresh=true to fine-tune these in a new run",
        )
    return folder


def check_same_run(
    folder: RunFolder, config: TrainConfig, advice: str, held: TrainConfig | None = None
) -> None:
    """Raise UserError where a folder holds another run than the configuration's; `held`: its own,
    as far as it is to be compared."""
    theirs, ours = identity(held or folder.config), identity(config)
    if differ := [key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key)]:
        rule = f"holds another run, which differs in {', '.join(differ)}"
        refuse_path(folder.path, rule, advice)


def _base(config: TrainConfig) -> dict[str, Any]:
    """The entry of run.json about the run that this one fine-tunes: its weights and its code."""
    if not config.finetune:
        return {}
    folder = RunFolder.open(config.finetune)
    info = {"run": config.finetune, "weights": weights_of(folder)}
    return {"base": {**info, "sources": trained_by(folder.info)}}


def weights_of(folder: RunFolder) -> str | None:
    """A hash that differs where a run's weights do; None before its first checkpoint."""
    if folder.config.checkpoint:
        return folder.info["checkpoint"]["sha256"]
    last = next(folder.whole_checkpoints(), None)
    return last and last.content


@contextmanager
def recording_changes(folder: RunFolder, config: TrainConfig) -> Iterator[None]:
    """Record the configuration and the code that the caller trains under.

    A UserError before the first step under them restores the earlier record.
    """
    before, info = folder.config, folder.info
    folder.save_config(config)
    _record_code(folder, config)
    try:
        yield
    except UserError:
        if folder.path.exists() and folder.info["step"] == info["step"]:
            folder.save_config(before)
            earlier = {name: info.get(name) for name in ("sources", "files", "earlier_sources")}
            folder.update(**{name: value for name, value in earlier.items() if value is not None})
        raise


def _record_code(folder: RunFolder, config: TrainConfig) -> None:
    """Write to run.json which code trains the run from now on, and which did until now."""
    info, files = folder.info, sources(config)
    now, before = digest(files), info.get("sources")
    step = folder.step
    if step and not before:
        return  # the code of its first steps is not known
    earlier = list(info.get("earlier_sources") or [])
    if step and before != now:
        earlier.append({"sources": before, "until_step": step})
    folder.update(sources=now, files=files, earlier_sources=earlier)


def changed_code(folder: RunFolder, config: TrainConfig) -> list[str] | None:
    """The files that changed since the run was trained, of those that shape its numbers.

    None where that is not known: the run is older than the record, or has no step yet.
    """
    info = folder.info
    if not info.get("sources") or not folder.step:
        return None
    files, before = sources(config), info.get("files")
    if digest(files) == info["sources"]:
        return []
    return changed(before, files) if isinstance(before, dict) else ["files not recorded"]


def trained_by(info: Mapping[str, Any]) -> str | None:
    """One name for all code that made a run's weights: its base's, before a resume, and since.

    None for a run that is older than the record; a part of the name may be `unknown`.
    """
    base, earlier = info.get("base"), info.get("earlier_sources")
    parts = [base.get("sources") or "unknown"] if isinstance(base, dict) else []
    parts += [str(part["sources"]) for part in earlier] if isinstance(earlier, list) else []
    parts += [info.get("sources") or "unknown"]
    name = "+".join(dict.fromkeys(parts))
    return None if name == "unknown" else name


def check_data(name: str, fingerprint: str, folder: RunFolder) -> None:
    """Refuse to go on with a run on another text or task than it began on."""
    info = folder.info
    began = info.get("fingerprint")
    if began and began != fingerprint and folder.step:
        has_path = "path" in folder.config.data.options
        place = ", say where it is now with data.path=<folder>" if has_path else ""
        refuse(
            "data",
            name,
            f"is not the text that {folder} was trained on so far (its fingerprint is "
            f"{fingerprint[:8]}, the run's {began[:8]})",
            f"Restore it{place}, or train anew with fresh=true",
        )
