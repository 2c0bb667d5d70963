"""Whether anything has become slower, by this checkout and another one (git worktree add ../before COMMIT), in turn.

    python tests/benchmarks/in_turn.py ../before --model DIR [--tokens 10 128] [--prompts 8]

Each round starts a process for each checkout, which measures what it records by default: one prompt alone, then all
together. Seconds are those of a prompt, the least of all rounds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import machine
import models
import torch

HERE = Path(__file__).resolve().parents[2]


def seconds(options: Any) -> dict[str, float]:
    """By tokens and prompts together, of the package that Python finds."""
    from lm_eval_coupling import ResidualModel, measure_coupling

    model, tokenizer = models.load(options.model, torch.float32)
    vocabulary, wrapped, found = model.config.get_text_config().vocab_size, ResidualModel.wrap(model), {}
    for tokens in options.tokens:
        prompts = [models.prompt(tokens, vocabulary, tokenizer, number=i) for i in range(options.prompts)]
        for together in (1, options.prompts):
            some = prompts[:together]
            measure_coupling(wrapped, some, ranks=options.ranks, progress=False)
            start = time.perf_counter()
            records = measure_coupling(wrapped, some, ranks=options.ranks, progress=False)
            found[f"{tokens} tokens, {together} together"] = (time.perf_counter() - start) / together
            if lacking := [record.reason for record in records if record.normalized_miscoupling is None]:
                raise SystemExit(f"a prompt could not be measured: {lacking[0]}")
    return found


def of_checkout(folder: Path, arguments: list[str], threads: int) -> dict[str, float]:
    """:func:`seconds` of the package in ``folder``, in a process of its own."""
    paths = [str(folder), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, __file__, *arguments, "--one"]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{folder.name} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main(arguments: list[str] | None = None) -> None:
    parser = machine.parser(__doc__, "in_turn")
    parser.add_argument("other", type=Path, help="folder of another checkout")
    parser.add_argument("--model", required=True, help="transformers folder of a small Llama")
    parser.add_argument("--tokens", type=int, nargs="+", default=[10, 128])
    parser.add_argument("--prompts", type=int, default=8, help="measured together")
    parser.add_argument("--ranks", type=int, nargs="+", default=[10, 30, 50])
    parser.add_argument("--rounds", type=int, help="default 3; 1 with --quick")
    parser.add_argument("--one", action="store_true", help="measure once here, and print it: for the processes themselves")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.one:
        print(json.dumps(seconds(options)))
        return
    options.model = str(Path(options.model).resolve())
    other = options.other.resolve()
    if not (other / "lm_eval_coupling").is_dir():
        raise SystemExit(f"got {options.other}, expected the folder of another checkout, with lm_eval_coupling in it")
    given = [str(other), "--model", options.model, "--threads", str(options.threads), "--prompts", str(options.prompts)]
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
    said = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=folder, capture_output=True, text=True, check=False)
    return said.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
