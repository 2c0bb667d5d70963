"""Whether anything has become slower, by this checkout and another one (git worktree add ../before
COMMIT), in turn.

    python tests/benchmarks/in_turn.py ../before --model DIR [--tokens 10 128] [--prompts 8]

Each round starts a process for each checkout, which measures what it records by default: one prompt
alone, then all together. Seconds are those of a prompt, the least of all rounds.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import machine
import torch

HERE = Path(__file__).resolve().parents[2]


def of_checkout(folder: Path, arguments: list[str], threads: int) -> dict[str, float]:
    """What one_checkout.py finds of the package in ``folder``."""
    paths = [str(folder), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": str(threads),
    }
    command = [sys.executable, str(Path(__file__).with_name("one_checkout.py")), *arguments]
    return machine.found_by(command, folder.name, env=environment, cwd=folder)


def main(arguments: list[str] | None = None) -> None:
    parser = machine.parser(__doc__, "in_turn")
    parser.add_argument("other", type=Path, help="folder of another checkout")
    parser.add_argument("--model", required=True, help="transformers folder of a small Llama")
    parser.add_argument("--tokens", type=int, nargs="+", default=[10, 128])
    parser.add_argument("--prompts", type=int, default=8, help="measured together")
    parser.add_argument("--ranks", type=int, nargs="+", default=[10, 30, 50])
    parser.add_argument("--rounds", type=int, help="default 3; 1 with --quick")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    options.model = str(Path(options.model).resolve())
    other = options.other.resolve()
    if not (other / "lm_eval_coupling").is_dir():
        raise SystemExit(
            f"got {options.other}, expected the folder of another checkout, with lm_eval_coupling "
            "in it"
        )
    given = [
        "--model",
        options.model,
        "--threads",
        str(options.threads),
        "--prompts",
        str(options.prompts),
    ]
    given += ["--tokens", *map(str, options.tokens), "--ranks", *map(str, options.ranks)]
    about, taken = machine.describe(), [(HERE, []), (other, [])]
    for _ in range(options.rounds or (1 if options.quick else 3)):
        for folder, rounds in taken:
            rounds.append(of_checkout(folder, given, options.threads))
    least = [{what: min(one[what] for one in rounds) for what in rounds[0]} for _, rounds in taken]
    rows = [
        {"": what, "here, s": here, "other, s": before, "here / other": here / before}
        for what, here, before in ((what, least[0][what], least[1][what]) for what in least[0])
    ]
    commits = [_commit(folder) for folder, _ in taken]
    machine.save("in_turn", about, options, {"commits": commits, "rows": rows})
    machine.show(f"{commits[0]} here, {commits[1]} there", rows)


def _commit(folder: Path) -> str:
    said = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    return said.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
