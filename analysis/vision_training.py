r"""Train vision transformers that differ in stochastic depth and weight decay, and measure them.

    python analysis/vision_training.py DATA --out FAMILY --output-path RESULTS
    python analysis/vision_study.py RESULTS --facts FAMILY/facts.csv

DATA is a folder with train*.parquet and test*.parquet, each with a column of encoded images and one
of integer labels (CIFAR-10 as on the Hub). Members are ordinary transformers folders in FAMILY
(ViTForImageClassification with the image processor). facts.csv beside them has their settings and
accuracies; RESULTS has one run of `lm-eval-coupling vision` for each. What exists is not trained or
measured again; a stopped command goes on with the first missing member.

The recipe is a small DeiT: AdamW, warm-up and cosine, label smoothing, random crops and flips,
CutMix, and stochastic depth that rises linearly over the blocks; no repeated augmentation and no
teacher. Members of one group (--together) are trained side by side as one batched model on the same
images: groups of one by default on a CPU, one group of all on a GPU. --size small takes about two
hours of two cores; --size full is for a GPU (patches of 4 pixels, 8 blocks, bfloat16); --size paper
has the paper's shape. With --seconds, the number of epochs of a group is chosen from its speed.
Commands with other --stochastic-depth may fill one FAMILY side by side.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import itertools
import json
import math
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import command
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import recipe
import torch
from PIL import Image
from torch.nn import functional as F
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
from vit_members import (
    MEAN,
    STD,
    Member,
    Members,
    Optimizer,
    augment,
    cut_mix,
    fresh_model,
    normalize,
)

from lm_eval_coupling.errors import CouplingError

_FIELDS = ("width", "depth", "heads", "patch", "epochs", "batch", "rate")
SIZES = {
    "small": dict(zip(_FIELDS, (96, 8, 3, 8, 10, 128, 1e-3), strict=True)),
    "full": dict(zip(_FIELDS, (128, 8, 4, 4, 100, 256, 1e-3), strict=True)),
    "paper": dict(zip(_FIELDS, (192, 12, 3, 4, 100, 256, 1e-3), strict=True)),
}
RECIPE = (*_FIELDS, "images", "seconds", "cutmix", "smoothing", "dtype", "seed")
WARM_UP = 100  # steps
TIMED = 30  # steps that give the speed, after as many that are not timed


@dataclasses.dataclass(frozen=True)
class Images:
    """A decoded split: pixels uint8 [image, 3, side, side] and labels int64 [image]."""

    pixels: torch.Tensor
    labels: torch.Tensor
    classes: list[str]


def read_images(folder: Path, split: str, device: torch.device, limit: int | None = None) -> Images:
    """Decode the images of ``SPLIT*.parquet``, which must have one square size."""
    files = sorted(folder.glob(f"{split}*.parquet"))
    if not files:
        raise CouplingError(f"got {folder}, expected a folder with {split}*.parquet")
    table = pd.concat([pd.read_parquet(file) for file in files], ignore_index=True)
    first = table.iloc[0]
    image = next(
        (name for name in table if isinstance(first[name], dict) and first[name].get("bytes")), None
    )
    label = next((name for name in table if pd.api.types.is_integer_dtype(table[name])), None)
    if image is None or label is None:
        raise CouplingError(
            f"got {files[0]} with {', '.join(table)}, expected a column of images and one of labels"
        )
    classes = class_names(files[0], label, table)
    table = table[:limit]
    with ThreadPoolExecutor() as threads:
        pixels = list(threads.map(_decode_image, table[image]))
    shapes = {array.shape for array in pixels}
    if len(shapes) > 1 or pixels[0].shape[0] != pixels[0].shape[1]:
        raise CouplingError(
            f"got images of {len(shapes)} sizes such as {pixels[0].shape[:2]}, expected one square "
            "size"
        )
    stacked = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
    return Images(
        stacked.to(device),
        torch.tensor(table[label].to_numpy(), device=device),
        classes,
    )


def _decode_image(cell: dict) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(cell["bytes"])).convert("RGB"))


def class_names(file: Path, label: str, table: pd.DataFrame) -> list[str]:
    metadata = json.loads((pq.read_schema(file).metadata or {}).get(b"huggingface", b"{}"))
    names = metadata.get("info", {}).get("features", {}).get(label, {}).get("names")
    return names or [str(i) for i in range(int(table[label].max()) + 1)]


def train(
    train_on: Images, test_on: Images, members: list[Member], options: argparse.Namespace
) -> tuple[Members, list[dict]]:
    """Train a group side by side; return the members and one row of facts for each."""
    device, side = train_on.pixels.device, train_on.pixels.shape[-1]
    shape = [getattr(options, name) for name in ("width", "depth", "heads", "patch")]
    family = Members(fresh_model(*shape, side, train_on.classes, options.seed), members, device)
    optimizer, dtype = Optimizer(family), getattr(torch, options.dtype)
    draws = torch.Generator(device).manual_seed(options.seed)
    orders, steps_draws = torch.Generator().manual_seed(options.seed), random.Random(options.seed)
    batches = math.ceil(len(train_on.labels) / options.batch)
    steps, begun, timed, step = options.epochs * batches, time.perf_counter(), 0.0, 0
    while step < steps:
        order = torch.randperm(len(train_on.labels), generator=orders).to(device)
        for chosen in order.split(options.batch):
            if step == steps:
                break
            targets = smoothed(train_on.labels[chosen], len(train_on.classes), options.smoothing)
            images = augment(train_on.pixels[chosen], side // 8, draws)
            if steps_draws.random() < options.cutmix:
                images, targets = cut_mix(images, targets, steps_draws)
            losses = loss_of(family.logits(images, dtype, draws), targets)
            losses.sum().backward()
            optimizer.step(options.rate * rate_at(step, steps))
            step += 1
            if step in (TIMED, 2 * TIMED):
                losses.tolist()  # waits for the device
                elapsed, timed = time.perf_counter() - begun - timed, time.perf_counter() - begun
            if step == 2 * TIMED and options.seconds:
                steps = max(step + 1, step + int(TIMED * (options.seconds - timed) / elapsed))
                print(
                    f"{elapsed / TIMED:.3f} s a step: {steps} steps, {steps / batches:.1f} epochs",
                    flush=True,
                )
        print_progress(step, steps, losses, time.perf_counter() - begun)
    accuracies = accuracy(family, test_on, dtype, options.batch).tolist()
    return family, [
        {
            "model": member.name,
            "family": f"stochastic depth {member.stochastic_depth:g}",
            **dataclasses.asdict(member),
            "epochs": round(step / batches, 2),
            "loss": round(loss, 4),
            "accuracy": accuracy,
            "seconds": round(time.perf_counter() - begun, 1),
            "together": len(members),
        }
        for member, loss, accuracy in zip(members, losses.tolist(), accuracies, strict=True)
    ]


def print_progress(step: int, steps: int, losses: torch.Tensor, seconds: float) -> None:
    low, high = losses.min().item(), losses.max().item()
    print(f"step {step} of {steps}, loss {low:.3f} to {high:.3f}, {seconds:.0f} s", flush=True)


def rate_at(step: int, steps: int) -> float:
    """Return the share of the learning rate: up over WARM_UP steps, then down as a cosine."""
    return min(1.0, (step + 1) / WARM_UP) * (1 + math.cos(math.pi * step / steps)) / 2


def smoothed(labels: torch.Tensor, classes: int, smoothing: float) -> torch.Tensor:
    return (1 - smoothing) * F.one_hot(labels, classes).float() + smoothing / classes


def loss_of(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy of each member, averaged over images."""
    return -(targets * logits.log_softmax(-1)).sum(-1).mean(-1)


@torch.no_grad()
def accuracy(family: Members, images: Images, dtype: torch.dtype, batch: int) -> torch.Tensor:
    right = [
        family.logits(normalize(pixels), dtype).argmax(-1) == labels
        for pixels, labels in zip(
            images.pixels.split(batch), images.labels.split(batch), strict=True
        )
    ]
    return torch.cat(right, 1).double().mean(1)


def save(family: Members, facts: list[dict], options: argparse.Namespace) -> None:
    """Save each member aside and rename it when it is complete; then write the facts."""
    side = family.config.image_size
    processor = ViTImageProcessorPil(
        size={"height": side, "width": side}, image_mean=list(MEAN), image_std=list(STD)
    )
    for index, fact in enumerate(facts):
        unfinished = options.out / f"unfinished-{fact['model']}"
        shutil.rmtree(unfinished, ignore_errors=True)
        family.model_of(index).save_pretrained(unfinished)
        processor.save_pretrained(unfinished)
        (unfinished / "facts.json").write_text(json.dumps(fact, indent=1) + "\n")
        unfinished.rename(options.out / fact["model"])
    files = sorted(options.out.glob("depth-*/facts.json"))
    table = pd.DataFrame([json.loads(file.read_text()) for file in files])
    table = table.sort_values(["stochastic_depth", "weight_decay"])
    table.to_csv(options.out / "facts.csv", index=False)
    print(
        table[["model", "epochs", "loss", "accuracy", "seconds"]].to_string(index=False), flush=True
    )


def train_all(options: argparse.Namespace) -> list[str]:
    """Train the missing members; return the names of all."""
    members = [
        Member(d, w) for d, w in itertools.product(options.stochastic_depth, options.weight_decay)
    ]
    settings = {"data": str(options.data)} | {name: getattr(options, name) for name in RECIPE}
    recipe_file = options.out / "training.json"
    recipe.require_same(recipe_file, settings, "a family")
    missing = [member for member in members if not (options.out / member.name).exists()]
    if missing:
        begun = time.perf_counter()
        device = torch.device(options.device)
        train_on = read_images(options.data, "train", device, options.images)
        test_on = read_images(options.data, "test", device)
        if (most := int(test_on.labels.max())) >= (known := len(train_on.classes)):
            raise CouplingError(
                f"got a test image of label {most}, expected 0 to {known - 1} as in training"
            )
        seconds = time.perf_counter() - begun
        count = f"{len(train_on.labels)} + {len(test_on.labels)}"
        print(f"{count} images in {seconds:.0f} s", flush=True)
        options.out.mkdir(parents=True, exist_ok=True)
        recipe.write(recipe_file, settings)
        together = options.together or (1 if device.type == "cpu" else len(missing))
        for first in range(0, len(missing), together):
            group = missing[first : first + together]
            print(", ".join(member.name for member in group), flush=True)
            save(*train(train_on, test_on, group, options), options)
    return [member.name for member in members]


def measure_all(names: list[str], options: argparse.Namespace) -> None:
    """Run `lm-eval-coupling vision` for every member without results, a few at a time."""
    waiting = [
        name for name in names if not any((options.output_path / name).rglob("results_*.json"))
    ]
    with ThreadPoolExecutor(options.processes) as threads:
        done = list(threads.map(lambda name: measure(name, options), waiting))
    if failed := [name for name, code in zip(waiting, done, strict=True) if code]:
        sys.exit(f"no results of {', '.join(failed)}; the same command tries them again")


def measure(name: str, options: argparse.Namespace) -> int:
    """Measure one member, its output in log.txt beside the results; return the exit code."""
    out = options.output_path / name
    out.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, "-m", "lm_eval_coupling.cli", "vision"]
    words += ["--model", str(options.out / name), "--out", str(out), "--data", str(options.data)]
    words += ["--split", "test", "--device", options.device, "--coupling", options.coupling]
    words += ["--limit", str(options.limit)] if options.limit else []
    begun = time.perf_counter()
    with (out / "log.txt").open("w") as log:
        code = subprocess.run(words, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
    last = (out / "log.txt").read_text().strip().splitlines()[-1:] if code else []
    outcome = f"failed, {last}" if code else "measured"
    print(f"{name}: {outcome}, {time.perf_counter() - begun:.0f} s", flush=True)
    return code


def positive(kind: type) -> Callable[[str], float]:
    """Return a reader of numbers above 0, for a parser."""

    def read(text: str) -> float:
        if not (value := kind(text)) > 0:
            raise argparse.ArgumentTypeError(f"got {text}, expected a number above 0")
        return value

    return read


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, whole = parser.add_argument, positive(int)
    help_data = "folder with train*.parquet and test*.parquet"
    add("data", type=Path, metavar="DATA", help=help_data)
    add("--out", type=Path, required=True, metavar="FAMILY", help="folder of the members")
    add(
        "--output-path", type=Path, metavar="RESULTS", help="measure every member, into this folder"
    )
    depths, decays = [0.0, 0.05, 0.1, 0.3], [0.005, 0.05, 0.1, 0.2]
    add("--stochastic-depth", type=float, nargs="+", default=depths, metavar="P")
    add("--weight-decay", type=float, nargs="+", default=decays, metavar="W")
    add("--size", choices=SIZES, default="small", help="of models and training (%(default)s)")
    for name, value in SIZES["small"].items():
        kind = positive(type(value))
        add(f"--{name}", type=kind, metavar="N", help="instead of that of --size")
    add("--images", type=whole, metavar="N", help="train on the first N images (default: all)")
    help_seconds = "time for the training of a group, instead of --epochs"
    add("--seconds", type=positive(float), metavar="S", help=help_seconds)
    add("--cutmix", type=float, default=0.5, metavar="P", help="share of batches with CutMix (0.5)")
    add("--smoothing", type=float, default=0.1, metavar="E", help="label smoothing (0.1)")
    help_together = "members trained side by side (1 on a CPU, else all)"
    add("--together", type=whole, metavar="M", help=help_together)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=("float32", "bfloat16"), help="of the products (bfloat16 on a GPU)")
    add("--seed", type=int, default=0, help="seed of weights, order and augmentation")
    help_coupling = "settings of the measurement (%(default)s)"
    add("--coupling", default="limit=100", metavar="SETTINGS", help=help_coupling)
    add("--limit", type=whole, metavar="N", help="test images scored when measuring (default: all)")
    add("--processes", type=whole, default=1, metavar="N", help="members measured at a time (1)")
    options = parser.parse_args(argv)
    options.dtype = options.dtype or (
        "bfloat16" if options.device.startswith("cuda") else "float32"
    )
    for name, value in SIZES[options.size].items():
        setattr(options, name, getattr(options, name) or value)
    if not all(0 <= p < 1 for p in options.stochastic_depth):
        parser.error("expected every --stochastic-depth to be at least 0 and below 1")
    names = train_all(options)
    if options.output_path:
        measure_all(names, options)


if __name__ == "__main__":
    command.run(main)
