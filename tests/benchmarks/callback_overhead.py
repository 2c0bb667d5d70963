"""What `CouplingCallback` takes of a training: seconds of a measurement, and in steps of training.

    python tests/benchmarks/callback_overhead.py

A Llama from scratch is trained by transformers' Trainer on random tokens, with the callback and
without it, in turn. Losses must be the same.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import machine
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from lm_eval_coupling.training import CouplingCallback

TOKENS, VOCABULARY = 128, 1024


def train(options, out: Path | None) -> tuple[float, list[float], list[float]]:
    """Seconds of a training, its losses, and the seconds of every measurement."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=options.width,
        intermediate_size=3 * options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
    )
    model = LlamaForCausalLM(config)
    rows = torch.randint(VOCABULARY, (64, TOKENS)).tolist()
    callbacks = []
    if out is not None:
        prompts = [row[:64] for row in rows[: options.prompts]]
        callbacks = [CouplingCallback(prompts, every=options.every, ranks=10, out=out / "runs")]
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                use_cpu=options.device == "cpu",
                max_steps=options.steps,
                per_device_train_batch_size=options.batch,
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
            ),
            train_dataset=[{"input_ids": row, "labels": row} for row in rows],
            callbacks=callbacks,
        )
        start = time.perf_counter()
        trainer.train()
        taken = time.perf_counter() - start
    history = trainer.state.log_history
    losses = [row["loss"] for row in history if "loss" in row]
    measured = [row["coupling_seconds"] for row in history if "coupling_seconds" in row]
    return taken, losses, measured


def main(arguments: list[str] | None = None) -> None:
    parser = machine.parser(__doc__, "callback_overhead")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16, help="rows of 128 tokens")
    parser.add_argument("--steps", type=int, help="default 40; 4 with --quick")
    parser.add_argument("--every", type=int, help="default 20; 2 with --quick")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--repeats", type=int, help="default 3; 1 with --quick")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    options.steps = options.steps or (4 if options.quick else 40)
    options.every = options.every or (2 if options.quick else 20)
    torch.set_num_threads(options.threads)
    about = machine.describe(options.device)
    plain, watched, seconds = [], [], []
    for _ in range(options.repeats or (1 if options.quick else 3)):
        taken, losses, _ = train(options, None)
        plain.append(taken)
        with tempfile.TemporaryDirectory() as folder:
            taken, same, measured = train(options, Path(folder))
        watched.append(taken)
        seconds += measured
        if same != losses:
            raise SystemExit("the losses differ with the callback")
    step = statistics.median(plain) / options.steps
    row = {
        "step, s": step,
        "measurement, s": statistics.median(seconds),
        "a prompt, s": statistics.median(seconds) / options.prompts,
        "measurement, in steps": statistics.median(seconds) / step,
        "training, with / without": statistics.median(watched) / statistics.median(plain),
    }
    title = f"{options.layers} blocks of width {options.width}, every {options.every} steps"
    machine.show(title, [row])
    machine.save("callback_overhead", about, options, row | {"same_losses": True})


if __name__ == "__main__":
    main()
