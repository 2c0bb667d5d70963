r"""Make every table and picture that saved runs allow, small enough to be committed.

    python analysis/make_results.py OUT [OUT …] --difficulty answer --count "<<"

Calls the scripts of this folder that read records alone. A script that lacks a measure or documents
is named with the reason. runs.csv lists the records that the numbers come from.
"""

from __future__ import annotations

import contextlib
import io
import runpy
import tempfile
from pathlib import Path

import command
import pandas as pd
from coupling_analysis import study_tables
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
    "tokenwise --kind self",
    "tokenwise --kind context_input",
    "tokenwise --kind context_output",
    "prompt_length",
    "chain_of_thought",
    "checkpoints",
]
SCALE = 0.6  # of a picture's 200 dots per inch


def main(argv=None):
    parser = command.build_parser(__doc__)
    add = parser.add_argument
    add("--difficulty", metavar="NAME", help="field of the documents, see difficulty.py")
    add("--count", metavar="TEXT", help="count TEXT in the field")
    options = parser.parse_args(argv)
    common = [*map(str, options.runs)]
    common += ["--tasks", *options.tasks] if options.tasks else []
    common += ["--rank", str(options.rank)] if options.rank else []
    studies = [study.split() for study in STUDIES]
    if options.difficulty:
        count = ["--count", options.count] if options.count else []
        studies.append(["difficulty", "--column", options.difficulty, *count])
    records = study_tables.read(options.runs, options.tasks)
    command.save_table(options.out, "runs", count_records(records))
    with tempfile.TemporaryDirectory() as full_size:
        for name, *arguments in studies:
            script_main = runpy.run_path(str(Path(__file__).with_name(f"{name}.py")))["main"]
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    script_main([*common, *arguments, "--out", full_size])
            except CouplingError as error:
                command.say(f"left out {' '.join([name, *arguments])}: {error}")
        for file in sorted(Path(full_size).iterdir()):
            if file.suffix == ".csv":
                copy_table(file, options.out / file.name)
            elif file.suffix == ".png":
                shrink_picture(file, options.out / file.name)


def count_records(records: pd.DataFrame) -> pd.DataFrame:
    """Count documents and prompts of each run, task and weights."""
    keys = ["model", "revision", "fingerprint", "date", "task", "weights"]
    counts = {"documents": ("doc_hash", "nunique"), "prompts": ("prompt_hash", "size")}
    return records.groupby(keys, dropna=False, sort=False).agg(**counts).reset_index()


def copy_table(source: Path, target: Path) -> None:
    """Copy a table with the seven digits of the records."""
    rows = pd.read_csv(source)
    rows.to_csv(target, index=False, float_format="%.7g")
    print(f"{target}: {len(rows)} rows")


def shrink_picture(source: Path, target: Path) -> None:
    """Copy a picture with fewer dots and 256 colors."""
    image = Image.open(source).convert("RGB")
    image = image.resize([round(SCALE * side) for side in image.size], Image.Resampling.LANCZOS)
    # The default method favors frequent colors, and color bars would lose their ends.
    image = image.quantize(method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    image.save(target, optimize=True)
    print(f"{target}: {target.stat().st_size // 1000} kB")


if __name__ == "__main__":
    command.run(main)
