"""Files that are written completely or not at all, and folders to write them into."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from lm_eval_coupling.errors import CouplingError, why


def require_writable(folder: Path) -> None:
    """Create ``folder`` unless it exists, and require that files can be made in it.

    Raises:
        CouplingError: if the folder or files in it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        reason = "" if os.access(folder, os.W_OK | os.X_OK) else "Permission denied"
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


@contextlib.contextmanager
def writing_together(folder: Path, former: Iterable[str] = ()) -> Iterator[Path]:
    """Yield a temporary folder in ``folder``, and move its files into ``folder`` at the end.

    An error or Ctrl-C in the block leaves ``folder`` as it was. Of two processes that write at the
    same time, the files of the later one remain.

    Args:
        folder: must exist.
        former: names of files that an earlier call wrote; those not written again are removed.

    Raises:
        OSError: if the folder cannot be written.
    """
    temporary = Path(tempfile.mkdtemp(prefix=".writing-", dir=folder))
    try:
        yield temporary
        with _alone_in(folder):
            written = {file.name for file in temporary.iterdir()}
            for name in written:
                target = folder / name
                (temporary / name).replace(target.resolve() if target.is_symlink() else target)
            for name in set(former) - written:
                if Path(name).name == name:  # never a file of another folder
                    (folder / name).unlink(missing_ok=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Keep other processes that ask for it out of a folder; without locks nobody is kept out."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError, OSError):
            import fcntl  # Windows has none

            descriptor = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
