"""Tunes the C library's memory allocator for training."""

import ctypes
import platform


def tune_allocator(returns: bool = False) -> str | None:
    """Let glibc keep freed memory instead of returning it to the system; once per process.

    A training step frees large buffers and allocates them again, and the system hands out fresh
    pages slowly because it zeroes each. With `returns` it gives back each buffer above 128 KiB at
    once: left alone it keeps the holes that gathered weights leave, which grow into whole models.

    Returns the line to log, or None where there is no glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return None
    mallopt = ctypes.CDLL(None).mallopt
    trim_threshold, top_pad, mmap_threshold, mmap_max = -1, -2, -3, -4  # <malloc.h>
    if returns:
        done = mallopt(mmap_threshold, 1 << 17)  # once it is set it does not grow
        return "glibc returns freed memory at once (mallopt)" if done else None
    gigabyte = 1 << 30
    # Older releases refuse a threshold of this size; they accept a limit of zero mappings.
    mapped = mallopt(mmap_threshold, gigabyte) or mallopt(mmap_max, 0)
    if not (mapped and mallopt(trim_threshold, 2 * gigabyte - 1) and mallopt(top_pad, 64 << 20)):
        return None
    return "glibc keeps freed memory for reuse (mallopt)"
