r"""Vision transformers of one recipe that differ in stochastic depth and weight decay: does coupling go with accuracy?

    python analysis/vision_training.py DATA --out FAMILY --output-path RESULTS
    python analysis/vision_study.py RESULTS --facts FAMILY/facts.csv

DATA is a folder with train*.parquet and test*.parquet, each with a column of encoded images and one of whole-number labels
(CIFAR-10 as on the Hub). Members are ordinary transformers folders in FAMILY (ViTForImageClassification, with the image
processor), facts.csv beside them has their settings and accuracies; RESULTS has one run of `lm-eval-coupling vision` for
each. What exists is not trained or measured again, a stopped command goes on with the first member that is missing.

A recipe like DeiT's, in small: AdamW, warm-up and cosine, label smoothing, random crops and flips, CutMix, stochastic depth
that rises linearly over the blocks; no repeated augmentation and no teacher. Members of one group (--together) are trained
side by side as one batched model on the same images in the same order: a group of one by default on a CPU, all of them on a
GPU. The default size takes about two hours of two cores; --size full is for a GPU (patches of 4 pixels, 8 blocks, bfloat16),
--size paper has the paper's shape. With --seconds the number of epochs of a group is chosen from its speed, so that it is
done in time. Commands with other --stochastic-depth may fill one FAMILY side by side.
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import command
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch.nn import functional as F
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
from vit_members import (
    MEAN,
    STD,
    Member,
    Members,
    Optimiser,
    augmented,
    fresh_model,
    mixed,
    normalised,
)

from lm_eval_coupling.errors import CouplingError

SIZES = {
    "small": {
        "width": 96,
        "depth": 8,
        "heads": 3,
        "patch": 8,
        "epochs": 10,
        "batch": 128,
        "rate": 1e-3,
    },
    "full": {
        "width": 128,
        "depth": 8,
        "heads": 4,
        "patch": 4,
        "epochs": 100,
        "batch": 256,
        "rate": 1e-3,
    },
    "paper": {
        "width": 192,
        "depth": 12,
        "heads": 3,
        "patch": 4,
        "epochs": 100,
        "batch": 256,
        "rate": 1e-3,
    },
}
RECIPE = (*SIZES["small"], "images", "seconds", "cutmix", "smoothing", "dtype", "seed")
WARM_UP = 100  # steps
TIMED = 30  # steps, after as many that are not, from which the speed is taken


@dataclasses.dataclass(frozen=True)
class Images:
    """A split, decoded: pixels uint8 [image, 3, side, side] and labels int64 [image], on one device."""

    pixels: torch.Tensor
    labels: torch.Tensor
    classes: list[str]


def read_images(folder: Path, split: str, device: torch.device, limit: int | None = None) -> Images:
    """Decode the images of ``SPLIT*.parquet``, all of one square size."""
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
    table = table[:limit]
    with ThreadPoolExecutor() as threads:
        pixels = list(
            threads.map(
                lambda cell: np.asarray(Image.open(io.BytesIO(cell["bytes"])).convert("RGB")),
                table[image],
            )
        )
    if (
        len(shapes := {array.shape for array in pixels}) > 1
        or pixels[0].shape[0] != pixels[0].shape[1]
    ):
        raise CouplingError(
            f"got images of {len(shapes)} sizes such as {pixels[0].shape[:2]}, expected one square size"
        )
    stacked = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
    return Images(
        stacked.to(device),
        torch.tensor(table[label].to_numpy(), device=device),
        class_names(files[0], label, table),
    )


def class_names(file: Path, label: str, table: pd.DataFrame) -> list[str]:
    about = json.loads((pq.read_schema(file).metadata or {}).get(b"huggingface", b"{}"))
    names = about.get("info", {}).get("features", {}).get(label, {}).get("names")
    return names or [str(i) for i in range(int(table[label].max()) + 1)]


def train(
    train_on: Images, test_on: Images, members: list[Member], options: argparse.Namespace
) -> tuple[Members, list[dict]]:
    """Train a group side by side; the members and one row of facts for each."""
    device, side = train_on.pixels.device, train_on.pixels.shape[-1]
    shape = [getattr(options, name) for name in ("width", "depth", "heads", "patch")]
    family = Members(fresh_model(*shape, side, train_on.classes, options.seed), members, device)
    optimiser, dtype = Optimiser(family), getattr(torch, options.dtype)
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
            images = augmented(train_on.pixels[chosen], side // 8, draws)
            if steps_draws.random() < options.cutmix:
                images, targets = mixed(images, targets, steps_draws)
            losses = loss_of(family.logits(images, dtype, draws), targets)
            losses.sum().backward()
            optimiser.step(options.rate * rate_at(step, steps))
            step += 1
            if step in (TIMED, 2 * TIMED):
                losses.tolist()  # the device has caught up
                elapsed, timed = time.perf_counter() - begun - timed, time.perf_counter() - begun
            if step == 2 * TIMED and options.seconds:
                steps = max(step + 1, step + int(TIMED * (options.seconds - timed) / elapsed))
                print(
                    f"{elapsed / TIMED:.3f} s a step: {steps} steps, {steps / batches:.1f} epochs",
                    flush=True,
                )
        progress(step, steps, losses, time.perf_counter() - begun)
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


def progress(step: int, steps: int, losses: torch.Tensor, seconds: float) -> None:
    low, high = losses.min().item(), losses.max().item()
    print(f"step {step} of {steps}, loss {low:.3f} to {high:.3f}, {seconds:.0f} s", flush=True)


def rate_at(step: int, steps: int) -> float:
    """Share of the learning rate: up over the first steps, then down as a cosine."""
    return min(1.0, (step + 1) / WARM_UP) * (1 + math.cos(math.pi * step / steps)) / 2


def smoothed(labels: torch.Tensor, classes: int, smoothing: float) -> torch.Tensor:
    return (1 - smoothing) * F.one_hot(labels, classes).float() + smoothing / classes


def loss_of(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each member, mean over the images."""
    return -(targets * logits.log_softmax(-1)).sum(-1).mean(-1)


@torch.no_grad()
def accuracy(family: Members, images: Images, dtype: torch.dtype, batch: int) -> torch.Tensor:
    right = [
        family.logits(normalised(pixels), dtype).argmax(-1) == labels
        for pixels, labels in zip(
            images.pixels.split(batch), images.labels.split(batch), strict=True
        )
    ]
    return torch.cat(right, 1).double().mean(1)


def save(family: Members, facts: list[dict], options: argparse.Namespace) -> None:
    """Every member under its name once it is complete, then the table of facts."""
    side = family.config.image_size
    processor = ViTImageProcessorPil(
        size={"height": side, "width": side}, image_mean=list(MEAN), image_std=list(STD)
    )
    for index, about in enumerate(facts):
        unfinished = options.out / f"unfinished-{about['model']}"
        shutil.rmtree(unfinished, ignore_errors=True)
        family.model_of(index).save_pretrained(unfinished)
        processor.save_pretrained(unfinished)
        (unfinished / "facts.json").write_text(json.dumps(about, indent=1) + "\n")
        unfinished.rename(options.out / about["model"])
    found = [
        json.loads(file.read_text()) for file in sorted(options.out.glob("depth-*/facts.json"))
    ]
    table = pd.DataFrame(found).sort_values(["stochastic_depth", "weight_decay"])
    table.to_csv(options.out / "facts.csv", index=False)
    print(
        table[["model", "epochs", "loss", "accuracy", "seconds"]].to_string(index=False), flush=True
    )


def train_all(options: argparse.Namespace) -> list[str]:
    """Train the members that are not there; the names of all."""
    members = [
        Member(d, w) for d, w in itertools.product(options.stochastic_depth, options.weight_decay)
    ]
    recipe = {"data": str(options.data)} | {name: getattr(options, name) for name in RECIPE}
    about = options.out / "training.json"
    if about.exists() and json.loads(about.read_text()) != recipe:
        raise CouplingError(
            f"got {options.out}, a family of other data or settings (see {about}); choose another --out"
        )
    missing = [member for member in members if not (options.out / member.name).exists()]
    if missing:
        begun = time.perf_counter()
        device = torch.device(options.device)
        train_on = read_images(options.data, "train", device, options.images)
        test_on = read_images(options.data, "test", device)
        print(
            f"{len(train_on.labels)} + {len(test_on.labels)} images in {time.perf_counter() - begun:.0f} s",
            flush=True,
        )
        options.out.mkdir(parents=True, exist_ok=True)
        about.write_text(json.dumps(recipe, indent=1) + "\n")
        together = options.together or (1 if device.type == "cpu" else len(missing))
        for first in range(0, len(missing), together):
            group = missing[first : first + together]
            print(", ".join(member.name for member in group), flush=True)
            save(*train(train_on, test_on, group, options), options)
    return [member.name for member in members]


def measure_all(names: list[str], options: argparse.Namespace) -> None:
    """One `lm-eval-coupling vision` for every member that has no results, a few at a time."""
    waiting = [
        name for name in names if not any((options.output_path / name).rglob("results_*.json"))
    ]
    with ThreadPoolExecutor(options.processes) as threads:
        done = list(threads.map(lambda name: measure(name, options), waiting))
    if failed := [name for name, code in zip(waiting, done, strict=True) if code]:
        sys.exit(f"no results of {', '.join(failed)}; the same command tries them again")


def measure(name: str, options: argparse.Namespace) -> int:
    """Exit code of one run; its output goes into a file beside its results."""
    out = options.output_path / name
    out.mkdir(parents=True, exist_ok=True)
    words = [
        sys.executable,
        "-m",
        "lm_eval_coupling.cli",
        "vision",
        "--model",
        str(options.out / name),
        "--out",
        str(out),
    ]
    words += [
        "--data",
        str(options.data),
        "--split",
        "test",
        "--device",
        options.device,
        "--coupling",
        options.coupling,
    ]
    words += ["--limit", str(options.limit)] if options.limit else []
    begun = time.perf_counter()
    with (out / "log.txt").open("w") as log:
        code = subprocess.run(words, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
    last = (out / "log.txt").read_text().strip().splitlines()[-1:] if code else []
    print(
        f"{name}: {'measured' if not code else f'failed, {last}'}, {time.perf_counter() - begun:.0f} s",
        flush=True,
    )
    return code


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "data", type=Path, metavar="DATA", help="folder with train*.parquet and test*.parquet"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FAMILY", help="folder of the members"
    )
    parser.add_argument(
        "--output-path", type=Path, metavar="RESULTS", help="measure every member, into this folder"
    )
    parser.add_argument(
        "--stochastic-depth", type=float, nargs="+", default=[0.0, 0.05, 0.1, 0.3], metavar="P"
    )
    parser.add_argument(
        "--weight-decay", type=float, nargs="+", default=[0.005, 0.05, 0.1, 0.2], metavar="W"
    )
    parser.add_argument(
        "--size",
        choices=SIZES,
        default="small",
        help="of the models and of their training (%(default)s)",
    )
    for name, value in SIZES["small"].items():
        parser.add_argument(
            f"--{name}", type=type(value), metavar="N", help="instead of what --size says"
        )
    parser.add_argument(
        "--images", type=int, metavar="N", help="to train on, the first ones; all by default"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        metavar="S",
        help="a group's training is to take, instead of --epochs",
    )
    parser.add_argument(
        "--cutmix",
        type=float,
        default=0.5,
        metavar="P",
        help="share of batches with it (%(default)s)",
    )
    parser.add_argument(
        "--smoothing", type=float, default=0.1, metavar="E", help="of labels (%(default)s)"
    )
    parser.add_argument(
        "--together",
        type=int,
        metavar="M",
        help="members trained side by side; one on a CPU, else all",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of the products; bfloat16 on a GPU"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of the first weights, the order and the changes of images",
    )
    parser.add_argument(
        "--coupling",
        default="limit=100",
        metavar="SETTINGS",
        help="of the measurement (%(default)s)",
    )
    parser.add_argument(
        "--limit", type=int, metavar="N", help="test images to score when measuring; all by default"
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=1,
        metavar="N",
        help="members measured at a time (%(default)s)",
    )
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
