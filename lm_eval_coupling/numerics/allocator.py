"""The C library's allocator, told to keep what is freed for the next use.

On Linux it hands large blocks back to the system at once, and every block taken again is filled with zeros page by page
while the other threads wait: a sixth of the time of a Jacobian on a CPU. Blocks of up to 32 MiB are kept, where they are
free at the end of the heap up to 2 GiB of them.
"""

from __future__ import annotations

import ctypes
import functools
import os

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_KEPT = (1 << 31) - 1  # bytes at the end of the heap, the largest C int
_LARGEST_IN_HEAP = 32 << 20  # bytes, the most that glibc accepts


@functools.cache
def keep_freed_memory() -> bool:
    """Do so for the rest of the process; False, and nothing done, where it is not glibc's or the user has set it up."""
    if any(name.startswith("MALLOC_") for name in os.environ) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    try:
        libc = ctypes.CDLL("libc.so.6")
        return bool(libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_IN_HEAP) and libc.mallopt(_M_TRIM_THRESHOLD, _KEPT))
    except (OSError, AttributeError):
        return False
