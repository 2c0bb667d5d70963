"""Peak memory of a measurement, each configuration in a process of its own.

    python tests/benchmarks/memory.py --model DIR [--tokens 10 128 1024] [--device cuda]

``forward`` is the model's own forward pass, ``ours`` a whole record of the prompt, ``release`` one
layer's Jacobian by the procedure of the paper's release. ``peak`` is the largest resident memory
while it ran, ``added`` what it had above the loaded model, both in MiB; on a GPU also what torch
had allocated there at most.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
from pathlib import Path

import machine
import models
import release
import torch

from lm_eval_coupling.measuring.prompt import measure_prompt
from lm_eval_coupling.measuring.settings import Settings
from lm_eval_coupling.residual import ResidualModel

PROCEDURES = ("forward", "ours", "release")
MIB = 1 << 20
# Not the child's getrusage, which starts from the size of the process that forked it.
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident(field: str) -> float:
    """VmRSS (now) or VmHWM (peak) in MiB; where there is no /proc, the peak since the start stands
    for both.
    """
    if not STATUS.exists():
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MIB
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) / 1024


def forget_peak() -> None:
    """The peak while the model was loaded does not count."""
    try:
        RESET.write_text("5")
    except OSError:
        pass  # then the peak includes loading
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def one(options: argparse.Namespace) -> dict:
    """A configuration, in this process."""
    torch.set_num_threads(options.threads)
    model, tokenizer = models.load(options.model, getattr(torch, options.dtype), options.device)
    prompt = models.prompt(options.tokens[0], model.config.get_text_config().vocab_size, tokenizer)
    settings = Settings(tuple(options.ranks))

    def forward(tokens):
        with torch.no_grad():
            model(torch.tensor([tokens], device=model.device), use_cache=False, logits_to_keep=1)

    def ours(tokens):
        record = measure_prompt(ResidualModel.wrap(model), tokens, -1, settings)
        if record.normalized_miscoupling is None:
            raise SystemExit(f"could not be measured: {record.reason}")

    def one_layer_of_release(tokens):
        release.block_jacobian(*release.block_calls(model, tokens)[0])

    forward(prompt[:2])  # weights are read from their file when they are first used
    forget_peak()
    loaded = resident("VmRSS")
    dict(zip(PROCEDURES, (forward, ours, one_layer_of_release), strict=True))[options.procedure](
        prompt
    )
    peak = resident("VmHWM")
    found = {
        "tokens": str(len(prompt)),
        "procedure": options.procedure,
        "peak": peak,
        "added": peak - loaded,
    }
    if torch.device(options.device).type == "cuda":
        found["gpu_peak"] = torch.cuda.max_memory_allocated() / MIB
    return found


def in_a_process(options: argparse.Namespace, procedure: str, tokens: int) -> dict:
    command = [sys.executable, __file__, "--procedure", procedure, "--tokens", str(tokens)]
    for name in ("model", "threads", "device", "dtype"):
        command += [f"--{name}", str(getattr(options, name))]
    command += ["--ranks", *map(str, options.ranks)]
    return machine.found_by(command, f"{procedure} with {tokens} tokens")


def main(arguments: list[str] | None = None) -> None:
    parser = machine.parser(__doc__, "memory")
    parser.add_argument(
        "--model",
        required=True,
        help="transformers folder, or llama-3-8b for random weights of its shape",
    )
    parser.add_argument(
        "--tokens", type=int, nargs="+", help="default 10 128 1024; 10 128 with --quick"
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[10, 30, 50])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", help="of the weights")
    parser.add_argument(
        "--procedure", choices=PROCEDURES, help="only this one, in this process, as JSON"
    )
    options = parser.parse_args(arguments)
    options.tokens = options.tokens or ([10, 128] if options.quick else [10, 128, 1024])
    if options.procedure:
        print(json.dumps(one(options)))
        return
    rows = [
        in_a_process(options, procedure, tokens)
        for tokens in options.tokens
        for procedure in PROCEDURES
    ]
    torch.set_num_threads(options.threads)
    machine.save("memory", machine.describe(options.device, options.dtype), options, rows)
    machine.show(f"Peak memory, MiB: {options.model}", rows)


if __name__ == "__main__":
    main()
