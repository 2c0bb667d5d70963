"""What the scripts in ``analysis/`` have in common: their arguments, their files, and mistakes told in one sentence."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from lm_eval_coupling.errors import CouplingError, why
from lm_eval_coupling.figures.canvas import caption
from lm_eval_coupling.saved.tables import safe_name

_NAMED = 3  # tasks; the names of more are no name of a file


def arguments(doc: str, *, runs: bool = True) -> argparse.ArgumentParser:
    """A parser with ``--out``, and with what chooses saved records: folders, ``--tasks``, ``--rank``."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if runs:
        parser.add_argument(
            "runs", type=Path, nargs="+", metavar="OUT", help="folders that lm-eval wrote"
        )
        parser.add_argument(
            "--tasks", nargs="+", metavar="T", help="these tasks only; all by default"
        )
        parser.add_argument(
            "--rank",
            type=int,
            metavar="K",
            help="number of singular vectors (default: 10 if measured)",
        )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("figures"),
        metavar="DIR",
        help="folder of what is made (%(default)s)",
    )
    return parser


def of_tasks(study: str, records: pd.DataFrame, asked: Sequence[str] | None = None) -> str:
    """Name of a study's files: with its task, or with those asked for; plainly ``study`` of all there are."""
    tasks = list(dict.fromkeys(records["task"]))
    if len(tasks) > 1 and not asked:
        return study
    told = "+".join(map(safe_name, tasks)) if len(tasks) <= _NAMED else f"{len(tasks)}_tasks"
    return f"{study}_{told}"


def save(
    folder: Path, name: str, figure: Figure, rows: pd.DataFrame, left_out: Sequence[str] = ()
) -> None:
    """Write ``name.csv``, ``name.png`` and ``name.svg``: the numbers, and the picture made of them.

    Args:
        folder: where to; made if missing.
        name: of the files, without a suffix.
        figure: the picture.
        rows: its numbers.
        left_out: sentences that say which documents are not in it; they stand below the title.

    Raises:
        CouplingError: if the folder cannot be written.
    """
    caption(figure, left_out)
    for sentence in left_out:
        print(f"{name}: {sentence}")
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
        raise CouplingError(
            f"got {folder}, which cannot be written ({why(error)}); choose another with --out"
        ) from None
    print(f"{folder / name}.csv: {len(rows)} rows")


def run(main: Callable[[Sequence[str] | None], None]) -> None:
    """Call a script's ``main`` with the words of the command line; a mistake is one sentence and the exit code 2."""
    try:
        main(None)
    except CouplingError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
