"""Time of a prompt on a quiet machine, and beside two busy Python processes per core.

    python tests/benchmarks/busy.py --model DIR [--other ../before] [--policies default 10000]
        [--tokens 128] [--prompts 8]

Each state measures the prompts together in a process of its own, in turn with another checkout and
other wait policies of OpenMP if they are given. Scoring is a forward pass of
the model over all prompts, whose products take all threads. The fair share of a loaded machine is
the quiet time times (busy processes + our threads) / cores, and at least the quiet time. Run it on
a machine that does nothing else.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import machine
import torch

HERE = Path(__file__).resolve().parents[2]
# It ends with this process, also where that is killed.
_BUSY = """
import os
first = os.getppid()
while os.getppid() == first:
    sum(i * i for i in range(10**6))
"""
_PASSES = 3  # of scoring


@contextlib.contextmanager
def load(processes: int) -> Iterator[None]:
    """Keep ``processes`` Python processes busy inside."""
    busy = [subprocess.Popen([sys.executable, "-c", _BUSY]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def measured_by(folder: Path, policy: str, options: dict) -> dict[str, float]:
    """Return wall and CPU seconds of a prompt, by the package in ``folder``."""
    command = [sys.executable, __file__, "--measure", json.dumps(options)]
    paths = [str(folder), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    for variable in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):  # a user's defaults
        environment.pop(variable, None)
    if policy.isdecimal():
        environment["GOMP_SPINCOUNT"] = policy
    elif policy != "default":
        environment["OMP_WAIT_POLICY"] = policy.upper()
    return machine.found_by(command, folder.name, env=environment, cwd=folder)


def measure(options: dict) -> dict[str, float]:
    """Measure prompts together after a warm-up; this runs in a process of its own."""
    import models

    from lm_eval_coupling import ResidualModel, measure_coupling

    torch.set_num_threads(options["threads"])
    model, tokenizer = models.load(options["model"], torch.float32)
    vocabulary, wrapped = model.config.get_text_config().vocab_size, ResidualModel.wrap(model)
    prompts = [
        models.prompt(options["tokens"], vocabulary, tokenizer, number=i)
        for i in range(options["prompts"])
    ]
    ranks = tuple(options["ranks"])
    measure_coupling(wrapped, prompts[:1], ranks=ranks, progress=False)
    wall, cpu = time.perf_counter(), time.process_time()
    records = measure_coupling(wrapped, prompts, ranks=ranks, progress=False)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    if lacking := [record.reason for record in records if record.normalized_miscoupling is None]:
        raise SystemExit(f"a prompt could not be measured: {lacking[0]}")
    ids = torch.tensor(prompts)
    with torch.inference_mode():
        model(ids)
        scoring, scoring_cpu = time.perf_counter(), time.process_time()
        for _ in range(_PASSES):
            model(ids)
        scoring, scoring_cpu = time.perf_counter() - scoring, time.process_time() - scoring_cpu
    seconds = {"wall": wall, "cpu": cpu}
    seconds |= {"scoring": scoring / _PASSES, "scoring_cpu": scoring_cpu / _PASSES}
    return {name: value / len(prompts) for name, value in seconds.items()}


def main(arguments: list[str] | None = None) -> None:
    parser = machine.parser(__doc__, "busy")
    parser.add_argument("--model", required=True, help="transformers folder of a small Llama")
    parser.add_argument("--other", type=Path, help="folder of another checkout")
    policies = "default, passive, active, or a number of rounds to spin (GOMP_SPINCOUNT)"
    parser.add_argument("--policies", nargs="+", default=["default"], help=policies)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--prompts", type=int, default=8, help="measured together")
    parser.add_argument("--ranks", type=int, nargs="+", default=[10, 30, 50])
    parser.add_argument("--rounds", type=int, help="default 3; 1 with --quick")
    parser.add_argument("--busy", type=int, help="busy processes; two per core by default")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    options.model = str(Path(options.model).resolve())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    options.busy = 2 * cores if options.busy is None else options.busy
    asked = {k: v for k, v in vars(options).items() if k not in ("other", "out")}
    about = machine.describe()
    folders = {"here": HERE} | ({"other": options.other.resolve()} if options.other else {})
    contenders = {
        name if policy == "default" else f"{name}, {policy}": (folder, policy)
        for name, folder in folders.items()
        for policy in options.policies
    }
    least: dict[tuple[str, str], dict[str, float]] = {}
    for _ in range(options.rounds or (1 if options.quick else 3)):
        for state, processes in (("quiet", 0), ("loaded", options.busy)):
            for name, (folder, policy) in contenders.items():
                with load(processes):
                    seconds = measured_by(folder, policy, asked)
                known = least.setdefault((name, state), seconds)
                least[name, state] = {k: min(known[k], v) for k, v in seconds.items()}
    share = max(1.0, (options.busy + options.threads) / cores)
    rows = []
    for name in contenders:
        quiet, loaded = least[name, "quiet"], least[name, "loaded"]
        rows.append(
            {
                "": name,
                "quiet, s": quiet["wall"],
                "quiet, CPU s": quiet["cpu"],
                "loaded, s": loaded["wall"],
                "loaded, CPU s": loaded["cpu"],
                "loaded / fair share": loaded["wall"] / (share * quiet["wall"]),
                "CPU, loaded / quiet": loaded["cpu"] / quiet["cpu"],
                "scoring quiet, s": quiet["scoring"],
                "scoring loaded, s": loaded["scoring"],
                "scoring CPU, loaded / quiet": loaded["scoring_cpu"] / quiet["scoring_cpu"],
            }
        )
    machine.save("busy", about, options, {"fair_share": share, "rows": rows})
    machine.show(f"a prompt of {options.tokens} tokens, {options.busy} busy processes", rows)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(json.loads(sys.argv[2]))))
    else:
        main()
