"""Work in processes of its own: the ranks of one run, and a sweep's arms, which may crash.

Children are forked where that is safe: in a process of Linux whose libraries were imported and not
yet used. They share what it imported (seconds), and each has its own threads, its own
allocator and its own end. Otherwise ranks start from a fork server (Linux) or anew.
"""

import importlib
import math
import multiprocessing as mp
import os
import pickle
import signal
import socket
import sys
import threading
import time
import traceback
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from zoo.errors import RunError, UserError
from zoo.runs.stopping import GRACE, current, handled, leave_to_parent

LEFT = 5.0  # seconds that the other ranks have once one has failed: they may wait for it for ever
RECOUNTS = 5  # of the threads, before it is said that a process cannot be forked
PATIENCE = "a checkpoint is being written"
KILLED = {signal.SIGKILL: " (the system does this when memory runs out)"}

_imported: int | None = None  # threads below Python's that importing the libraries started


def load(module: str) -> None:
    """Import what children will need, once for all of them, where that keeps this process fit to
    be forked."""
    global _imported
    fresh = "torch" not in sys.modules
    if (
        fresh
    ):  # read from the driver's library which devices there are: CUDA itself cannot be forked
        os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    importlib.import_module(module)
    if fresh:
        _imported = _native_threads()


def can_fork() -> bool:
    """Whether children forked here can use the libraries: `load` imported them, and nothing has
    put them to use since."""
    if _imported is None or sys.platform != "linux" or mp.current_process().daemon:
        return False
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return False
    for _ in range(RECOUNTS):
        if _native_threads() <= _imported:
            return True
        time.sleep(0.005)  # a thread that Python has joined may still be there for the system
    return False


def _native_threads() -> int:
    tasks = Path("/proc/self/task")
    return len(os.listdir(tasks)) - threading.active_count() if tasks.is_dir() else 0


def run(target: Callable[..., object], *args: Any, count: int = 1) -> None:
    """Call `target(*args)` in each of `count` processes, and wait for them.

    They get their rank as torchrun passes it, in LOCAL_RANK, WORLD_SIZE and so on. A stop is
    handed on to them. Raises what the first to fail raised, with its traceback; RunError for one
    that crashed; KeyboardInterrupt where they were stopped.
    """
    context: Any = mp.get_context(_method())
    rendezvous = _rendezvous(count)
    ends: list[Connection] = []
    children: list[Any] = []
    stop = current()
    with stop.deferred(), stop.on_forced_end(lambda _: _kill(children)):
        try:
            for rank in range(count):
                here, there = context.Pipe()
                about = {**rendezvous, "LOCAL_RANK": str(rank), "RANK": str(rank)}
                child = context.Process(
                    target=_child, args=(there, about if count > 1 else {}, target, args)
                )
                with _without_main(), warnings.catch_warnings():
                    warnings.simplefilter("ignore", DeprecationWarning)  # of our waiting thread
                    child.start()
                there.close()
                ends.append(here)
                children.append(child)
            failures = _follow(children, ends)
        finally:
            _kill(children)
            for end in ends:
                end.close()
    if stop.requested:
        message = [str(error) for error in failures if isinstance(error, KeyboardInterrupt)]
        by = (message or ["stopped by SIGTERM in the midst of a step"])[0]
        raise KeyboardInterrupt(by.replace("SIGTERM", stop.requested))
    if failures:
        raise min(failures, key=_rank_of_blame)


def _method() -> str:
    if can_fork():
        return "fork"
    return "forkserver" if "forkserver" in mp.get_all_start_methods() else "spawn"


def _rendezvous(count: int) -> dict[str, str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


@contextmanager
def _without_main() -> Iterator[None]:
    """Keep what starts a child anew from running the caller's script once more in it."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _child(
    end: Connection, about: dict[str, str], target: Callable[..., object], args: tuple[Any, ...]
) -> None:
    os.environ.update(about)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with handled() as stop:
        leave_to_parent()
        stop.on_untimed = lambda: end.send(PATIENCE)
        try:
            target(*args)
            end.send(None)
        except BaseException as error:
            end.send(_portable(error))


def _portable(error: BaseException) -> BaseException:
    """The error as it can be sent, the traceback's text as its cause.

    RunError where another program has the port that the processes were to meet by.
    """
    from multiprocessing.pool import ExceptionWithTraceback  # type: ignore[attr-defined]

    if type(error).__name__ == "DistNetworkError" and "EADDRINUSE" in str(error):
        rule = (
            f"port {os.environ['MASTER_PORT']}, by which its processes meet, was taken by another"
        )
        error = RunError(f"{rule} program meanwhile; the same command tries another port")
    known = isinstance(error, UserError | RunError | KeyboardInterrupt)
    sent = error if known else ExceptionWithTraceback(error, error.__traceback__)
    try:
        pickle.loads(pickle.dumps(sent))
        return sent
    except Exception:  # an exception that does not survive pickling
        traceback.print_exc()
        return RunError(f"{type(error).__name__}: {error}")


def _end_with_parent() -> None:
    parent = mp.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGKILL)


def _follow(children: list[Any], ends: list[Connection]) -> list[BaseException]:
    """Wait for all children; the failures, in the order they came."""
    stop, failures = current(), []
    alive, silent = set(range(len(children))), set(range(len(children)))
    deadline, handed_on = math.inf, False
    while alive:
        for rank in _ready(alive, children, ends):
            ended = children[rank].exitcode is not None  # before what it said last is read
            for message in _messages(ends[rank]):
                if message == PATIENCE:
                    deadline = math.inf
                    continue
                silent.discard(rank)
                if message is not None:
                    failures.append(message)
            if ended:
                alive.remove(rank)
                if rank in silent and children[rank].exitcode:
                    failures.append(_crash(rank, children[rank].exitcode, len(children)))
        if stop.requested and not handed_on:
            handed_on, deadline = True, time.monotonic() + GRACE + 1
            stop.untimed = True  # from here on the children are waited for, and have their own end
            for rank in alive:
                with suppress(ProcessLookupError):
                    os.kill(children[rank].pid, signal.SIGTERM)
        if failures and not handed_on:
            deadline = min(deadline, time.monotonic() + LEFT)
        if time.monotonic() > deadline:
            silent -= alive  # their end is ours
            _kill([children[rank] for rank in alive])
    return failures


def _ready(alive: set[int], children: list[Any], ends: list[Connection]) -> list[int]:
    """Those that have said something or ended."""
    handles = {children[rank].sentinel: rank for rank in alive}
    handles |= {ends[rank]: rank for rank in alive if not ends[rank].closed}
    return sorted({handles[handle] for handle in wait(list(handles), timeout=0.1)})


def _messages(end: Connection) -> Iterator[Any]:
    with suppress(EOFError, OSError):
        while not end.closed and end.poll():
            yield end.recv()
        return
    end.close()  # nobody is left to say anything


def _crash(rank: int, code: int, count: int) -> RunError:
    which = f"process {rank + 1} of {count}" if count > 1 else "the process"
    if code > 0:
        return RunError(f"{which} ended with exit code {code}")
    name = signal.Signals(-code)
    return RunError(f"{which} was ended by {name.name}{KILLED.get(name, '')}")


def _rank_of_blame(error: BaseException) -> int:
    """A crash or what a process says of itself comes before the connection others lost by it."""
    return 0 if isinstance(error, RunError | ValueError | KeyboardInterrupt) else 1


def _kill(children: list[Any]) -> None:
    for child in children:
        if child.pid is not None and child.exitcode is None:
            child.kill()
            child.join()
