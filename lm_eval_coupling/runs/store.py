"""The store of measurements: one SQLite file that several runs share and that survives a kill."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import random
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from lm_eval_coupling.cache import cache_folder
from lm_eval_coupling.errors import CouplingError, Reason, why
from lm_eval_coupling.measures.contract import MeasureResult

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 2
BUSY_SECONDS = 60
_SECONDS_AFTER_FAILURE = 1
_SQLITE_SECONDS = 0.5  # SQLite's own waiting, within ours
T = TypeVar("T")
_PLAIN, _REASONS, _SECONDS, _KEY = "_plain", "_reasons", "_seconds", "_key"


def default_store_path() -> Path:
    """Return the path of this user's store, in the user's cache folder."""
    return cache_folder() / "measurements.sqlite"


class MeasurementStore:
    """Results of measures by key; what :meth:`put` wrote survives a kill, even of the machine.

    Usable as a context manager and from any thread. Several processes may write to one file.
    """

    def __init__(self, path: Path | str) -> None:
        """Open the SQLite file at ``path``; create it and its folder if they are missing.

        Raises:
            CouplingError: if the file belongs to another schema version, is no store, is locked by
                another program, or cannot be written.
        """
        self.path = Path(path)
        self._require_writable()
        self._opened: dict[tuple[int, int], sqlite3.Connection] = {}
        self._unwritten: dict[str, tuple[str, bytes, str]] = {}
        self._patience: float = BUSY_SECONDS
        try:
            self._patiently(self._prepare)
        except (sqlite3.Error, UnicodeDecodeError) as error:  # the second: a damaged schema
            self.close()
            raise self._refusal(error) from None
        except CouplingError:
            self.close()
            raise

    @staticmethod
    def key(
        identity: str, measure: str, settings: dict[str, Any], tokens: Sequence[int], position: int
    ) -> str:
        """Return the key of one measure of one prompt: the SHA-256 of all arguments as JSON.

        Args:
            identity: of the weights and of everything else that changes a forward pass.
            measure: the measure's name.
            settings: everything that its numbers depend on, its version included.
            tokens: token ids of the prompt.
            position: the measured token, from 0.
        """
        what = [identity, measure, settings, [int(t) for t in tokens], int(position)]
        return hashlib.sha256(
            json.dumps(what, sort_keys=True, separators=(",", ":")).encode()
        ).hexdigest()

    def get(self, key: str) -> MeasureResult | None:
        """Return the result stored under ``key``, or ``None`` if it is missing or unreadable.

        Arrays come back as NumPy arrays, tuples as lists.
        """
        try:
            row = self._patiently(
                lambda: self._connection.execute(
                    "SELECT columns FROM measurements WHERE key = ?", (key,)
                ).fetchone()
            )
            return None if row is None else _decode(row[0], key)
        except Exception as error:  # damage takes any form; measuring again is always right
            logger.warning(
                "coupling: entry %s of %s is unreadable (%s) and is measured again",
                key[:8],
                self.path,
                error,
            )
            return None

    def put(self, entries: Mapping[str, MeasureResult]) -> None:
        """Write results durably, all or none; the last one under a key wins.

        Columns are JSON-able values, NumPy arrays or ``None``. A busy file is tried again for
        `BUSY_SECONDS`.

        Raises:
            sqlite3.Error: if the file cannot be written. It is as before then, and not locked. The
                next call writes these entries as well.
        """
        created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self._unwritten |= {key: (key, _encode(entries[key], key), created) for key in entries}
        self.flush()

    def flush(self) -> None:
        """Write what :meth:`put` could not write before, or raise sqlite3.Error once more."""
        if not (rows := dict(self._unwritten)):
            return
        try:
            self._patiently(lambda: self._write(rows.values()))
        except sqlite3.Error as error:
            if _is_busy(error) or not self._open_anew():
                raise
            self._patiently(lambda: self._write(rows.values()))
        for key, row in rows.items():  # not those that another thread has put meanwhile
            if self._unwritten.get(key) is row:
                self._unwritten.pop(key, None)

    def _open_anew(self) -> bool:
        """Open the file at the path if it is another one than before, such as after a removal.

        Returns:
            True if that file is, or becomes, a store.
        """
        if self._file_at_path() == self._file_opened:
            return False
        connections, self._opened = self._opened, {}  # other threads may be using theirs
        if (connection := connections.get((os.getpid(), threading.get_ident()))) is not None:
            connection.close()
        try:
            self._require_writable()
            self._patiently(self._prepare)
        except (sqlite3.Error, UnicodeDecodeError, CouplingError):
            return False
        logger.warning(
            "coupling: the store %s was removed, emptied or replaced while in use; what is "
            "measured from now on is kept in the file that is there",
            self.path,
        )
        return True

    def _file_at_path(self) -> tuple[int, int] | None:
        """Return what tells the file from others; None if it is missing or empty."""
        try:
            about = self.path.stat()
        except OSError:
            return None
        return (about.st_dev, about.st_ino) if about.st_size else None

    def _write(self, rows: Iterable[tuple[str, bytes, str]]) -> None:
        with self._transaction() as connection:
            connection.executemany("INSERT OR REPLACE INTO measurements VALUES (?, ?, ?)", rows)

    def _patiently(self, action: Callable[[], T]) -> T:
        """Return ``action()``, repeated for up to `BUSY_SECONDS` while another connection is busy.

        After a failure the next calls give up sooner: a run must not wait for every batch.

        Raises:
            OperationalError: of the last attempt.
        """
        deadline = time.monotonic() + self._patience
        while True:
            try:
                result = action()
            except sqlite3.OperationalError as error:
                if not _is_busy(error):
                    raise
                if time.monotonic() >= deadline:
                    self._patience = _SECONDS_AFTER_FAILURE
                    raise
                time.sleep(random.uniform(0.01, 0.05))  # so that waiting processes do not collide
            else:
                self._patience = BUSY_SECONDS
                return result

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Run one transaction, which ends with the block, however the block ends."""
        # A COMMIT that finds readers in the file fails and leaves the transaction open. Without
        # the rollback every later transaction fails too, and other processes stay locked out.
        connection = self._connection
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield connection
            connection.execute("COMMIT")
        finally:
            if connection.in_transaction:
                connection.execute("ROLLBACK")

    def close(self) -> None:
        """Close the file; without this call nothing is lost either."""
        while self._opened:
            (process, _), connection = self._opened.popitem()
            if process == os.getpid():
                connection.close()

    def __len__(self) -> int:
        """Return the number of stored results."""
        return self._connection.execute("SELECT COUNT(*) FROM measurements").fetchone()[0]

    def __bool__(self) -> bool:
        """Return True: an empty store is a store."""
        return True

    def __enter__(self) -> MeasurementStore:
        """Return the store, which is already open."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self.close()

    def _require_writable(self) -> None:
        folder = self.path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            exists = self.path.exists()  # raises for a name that is too long
        except OSError as error:
            raise CouplingError(
                f"got {self.path} as the store, whose folder cannot be made, or which cannot be "
                f"looked at ({why(error)}); {_ANOTHER}"
            ) from None
        if exists and not self.path.is_file():  # SQLite would wait for a pipe, or fill a device
            kind = "folder" if self.path.is_dir() else "device or pipe"
            raise CouplingError(
                f"got the {kind} {self.path} as the store, expected a file; {_ANOTHER}"
            )
        for place in (folder, self.path):  # SQLite writes its journal beside the file
            if place.exists() and not os.access(place, os.W_OK):
                raise CouplingError(
                    f"got {self.path} as the store, but {place} is not writable; {_ANOTHER}"
                )

    @property
    def _connection(self) -> sqlite3.Connection:
        """Connection of this process and thread.

        SQLite's connections must not be shared by threads or carried over a fork.
        """
        owner = (os.getpid(), threading.get_ident())
        if owner not in self._opened:
            self._opened[owner] = self._connect()
        return self._opened[owner]

    def _connect(self) -> sqlite3.Connection:
        try:
            # Autocommit: transactions begin explicitly. Any thread may close the connection.
            connection = sqlite3.connect(
                self.path, timeout=_SQLITE_SECONDS, isolation_level=None, check_same_thread=False
            )
        except sqlite3.Error as error:
            raise CouplingError(
                f"got {self.path} as the store, which cannot be opened ({why(error)}); {_ANOTHER}"
            ) from None
        try:
            # A write-ahead log would be faster, but it does not work on network file systems.
            connection.execute("PRAGMA journal_mode = DELETE")
            connection.execute("PRAGMA synchronous = EXTRA")
        except sqlite3.Error:
            connection.close()
            raise
        return connection

    def _refusal(self, error: Exception) -> CouplingError:
        if _is_busy(error):
            return CouplingError(
                f"got {self.path} as the store, which another program has kept locked for "
                f"{BUSY_SECONDS} s; wait until it is done, or {_ANOTHER}"
            )
        return CouplingError(
            f"got {self.path} as the store, which is no readable store ({why(error)}); "
            f"move it away or {_ANOTHER}"
        )

    def _prepare(self) -> None:
        """Make the tables unless they are there, and require them to be this version's."""
        if not self._tables():
            self._create()
        if not {"measurements", "meta"} <= self._tables():
            raise CouplingError(
                f"got {self.path} as the store, an SQLite file of something else; {_ANOTHER}"
            )
        row = self._connection.execute("SELECT schema_version FROM meta").fetchone()
        if row is None or row[0] != SCHEMA_VERSION:
            raise CouplingError(
                f"got the store {self.path} of schema version {row and row[0]}, "
                f"expected version {SCHEMA_VERSION}; move it away or {_ANOTHER}"
            )
        self._file_opened = self._file_at_path()

    def _tables(self) -> set[str]:
        return {
            name
            for (name,) in self._connection.execute(
                "SELECT name FROM sqlite_master WHERE type = 'table'"
            )
        }

    def _create(self) -> None:
        with self._transaction() as connection:
            if self._tables():  # another process was faster
                return
            connection.execute(
                "CREATE TABLE measurements (key TEXT PRIMARY KEY, columns BLOB, created TEXT)"
            )
            connection.execute("CREATE TABLE meta (schema_version INTEGER)")
            connection.execute("INSERT INTO meta VALUES (?)", (SCHEMA_VERSION,))


def _is_busy(error: Exception) -> bool:
    """Return whether another connection holds the file; the code's low byte names the kind."""
    code = getattr(error, "sqlite_errorcode", None)
    return code is not None and code & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


_ANOTHER = "choose another file with coupling_store=PATH"


def _encode(result: MeasureResult, key: str) -> bytes:
    columns = dict(result.columns) | {
        _KEY: key,
        _REASONS: [[reason.code, reason.words] for reason in result.reasons],
        _SECONDS: result.seconds,
    }
    arrays = {name: value for name, value in columns.items() if isinstance(value, np.ndarray)}
    others = {name: value for name, value in columns.items() if name not in arrays}
    text = json.dumps([list(columns), others], default=lambda scalar: scalar.item()).encode()
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **{_PLAIN: np.frombuffer(text, dtype=np.uint8)}, **arrays)
    return buffer.getvalue()


def _decode(blob: bytes, key: str) -> MeasureResult:
    with np.load(io.BytesIO(blob), allow_pickle=False) as saved:
        order, others = json.loads(saved[_PLAIN].tobytes())
        columns = {name: others[name] if name in others else saved[name] for name in order}
    # SQLite's index has no checksum: a damaged one leads from a key to the entry of another.
    if columns.pop(_KEY, key) != key:
        raise ValueError("it is the entry of another key")
    reasons = tuple(Reason(*reason) for reason in columns.pop(_REASONS))
    return MeasureResult(columns, reasons, columns.pop(_SECONDS))
