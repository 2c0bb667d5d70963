"""What has been measured so far, safe against a kill at any moment: one SQLite file that several runs may share."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lm_eval_coupling.cache import cache_folder
from lm_eval_coupling.errors import CouplingError, Reason, why
from lm_eval_coupling.measures.contract import MeasureResult

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 2
BUSY_SECONDS = 60
_PLAIN, _REASONS, _SECONDS = "_plain", "_reasons", "_seconds"


def default_store_path() -> Path:
    """The store of this user: a file in the user's cache folder."""
    return cache_folder() / "measurements.sqlite"


class MeasurementStore:
    """What each measure found for a prompt, by key. What :meth:`put` has returned from survives a kill, even of the machine.

    Usable as a context manager, from any thread. Several processes may have the same file open and write to it.
    """

    def __init__(self, path: Path | str) -> None:
        """Open the SQLite file at ``path``; it and its folder are made if they are missing.

        Raises:
            CouplingError: if the file belongs to another schema version, is no store, or cannot be written.
        """
        self.path = Path(path)
        self._require_writable()
        self._opened: dict[tuple[int, int], sqlite3.Connection] = {}
        try:
            self._prepare()
        except (
            sqlite3.Error,
            UnicodeDecodeError,
        ) as error:  # the second where the words of the tables are damaged
            self.close()
            raise CouplingError(
                f"got {self.path} as the store, which is no readable store ({why(error)}); delete it or {_ANOTHER}"
            ) from None
        except CouplingError:
            self.close()
            raise

    @staticmethod
    def key(
        identity: str, measure: str, settings: dict[str, Any], tokens: Sequence[int], position: int
    ) -> str:
        """Identify what one measure finds.

        Args:
            identity: of the weights and of what computes with them.
            measure: its name.
            settings: what its numbers depend on, its version included.
            tokens: token ids of the prompt.
            position: the measured token, from 0.

        Returns:
            The SHA-256 of their canonical JSON, in hexadecimal.
        """
        what = [identity, measure, settings, [int(t) for t in tokens], int(position)]
        return hashlib.sha256(
            json.dumps(what, sort_keys=True, separators=(",", ":")).encode()
        ).hexdigest()

    def get(self, key: str) -> MeasureResult | None:
        """What is stored under ``key``, arrays as NumPy and tuples as lists; ``None`` if missing or unreadable."""
        try:
            found = self._connection.execute(
                "SELECT columns FROM measurements WHERE key = ?", (key,)
            ).fetchone()
            return None if found is None else _decode(found[0])
        except (
            Exception
        ) as error:  # a damaged entry takes any form; measuring again is always right
            logger.warning(
                "coupling: entry %s of %s is unreadable (%s) and is measured again",
                key[:8],
                self.path,
                error,
            )
            return None

    def put(self, entries: Mapping[str, MeasureResult]) -> None:
        """Keep what was found (columns of JSON-able values, NumPy arrays, ``None``) by key, durably: all or nothing.

        The last one under a key wins.
        """
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        rows = [(key, _encode(found), now) for key, found in entries.items()]
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            self._connection.executemany(
                "INSERT OR REPLACE INTO measurements VALUES (?, ?, ?)", rows
            )
        except BaseException:
            self._connection.execute("ROLLBACK")
            raise
        self._connection.execute("COMMIT")

    def close(self) -> None:
        """Release the file; nothing is lost without it."""
        while self._opened:
            (process, _), connection = self._opened.popitem()
            if process == os.getpid():
                connection.close()

    def __len__(self) -> int:
        """Number of measurements kept."""
        return self._connection.execute("SELECT COUNT(*) FROM measurements").fetchone()[0]

    def __bool__(self) -> bool:
        """A store is there even while it is empty."""
        return True

    def __enter__(self) -> MeasurementStore:
        """Nothing to do: the store opens when it is made."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    def _require_writable(self) -> None:
        folder = self.path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CouplingError(
                f"got {self.path} as the store, whose folder cannot be made ({why(error)}); {_ANOTHER}"
            ) from None
        if self.path.is_dir():
            raise CouplingError(
                f"got the folder {self.path} as the store, expected a file; {_ANOTHER}"
            )
        for place in (folder, self.path):  # SQLite writes its journal beside the file
            if place.exists() and not os.access(place, os.W_OK):
                raise CouplingError(
                    f"got {self.path} as the store, but {place} is not writable; {_ANOTHER}"
                )

    @property
    def _connection(self) -> sqlite3.Connection:
        """Of this process and thread: SQLite's are not to be shared by threads, nor carried over a fork."""
        here = (os.getpid(), threading.get_ident())
        if here not in self._opened:
            self._opened[here] = self._connect()
        return self._opened[here]

    def _connect(self) -> sqlite3.Connection:
        try:
            # Autocommit: what is to be one transaction says so. Any thread may close it.
            made = sqlite3.connect(
                self.path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
        except sqlite3.Error as error:
            raise CouplingError(
                f"got {self.path} as the store, which cannot be opened ({why(error)}); {_ANOTHER}"
            ) from None
        try:
            # A write-ahead log would be faster, but its shared memory does not work on network file systems.
            made.execute("PRAGMA journal_mode = DELETE")
            made.execute("PRAGMA synchronous = EXTRA")
        except sqlite3.Error:
            made.close()
            raise
        return made

    def _prepare(self) -> None:
        if not self._tables():
            self._create()
        if not {"measurements", "meta"} <= self._tables():
            raise CouplingError(
                f"got {self.path} as the store, an SQLite file of something else; {_ANOTHER}"
            )
        found = self._connection.execute("SELECT schema_version FROM meta").fetchone()[0]
        if found != SCHEMA_VERSION:
            raise CouplingError(
                f"got the store {self.path} of schema version {found}, expected version {SCHEMA_VERSION}; "
                f"delete it or {_ANOTHER}"
            )

    def _tables(self) -> set[str]:
        return {
            name
            for (name,) in self._connection.execute(
                "SELECT name FROM sqlite_master WHERE type = 'table'"
            )
        }

    def _create(self) -> None:
        self._connection.execute("BEGIN IMMEDIATE")
        if not self._tables():  # another process may have been faster
            self._connection.execute(
                "CREATE TABLE measurements (key TEXT PRIMARY KEY, columns BLOB, created TEXT)"
            )
            self._connection.execute("CREATE TABLE meta (schema_version INTEGER)")
            self._connection.execute("INSERT INTO meta VALUES (?)", (SCHEMA_VERSION,))
        self._connection.execute("COMMIT")


_ANOTHER = "choose another file with coupling_store=PATH"


def _encode(found: MeasureResult) -> bytes:
    columns = dict(found.columns) | {
        _REASONS: [[r.code, r.words] for r in found.reasons],
        _SECONDS: found.seconds,
    }
    arrays = {name: value for name, value in columns.items() if isinstance(value, np.ndarray)}
    plain = {name: value for name, value in columns.items() if name not in arrays}
    order = list(columns)
    text = json.dumps([order, plain], default=lambda scalar: scalar.item()).encode()
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **{_PLAIN: np.frombuffer(text, dtype=np.uint8)}, **arrays)
    return buffer.getvalue()


def _decode(blob: bytes) -> MeasureResult:
    with np.load(io.BytesIO(blob), allow_pickle=False) as saved:
        order, plain = json.loads(saved[_PLAIN].tobytes())
        columns = {name: plain[name] if name in plain else saved[name] for name in order}
    reasons = tuple(Reason(*reason) for reason in columns.pop(_REASONS))
    return MeasureResult(columns, reasons, columns.pop(_SECONDS))
