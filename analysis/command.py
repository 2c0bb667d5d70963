"""What the scripts in ``analysis/`` have in common: their arguments, their files, and mistakes told in one sentence."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from lm_eval_coupling.errors import CouplingError


def arguments(doc: str, *, runs: bool = True) -> argparse.ArgumentParser:
    """A parser with ``--out``, and with what chooses saved records: folders, ``--tasks``, ``--rank``."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if runs:
        parser.add_argument("runs", type=Path, nargs="+", metavar="OUT", help="folders that lm-eval wrote")
        parser.add_argument("--tasks", nargs="+", metavar="T", help="these tasks only; all by default")
        parser.add_argument("--rank", type=int, metavar="K", help="number of singular vectors (default: 10 if measured)")
    parser.add_argument(
        "--out", type=Path, default=Path("figures"), metavar="DIR", help="folder of what is made (%(default)s)"
    )
    return parser


def save(folder: Path, name: str, figure: Figure, rows: pd.DataFrame) -> None:
    """Write ``name.csv``, ``name.png`` and ``name.svg``: the numbers, and the picture made of them.

    Raises:
        CouplingError: if the folder cannot be written.
    """
    save_table(folder, name, rows)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # laid out once, not for every format again
    for suffix in ("png", "svg"):
        figure.savefig(folder / f"{name}.{suffix}")
    print(f"{folder / name}.png and .svg")


def save_table(folder: Path, name: str, rows: pd.DataFrame) -> None:
    """Write ``name.csv``.

    Raises:
        CouplingError: if the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        rows.to_csv(folder / f"{name}.csv", index=False)
    except OSError as error:
        raise CouplingError(f"got {folder}, which cannot be written ({error}); choose another with --out") from None
    print(f"{folder / name}.csv: {len(rows)} rows")


def run(main: Callable[[Sequence[str] | None], None]) -> None:
    """Call a script's ``main`` with the words of the command line; a mistake is one sentence and the exit code 2."""
    try:
        main(None)
    except CouplingError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
