r"""Train one small model from scratch: does coupling emerge while the loss falls?

    python analysis/small_training.py TEXT [TEXT …] --column page question --out TRAINING \\
        --run wikitext --limit 20 --coupling-limit 20 --output-path RESULTS
    python analysis/checkpoints.py RESULTS
    lm-eval-coupling fit RESULTS

A Llama and a byte-level BPE tokenizer learn from plain text, JSONL or Parquet; a single core is
enough. TRAINING/checkpoint-0, checkpoint-10 and so on are ordinary transformers folders.
training.csv has the loss of every step on its batch before the update, and of every checkpoint on
windows that were kept out. The same files, settings and threads give the same weights, also where a
stopped training goes on from its last checkpoint. What exists is not trained or evaluated again.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import command
import pandas as pd
import recipe
import torch
from controlled_family import evaluate_all, evaluation_arguments
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lm_eval_coupling.errors import CouplingError, why
from lm_eval_coupling.numerics.randomness import seeded
from lm_eval_coupling.saved.atomic import writing

SIZES = {
    "layers": 8,
    "width": 128,
    "heads": 4,
    "mlp": 384,
    "context": 128,
    "vocabulary": 1024,
    "windows": 8,
}
RECIPE = ("column", "steps", *SIZES, "rate", "seed")
END = "<|endoftext|>"  # ends every document; also lm-eval's prefix token


def documents(file: Path, columns: list[str]) -> list[str]:
    """Read the documents of a file: its whole text, or the rows of a table.

    Args:
        file: .parquet and .jsonl are tables, anything else is plain text.
        columns: columns of text; those that the table has are joined, each on its own line.

    Raises:
        CouplingError: if the file cannot be read, or is a table without any of the columns.
    """
    try:
        if file.suffix not in (".parquet", ".jsonl"):
            return [file.read_text(encoding="utf-8")]
        rows = (
            pd.read_parquet(file)
            if file.suffix == ".parquet"
            else pd.read_json(file, lines=True, dtype=False)
        )
    except (OSError, ValueError) as error:
        raise CouplingError(
            f"got {file}, expected readable plain text, .jsonl or .parquet: {why(error)}"
        ) from None
    present = [name for name in columns if name in rows]
    if not present:
        raise CouplingError(
            f"got {file} with {', '.join(map(str, rows))}, expected {' or '.join(columns)}; name "
            "some with --column"
        )
    return ["\n".join(map(str, row)) for row in rows[present].fillna("").itertuples(index=False)]


def learn_tokenizer(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    special, alphabet = [END], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END
    )


def cut(texts: list[str], tokenizer: PreTrainedTokenizerFast, size: int) -> torch.Tensor:
    """Join all documents to one row of tokens and cut it into windows: Int[window size]."""
    ids = [
        token
        for document in tokenizer(texts).input_ids
        for token in (*document, tokenizer.eos_token_id)
    ]
    if (count := len(ids) // size) < 2:
        raise CouplingError(
            f"got {len(ids)} tokens, expected two contexts of {size}; give more text or a smaller "
            "--context"
        )
    return torch.tensor(ids[: count * size]).view(count, size)


def read_windows(
    options: argparse.Namespace, kept_out: int
) -> tuple[PreTrainedTokenizerFast, torch.Tensor, torch.Tensor]:
    """Learn a tokenizer from the texts, and cut them into windows in one order for all seeds.

    Returns:
        The tokenizer, at most ``kept_out`` windows that are not trained on, and the others.
    """
    texts = [text for source in options.texts for text in documents(source, options.column)]
    tokenizer = learn_tokenizer(texts, options.vocabulary)
    windows = cut(texts, tokenizer, options.context)
    windows = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))]
    first, others = windows.tensor_split([min(kept_out, len(windows) // 2)])
    return tokenizer, first, others


def fresh_model(
    tokenizer: PreTrainedTokenizerFast, options: argparse.Namespace
) -> LlamaForCausalLM:
    shape = {
        "hidden_size": options.width,
        "intermediate_size": options.mlp,
        "num_hidden_layers": options.layers,
    }
    shape |= {"num_attention_heads": options.heads, "max_position_embeddings": options.context}
    special = {f"{name}_token_id": tokenizer.eos_token_id for name in ("bos", "eos", "pad")}
    tied = {"tie_word_embeddings": options.tied}
    config = LlamaConfig(vocab_size=len(tokenizer), **shape, **special, **tied)
    with seeded(options.seed):
        return LlamaForCausalLM(config)


def fresh_optimizer(model: LlamaForCausalLM, rate: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1)


def update(
    model: LlamaForCausalLM,
    optimizer: torch.optim.AdamW,
    loss: torch.Tensor,
    *,
    rate: float,
    step: int,
    last: int,
) -> None:
    """Make one step; the rate goes up over a twentieth of the steps, then down along a cosine."""
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    warm_up = min(1.0, 20 * (step + 1) / last)
    cosine = (1 + math.cos(math.pi * step / last)) / 2
    optimizer.param_groups[0]["lr"] = rate * warm_up * cosine
    optimizer.step()
    optimizer.zero_grad()


def save(folder: Path, model, tokenizer, optimizer) -> None:
    """Save a checkpoint aside and rename it, so that a stopped training leaves no half of one."""
    unfinished = folder.with_name("unfinished")
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    torch.save(optimizer.state_dict(), unfinished / "optimizer.pt")
    unfinished.rename(folder)


def train(options: argparse.Namespace) -> None:
    """Train and write the missing checkpoints."""
    settings, recipe_file = recipe_of(options, RECIPE), options.out / "training.json"
    recipe.require_same(recipe_file, settings, "a training")
    folders = {step: options.out / f"checkpoint-{step}" for step in options.steps}
    done, last = [step for step, folder in folders.items() if folder.exists()], max(folders)
    if len(done) == len(folders):
        return print(f"{options.out}: all checkpoints are there", flush=True)
    texts = [text for file in options.texts for text in documents(file, options.column)]
    tokenizer = learn_tokenizer(texts, options.vocabulary)
    windows, draws = (
        cut(texts, tokenizer, options.context),
        torch.Generator().manual_seed(options.seed),
    )
    windows = windows[torch.randperm(len(windows), generator=draws)]
    kept_out, windows = windows.tensor_split([min(32, len(windows) // 2)])
    batches = torch.randint(len(windows), (last + 1, options.windows), generator=draws)

    # A checkpoint may be missing before the last one.
    first_missing = min(folders.keys() - set(done))
    done = [step for step in done if step < first_missing]
    start, rows = max(done, default=0), []
    model = (
        LlamaForCausalLM.from_pretrained(folders[start]).train()
        if done
        else fresh_model(tokenizer, options)
    )
    optimizer = fresh_optimizer(model, options.rate)
    if done:
        optimizer.load_state_dict(torch.load(folders[start] / "optimizer.pt"))
        rows = pd.read_csv(options.out / "training.csv").query("step < @start").to_dict("records")
    options.out.mkdir(parents=True, exist_ok=True)
    recipe.write(recipe_file, settings)
    print(f"{model.num_parameters():,} parameters, {windows.numel():,} tokens of text", flush=True)
    for step in (
        progress := tqdm(range(start, last + 1), initial=start, total=last + 1, unit="step")
    ):
        batch = windows[batches[step]]
        loss = model(batch, labels=batch).loss
        rows.append({"step": step, "tokens": step * batch.numel(), "loss": loss.item()})
        progress.set_postfix(loss=f"{loss:.3f}")
        if step in folders:
            with torch.no_grad():
                rows[-1]["loss_kept_out"] = model(kept_out, labels=kept_out).loss.item()
            with writing(options.out / "training.csv") as temporary:
                pd.DataFrame(rows).to_csv(temporary, index=False, float_format="%.5g")
            tqdm.write(
                f"checkpoint-{step}: loss {loss:.3f}, kept out {rows[-1]['loss_kept_out']:.3f}"
            )
            if not folders[step].exists():
                save(folders[step], model, tokenizer, optimizer)
        update(model, optimizer, loss, rate=options.rate, step=step, last=last)


def training_arguments(
    parser: argparse.ArgumentParser, sizes: dict[str, int], *, metavar: str, out: str
) -> None:
    """Add texts, ``--out``, sizes and learning rate to a parser."""
    add = parser.add_argument
    add("texts", type=Path, nargs="+", metavar="TEXT", help="files: plain text, .jsonl, .parquet")
    help_column = "columns of text; a table without some of them gives the others"
    add("--column", nargs="+", default=["text"], metavar="NAME", help=help_column)
    add("--out", type=Path, required=True, metavar=metavar, help=out)
    for name, default in sizes.items():
        add(f"--{name}", type=int, default=default, metavar="N", help="(%(default)s)")
    add("--rate", type=float, default=2e-3, help="highest learning rate (%(default)s)")
    add("--tied", action="store_true", help="tie the output embeddings to those of the input")


def recipe_of(options: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """Return the settings that change what a training gives, to be compared with earlier ones."""
    settings = {"texts": {str(file): recipe.digest_of(file) for file in options.texts}}
    settings |= {name: getattr(options, name) for name in names}
    return settings | ({"tied": True} if options.tied else {})


def check_steps(parser: argparse.ArgumentParser, steps: list[int]) -> None:
    """End the command if no training can be saved or measured at these steps."""
    if min(steps) < 0 or max(steps) < 1:
        given = " ".join(map(str, steps))
        parser.error(f"got --steps {given}, expected none below 0 and a last one of 1 or more")


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    training_arguments(parser, SIZES, metavar="TRAINING", out="folder of the checkpoints")
    add = parser.add_argument
    steps = [0, 10, 30, 100, 300, 1000]
    add("--steps", type=int, nargs="+", default=steps, metavar="N", help="steps to save")
    add("--seed", type=int, default=0, help="seed of the weights and of the order of the text")
    evaluation_arguments(parser)
    options = parser.parse_args(argv)
    check_steps(parser, options.steps)
    train(options)
    evaluate_all([f"checkpoint-{step}" for step in sorted(set(options.steps))], options)


if __name__ == "__main__":
    command.run(main)
