"""Files that are written completely or not at all, and folders to write them into."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from lm_eval_coupling.errors import CouplingError, why


def require_writable(folder: Path) -> None:
    """Create ``folder`` unless it exists, and require that it can be written to.

    Raises:
        CouplingError: if it cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        reason = "" if os.access(folder, os.W_OK) else "Permission denied"
    except OSError as error:
        reason = error.strerror or str(error)
    if reason:
        raise CouplingError(
            f"got output folder {folder}, which cannot be written ({reason}); choose another"
        )


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Yield a temporary file's path to write to, and rename that file to ``path`` at the end.

    An error or Ctrl-C in the block removes the temporary file and leaves ``path`` as it was. A
    device or pipe, such as ``/dev/stdout``, is written to directly. Only writing belongs into the
    block: an `OSError` from it is reported as one of ``path``.

    Raises:
        CouplingError: if the file cannot be written completely, for example on a full disk.
    """
    target = path.resolve() if path.is_symlink() else path
    is_device = target.exists() and not (target.is_file() or target.is_dir())
    # The suffix stays: pandas and matplotlib take the format from it. The leading dot keeps the
    # file out of patterns such as `results_*.json`.
    temporary = target.with_name(f".writing-{secrets.token_hex(6)}{target.suffix}")
    try:
        yield target if is_device else temporary
        if is_device:
            return
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(target)
    except OSError as error:
        raise CouplingError(
            f"got {path}, which cannot be written ({why(error)}); make room or choose another place"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> Path:
    """Write a UTF-8 text file completely or not at all.

    Returns:
        ``path``.

    Raises:
        CouplingError: if the file cannot be written completely.
    """
    with writing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path
