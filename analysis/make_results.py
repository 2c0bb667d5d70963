r"""Every table and picture that saved runs allow, small enough to be committed: what a page of results can quote.

    python analysis/make_results.py OUT [OUT …] --difficulty answer --count "<<" --out analysis/results

Calls the other scripts of this folder that read records alone. One that lacks a measure or documents is named with its
reason. runs.csv says which records the numbers come from.
"""

from __future__ import annotations

import contextlib
import io
import runpy
import tempfile
from pathlib import Path

import command
import pandas as pd
from coupling_analysis import study_tables as tables
from PIL import Image

from lm_eval_coupling.errors import CouplingError

STUDIES = [
    "layer_coupling",
    "layer_graph",
    "regularity",
    "depth_profiles",
    "singular_values",
    "influence",
    "trajectories",
]
STUDIES += [f"tokenwise --kind {kind}" for kind in ("self", "context_input", "context_output")]
STUDIES += ["prompt_length", "chain_of_thought", "checkpoints"]
SCALE = 0.6  # of a picture: 120 dots an inch


def main(argv=None):
    parser = command.arguments(__doc__)
    parser.add_argument(
        "--difficulty", metavar="NAME", help="field of the documents, see difficulty.py"
    )
    parser.add_argument("--count", metavar="TEXT", help="how often TEXT occurs in it")
    options = parser.parse_args(argv)
    common = [*map(str, options.runs)]
    common += ["--tasks", *options.tasks] if options.tasks else []
    common += ["--rank", str(options.rank)] if options.rank else []
    studies = [study.split() for study in STUDIES]
    if options.difficulty:
        studies.append(
            [
                "difficulty",
                "--column",
                options.difficulty,
                *(["--count", options.count] if options.count else []),
            ]
        )
    command.save_table(options.out, "runs", measured(tables.read(options.runs, options.tasks)))
    with tempfile.TemporaryDirectory() as full:
        for name, *arguments in studies:
            main_of = runpy.run_path(str(Path(__file__).with_name(f"{name}.py")))["main"]
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    main_of([*common, *arguments, "--out", full])
            except CouplingError as error:
                print(f"left out {' '.join([name, *arguments])}: {error}")
        for file in sorted(Path(full).iterdir()):
            {".csv": slim, ".png": shrink}.get(file.suffix, lambda *_: None)(
                file, options.out / file.name
            )


def measured(records: pd.DataFrame) -> pd.DataFrame:
    """One row per model, task and weights: the run, its documents and prompts."""
    keys = ["model", "revision", "fingerprint", "date", "task", "weights"]
    counts = {"documents": ("doc_hash", "nunique"), "prompts": ("prompt_hash", "size")}
    return records.groupby(keys, dropna=False, sort=False).agg(**counts).reset_index()


def slim(table: Path, to: Path) -> None:
    """Copy a table in the precision of the records."""
    rows = pd.read_csv(table)
    rows.to_csv(to, index=False, float_format="%.7g")
    print(f"{to}: {len(rows)} rows")


def shrink(picture: Path, to: Path) -> None:
    """Copy a picture with fewer dots and 256 colours."""
    image = Image.open(picture).convert("RGB")
    image = image.resize([round(SCALE * side) for side in image.size], Image.Resampling.LANCZOS)
    # The default palette favours frequent colours, which robs colour bars of their ends.
    image.quantize(method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(
        to, optimize=True
    )
    print(f"{to}: {to.stat().st_size // 1000} kB")


if __name__ == "__main__":
    command.run(main)
