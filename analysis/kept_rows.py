"""Rows of a long command, kept as they are made: a stopped command goes on where it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import recipe


class KeptRows:
    """Rows in ``folder/name``, a line of JSON each, of one recipe (:mod:`recipe`).

    Args:
        folder: made if missing; ``recipe.json`` in it holds the settings that made the rows.
        name: file name of the rows.
        settings: what changes the rows.

    Raises:
        CouplingError: if the folder holds rows of another recipe.
    """

    def __init__(self, folder: Path, name: str, settings: dict[str, Any]) -> None:
        """Read the rows of an earlier, stopped command."""
        folder.mkdir(parents=True, exist_ok=True)
        file, self._file = folder / "recipe.json", folder / name
        recipe.require_same(file, settings, "rows")
        recipe.write(file, settings)
        lines = self._file.read_text().splitlines(keepends=True) if self._file.exists() else []
        # A stopped command may leave half a line, which is written again.
        lines = [line for line in lines if line.endswith("\n")]
        self._file.write_text("".join(lines))
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Keep the rows of one unit of work; a stop leaves all of them or none whole."""
        with self._file.open("a") as stream:
            stream.write("".join(json.dumps(row) + "\n" for row in rows))
        self.rows += rows
