"""Command line, files and errors that the scripts in ``analysis/`` share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.figures.canvas import add_caption
from lm_eval_coupling.figures.saving import save_figure
from lm_eval_coupling.safe_text import for_terminal, frame_for_csv, one_line
from lm_eval_coupling.saved.atomic import writing
from lm_eval_coupling.saved.tables import safe_name

_MOST_TASKS = 3  # that a file name lists


def build_parser(doc: str, *, runs: bool = True) -> argparse.ArgumentParser:
    """Return a parser with ``--out`` and, for scripts that read runs, folders, tasks and rank."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    if runs:
        add("runs", type=Path, nargs="+", metavar="OUT", help="folders that lm-eval wrote")
        add("--tasks", nargs="+", metavar="T", help="these tasks only (default: all)")
        help_rank = "number of singular vectors (default: 10 if measured)"
        add("--rank", type=int, metavar="K", help=help_rank)
    help_out = "folder of the tables and pictures (%(default)s)"
    add("--out", type=Path, default=Path("figures"), metavar="DIR", help=help_out)
    return parser


def name_study(study: str, records: pd.DataFrame, requested: Sequence[str] | None = None) -> str:
    """Name a study's files: with its one task, or with the tasks asked for, else just ``study``."""
    tasks = list(dict.fromkeys(records["task"]))
    if len(tasks) > 1 and not requested:
        return study
    many = len(tasks) > _MOST_TASKS
    return f"{study}_{f'{len(tasks)}_tasks' if many else '+'.join(map(safe_name, tasks))}"


def save(
    folder: Path, name: str, figure: Figure, rows: pd.DataFrame, notes: Sequence[str] = ()
) -> None:
    """Write a picture and its numbers as ``name.csv``, ``name.png`` and ``name.svg``.

    Args:
        folder: made if missing.
        name: file name without a suffix.
        figure: the picture.
        rows: its numbers.
        notes: sentences below the title, such as which documents are missing; also printed.

    Raises:
        CouplingError: if the folder cannot be written.
    """
    add_caption(figure, notes)
    for sentence in notes:
        say(f"{name}: {sentence}")
    save_table(folder, name, rows)
    save_figure(figure, folder, name)
    print(f"{folder / name}.png and .svg")


def save_table(folder: Path, name: str, rows: pd.DataFrame) -> None:
    """Write ``name.csv``.

    Raises:
        CouplingError: if the folder cannot be written.
    """
    with writing(folder / f"{name}.csv") as temporary:
        folder.mkdir(parents=True, exist_ok=True)
        frame_for_csv(rows).to_csv(temporary, index=False)
    print(f"{folder / name}.csv: {len(rows)} rows")


def say(line: str) -> None:
    """Print a line that may hold names of others."""
    print(one_line(line))


def print_table(rows: pd.DataFrame, **options: Any) -> None:
    """Print a table without its index."""
    print(for_terminal(rows.to_string(index=False, **options)))


def run(main: Callable[[Sequence[str] | None], None]) -> None:
    """Call a script's ``main``; a :class:`CouplingError` is one line on stderr and exit code 2."""
    try:
        main(None)
    except CouplingError as error:
        print(one_line(f"{Path(sys.argv[0]).name}: {error}"), file=sys.stderr)
        sys.exit(2)
