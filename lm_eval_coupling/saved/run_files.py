"""The one list of result files and coupling tables of a folder, and what it passes over and why."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import re
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path

from lm_eval_coupling.errors import CouplingError, why

_DATE = re.compile(r"_(\d{4}-\d{2}-\d{2}T\d{2}-\d{2}-\d{2}(?:\.\d+)?)\.(?:json|jsonl|parquet)$")
TABLE_PREFIXES = ("coupling_", "untrained_coupling_")
_TAIL = 1 << 16  # bytes at the end of a file; those of a table hold its footer


def date_in(file: Path) -> str:
    """Return lm-eval's date in the name of a results file, samples or table; "" without one."""
    date = _DATE.search(file.name)
    return date[1] if date else ""


@dataclasses.dataclass(frozen=True)
class RunFiles:
    """``files``: results and tables in the order of their paths; ``passed_over``: sentences."""

    files: tuple[Path, ...]
    passed_over: tuple[str, ...]


def require_roots(roots: Iterable[Path]) -> None:
    """Require that every root exists and can be read.

    Raises:
        CouplingError: naming the first that does not.
    """
    for root in roots:
        _mode(root)


def _mode(root: Path) -> int:
    try:
        return os.stat(root).st_mode
    except (OSError, ValueError) as error:
        missing = isinstance(error, FileNotFoundError)
        reason = "does not exist" if missing else f"cannot be read ({why(error)})"
        raise CouplingError(
            f"got {root}, which {reason}; give folders that lm-eval wrote, or its result files"
        ) from None


def list_run_files(roots: Sequence[Path]) -> RunFiles:
    """List ``results_*.json`` and coupling tables, each file once, in the order of the roots.

    Folders are searched recursively and links followed, each folder once. Passed over, with the
    reason, are hidden folders that hold such files, what cannot be read, and copies: of files with
    equal content one counts, the one with most files of its run beside it.

    Args:
        roots: folders, or files, which bring the other files of their date in their folder.

    Returns:
        The files, and what was passed over.

    Raises:
        CouplingError: if a root does not exist, cannot be read, or is neither a folder nor a file.
    """
    listing = _Listing()
    for root in roots:
        mode = _mode(root)
        if stat.S_ISREG(mode):
            listing.add_file(root)
            listing.add_companions(root)
        elif stat.S_ISDIR(mode):
            listing.add_folder(root)
        else:
            raise CouplingError(f"got {root}, which is neither a folder nor a regular file")
    kept, copies = _without_copies(listing.files)
    return RunFiles(tuple(kept), (*listing.passed_over, *copies))


class _Listing:
    """Files that were found so far; folders and files are known by device and inode."""

    def __init__(self) -> None:
        self.files: list[Path] = []
        self.passed_over: list[str] = []
        self._visited: set[tuple[int, int]] = set()

    def add_file(self, file: Path) -> None:
        """Add a regular file once, whatever links lead to it."""
        if self._is_new(os.stat(file)):
            self.files.append(file)

    def add_companions(self, file: Path) -> None:
        """Add the tables of a results file's date in its folder, or the results of a table's."""
        if date := date_in(file):
            names = sorted(os.listdir(file.parent))
            tables = [n for n in names if n.startswith(TABLE_PREFIXES) and n.endswith(".parquet")]
            others = tables if file.suffix == ".json" else [n for n in names if _is_results(n)]
            for name in others:
                if date_in(file.parent / name) == date:
                    self._add_entry(file.parent / name)

    def add_folder(self, root: Path) -> None:
        """Add the files of a folder and of those below it."""
        first = len(self.files)
        hidden: list[Path] = []
        try:
            self._search(root, hidden)
        except OSError as error:
            raise CouplingError(f"got {root}, which cannot be read ({why(error)})") from None
        self.files[first:] = sorted(self.files[first:])
        for folder in sorted(hidden):
            if number := _count_run_files(folder):
                self.passed_over.append(
                    f"got {folder}, a hidden folder with {number} result files and tables; give "
                    "its path to read them"
                )

    def _search(self, root: Path, hidden: list[Path]) -> None:
        folders = [root]
        while folders:
            folder = folders.pop()
            try:
                if not self._is_new(os.stat(folder)):
                    continue
                with os.scandir(folder) as entries:
                    names = sorted(entry.name for entry in entries)
            except OSError as error:
                if folder is root:
                    raise
                self.passed_over.append(f"got {folder}, which cannot be read ({why(error)})")
                continue
            for name in names:
                path = folder / name
                if os.path.isdir(path):
                    (hidden if name.startswith(".") else folders).append(path)
                elif _is_run_file(name):
                    self._add_entry(path)

    def _add_entry(self, path: Path) -> None:
        try:
            status = os.stat(path)
        except OSError as error:
            dangling = isinstance(error, FileNotFoundError)
            reason = "a link to nothing" if dangling else f"which cannot be read ({why(error)})"
            self.passed_over.append(f"got {path}, {reason}")
            return
        if not stat.S_ISREG(status.st_mode):
            self.passed_over.append(f"got {path}, which is no regular file")
        elif self._is_new(status):
            self.files.append(path)

    def _is_new(self, status: os.stat_result) -> bool:
        key = (status.st_dev, status.st_ino)
        is_new = key not in self._visited
        self._visited.add(key)
        return is_new


def _is_results(name: str) -> bool:
    # `--output_path NAME.json` makes NAME_<date>.json instead of results_<date>.json.
    return name.endswith(".json") and (name.startswith("results") or bool(_DATE.search(name)))


def _is_run_file(name: str) -> bool:
    is_table = name.endswith(".parquet") and name.startswith(TABLE_PREFIXES)
    return is_table or _is_results(name)


def _count_run_files(folder: Path) -> int:
    """Count the run files below a folder without following links."""
    return sum(_is_run_file(name) for _, _, names in os.walk(folder) for name in names)


def _without_copies(files: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """Return the files without copies, and a sentence for each folder that holds copies."""
    same: dict[tuple[int, str], list[Path]] = {}
    for file in _of_equal_size(files):
        same.setdefault((_size(file), _digest(file, _TAIL)), []).append(file)
    original: dict[Path, Path] = {}
    companions = functools.cache(_count_companions)
    for group in [group for group in same.values() if len(group) > 1]:
        by_content: dict[str, list[Path]] = {}
        for file in group:
            by_content.setdefault(_digest(file), []).append(file)
        for equal in by_content.values():
            # The first of several that have as many companions.
            kept = max(equal, key=lambda file: companions(file.parent, date_in(file)))
            original |= {file: kept for file in equal if file is not kept}
    # A table that has kept results of its own date beside it is kept too, even if its bytes are a
    # copy.
    results = {(f.parent, date_in(f)) for f in files if f.suffix == ".json" and f not in original}
    original = {
        copy: kept
        for copy, kept in original.items()
        if copy.suffix == ".json" or (copy.parent, date_in(copy)) not in results
    }
    folders: dict[tuple[Path, Path], list[Path]] = {}
    for copy, kept in original.items():
        folders.setdefault((copy.parent, kept.parent), []).append(copy)
    sentences = [_copies_in_words(len(copies), *pair) for pair, copies in folders.items()]
    return [file for file in files if file not in original], sentences


def _copies_in_words(count: int, folder: Path, other: Path) -> str:
    if other == folder:
        place = "another file there" if count == 1 else "other files there"
    else:
        place = f"{'a file' if count == 1 else 'files'} in {other}"
    copies = "copy" if count == 1 else "copies"
    return f"got {folder} with {count} {copies} of {place}; each counts once"


def _of_equal_size(files: Iterable[Path]) -> list[Path]:
    by_size: dict[int, list[Path]] = {}
    for file in files:
        by_size.setdefault(_size(file), []).append(file)
    return [file for group in by_size.values() if len(group) > 1 for file in group]


def _size(file: Path) -> int:
    """Return a file's size in bytes, -1 if it is gone since it was listed."""
    try:
        return os.stat(file).st_size
    except OSError:
        return -1


def _digest(file: Path, last: int | None = None) -> str:
    """Digest a file's content, or its ``last`` bytes; a file that cannot be read has no equal."""
    try:
        with file.open("rb") as content:
            if last is not None:
                content.seek(max(0, file.stat().st_size - last))
            digest = hashlib.sha256()
            while part := content.read(1 << 20):
                digest.update(part)
            return digest.hexdigest()
    except OSError:
        return str(file)


def _count_companions(folder: Path, date: str) -> int:
    """Count a folder's files of a date, samples included; 0 if it is gone since it was listed."""
    try:
        return sum(date in name for name in os.listdir(folder)) if date else 0
    except OSError:
        return 0
