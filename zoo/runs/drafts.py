"""What a kill during the creation of a run folder left behind."""

import os
import platform
import shutil
from pathlib import Path

from zoo.runs.files import replacing as replacing  # part of what a run folder offers


def remove_drafts(runs: Path) -> None:
    """Remove what processes that died while creating a run left: `.<name>.<host>.<pid>.tmp`."""
    for draft in runs.glob(".*.tmp"):
        _, *rest, pid, _ = draft.name.split(".")
        host = platform.node()
        here = draft.name.endswith(f".{host}.{pid}.tmp") or len(rest) < 2
        if here and pid.isdecimal() and draft.is_dir() and not _is_alive(int(pid)):
            shutil.rmtree(draft, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass
    return True
