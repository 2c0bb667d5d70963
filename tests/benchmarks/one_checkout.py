"""What in_turn.py runs for each checkout: prints seconds a prompt as JSON. Uses of the package what
every version has.
"""

from __future__ import annotations

import argparse
import json
import time

import models
import torch

from lm_eval_coupling import ResidualModel, measure_coupling


def seconds(options: argparse.Namespace) -> dict[str, float]:
    """By tokens and prompts together, after a warm-up."""
    model, tokenizer = models.load(options.model, torch.float32)
    vocabulary, wrapped, found = (
        model.config.get_text_config().vocab_size,
        ResidualModel.wrap(model),
        {},
    )
    for tokens in options.tokens:
        prompts = [
            models.prompt(tokens, vocabulary, tokenizer, number=i) for i in range(options.prompts)
        ]
        for together in (1, options.prompts):
            some = prompts[:together]
            measure_coupling(wrapped, some, ranks=tuple(options.ranks), progress=False)
            start = time.perf_counter()
            records = measure_coupling(wrapped, some, ranks=tuple(options.ranks), progress=False)
            found[f"{tokens} tokens, {together} together"] = (
                time.perf_counter() - start
            ) / together
            if lacking := [
                record.reason for record in records if record.normalized_miscoupling is None
            ]:
                raise SystemExit(f"a prompt could not be measured: {lacking[0]}")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    for name in ("threads", "prompts"):
        parser.add_argument(f"--{name}", type=int)
    for name in ("tokens", "ranks"):
        parser.add_argument(f"--{name}", type=int, nargs="+")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(json.dumps(seconds(given)))
