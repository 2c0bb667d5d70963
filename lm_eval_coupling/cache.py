"""Folder in which measurements and fetched models are kept between runs."""

from __future__ import annotations

import functools
import os
import stat
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """Return this user's cache folder, which nobody else can write to.

    Without a home folder, as in many containers, the cache is a folder of the user's name in the
    system's temporary folder. Other users could have made that folder first and planted
    measurements in it. If it is not ours, or others can write to it, it is left alone, and an empty
    folder of this process is used instead.
    """
    from platformdirs import user_cache_path

    try:
        # Of platformdirs, old releases return the path unexpanded, newer ones raise RuntimeError.
        folder = user_cache_path("lm-eval-coupling").expanduser()
    except RuntimeError:
        user = os.getuid() if hasattr(os, "getuid") else os.environ.get("USERNAME", "user")
        folder = Path(tempfile.gettempdir()) / f"lm-eval-coupling-{user}"
    return folder if _is_private(folder) else _folder_of_this_process()


def _is_private(folder: Path) -> bool:
    """Make the folder if it is missing; return whether it is ours and closed to other writers."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = folder.stat() if _is_home(folder.parent) else folder.lstat()
    except OSError:
        return not os.path.lexists(folder)  # It cannot be made: the caller says so when it writes.
    if not hasattr(os, "getuid"):
        return True
    is_closed = not about.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return stat.S_ISDIR(about.st_mode) and about.st_uid == os.getuid() and is_closed


def _is_home(parent: Path) -> bool:
    """Return whether only we can make names in ``parent``, so that a link there is ours."""
    try:
        about = parent.stat()
    except OSError:
        return False
    return (
        hasattr(os, "getuid") and about.st_uid == os.getuid() and not about.st_mode & stat.S_IWOTH
    )


@functools.cache
def _folder_of_this_process() -> Path:
    return Path(tempfile.mkdtemp(prefix="lm-eval-coupling-"))
