r"""A zoo of small language models trained from scratch: what goes with their scores, beside size and loss?

    python analysis/zoo.py --corpus ../shared/corpus --blimp ../shared/hf/nyu-mll/blimp --data DATA --out ZOO
    lm-eval-coupling fit ZOO/results --facts ZOO/facts.csv
    python analysis/checkpoints.py ZOO/results
    python analysis/zoo.py --data DATA --out ZOO --records analysis/results/zoo

Llamas of 3 to 12 blocks of 64 to 256 components learn from the same corpus. They differ in depth, width, shape, repetition
of the text, the number of steps, weight decay, learning rate and seed, and some read text that was spoiled (see
zoo_parts/recipes.py). Every checkpoint is an ordinary transformers folder, every evaluation an ordinary run of lm-eval:
BLiMP and the bits per byte of kept-out text, measured on the same documents. Without --corpus DATA must be there.

Members are trained by --trainers processes, and evaluated by --evaluators others on the CPU as soon as they are saved. What
is complete is not made again: the same command goes on after a stop. On two CPU cores take --windows 8 (about two hours).
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
import traceback
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

import command
import pandas as pd
from zoo_parts.recipes import Recipe, zoo

from lm_eval_coupling.errors import CouplingError

FOLDER = "zoo"  # of the models in OUT: with it names in results tell whose checkpoint each is
FACTS = ("family", "text", "length", "rate", "decay", "shuffled", "noise", "seed")


def one_thread() -> None:
    """Processes share the cores; members are too small to share one process's work."""
    import torch

    torch.set_num_threads(1)


def train_members(options: argparse.Namespace, members: SimpleQueue, finished: SimpleQueue) -> None:
    """Train members until there is none left, a few at a time in turns, and pass on their checkpoints.

    Last checkpoints go first, earlier ones in the end; beside a GPU already while no evaluator has anything else to do.
    """
    one_thread()
    import torch

    size = {"steps": options.steps, "windows": options.windows, "device": options.device}
    waiting, training, earlier = True, [], []
    while waiting or training:
        while waiting and len(training) < options.turns:
            if waiting := (recipe := members.get()) is not None:
                training.append(Training(recipe, options, size))
        for one in list(training):
            with torch.cuda.stream(
                one.stream
            ):  # kernels of small models leave room for those of others
                if not one.go_on():
                    training.remove(one)
            for name in one.saved():
                finished.put(name) if name == one.last else earlier.append(name)
        if earlier and options.device != "cpu" and finished.empty():
            finished.put(earlier.pop(0))
    for name in earlier:
        finished.put(name)


class Training:
    """One member in training, with its own stream of kernels where there is a GPU."""

    def __init__(self, recipe: Recipe, options: argparse.Namespace, size: dict[str, Any]) -> None:
        """Begin; nothing is computed yet."""
        import torch
        from zoo_parts.training import train

        self.recipe, self.start = recipe, time.perf_counter()
        self.last = checkpoints(recipe, options)[-1]
        self.stream = None if options.device == "cpu" else torch.cuda.Stream()
        self._saved: list[str] = []
        self._steps = train(recipe, options.data, options.out / FOLDER / recipe.name, **size)

    def go_on(self) -> bool:
        """Make a step or save a checkpoint; whether there is more to do."""
        try:
            if (checkpoint := next(self._steps)) is not None:
                self._saved.append(name_of(self.recipe, checkpoint))
            return True
        except StopIteration:
            print(
                f"{self.recipe.name}: trained in {time.perf_counter() - self.start:.0f} s",
                flush=True,
            )
        except Exception:
            print(f"{self.recipe.name}: training failed", flush=True)
            traceback.print_exc()
        return False

    def saved(self) -> list[str]:
        """The checkpoints saved since the last call."""
        names, self._saved = self._saved, []
        return names


def evaluate_checkpoints(evaluation, options: argparse.Namespace, finished: SimpleQueue) -> None:
    """Evaluate checkpoints until there is none left."""
    one_thread()
    while (model := finished.get()) is not None:
        start = time.perf_counter()
        try:
            evaluation.run(model)
        except Exception:
            traceback.print_exc()
        print(f"{model}: evaluated in {time.perf_counter() - start:.0f} s", flush=True)


def name_of(recipe: Recipe, checkpoint: str) -> str:
    """Of a model, as it is given to lm-eval in OUT."""
    return f"{FOLDER}/{recipe.name}/{checkpoint}"


def checkpoints(recipe: Recipe, options: argparse.Namespace) -> list[str]:
    """The names of a member's models, the last one at the end."""
    return [name_of(recipe, f"checkpoint-{step}") for step in recipe.saved(options.steps)]


def write_facts(recipes: list[Recipe], options: argparse.Namespace) -> None:
    """``facts.csv`` of every checkpoint: what ``fit`` cannot read off a name."""
    from zoo_parts.text import CONTEXT

    rows = [
        {
            "model": name,
            "training_tokens": int(name.rpartition("-")[2]) * options.windows * CONTEXT,
            "member": recipe.name,
        }
        | {fact: getattr(recipe, fact) for fact in FACTS}
        for recipe in recipes
        for name in checkpoints(recipe, options)
    ]
    pd.DataFrame(rows).to_csv(options.out / "facts.csv", index=False)


def run(recipes: list[Recipe], options: argparse.Namespace) -> int:
    """Train and evaluate what is not there; how many checkpoints have results in the end, and say so."""
    spawning, forking = multiprocessing.get_context("spawn"), multiprocessing.get_context("fork")
    members, finished = spawning.SimpleQueue(), spawning.SimpleQueue()
    trainers = [
        spawning.Process(target=train_members, args=(options, members, finished))
        for _ in range(options.trainers)
    ]
    for process in trainers:
        process.start()
    # From here on nothing of this process or of the evaluators, which are forks of it, may touch the GPU.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    one_thread()
    from zoo_parts.evaluation import Evaluation, is_there

    evaluation = Evaluation(
        options.data.resolve(),
        options.out.resolve(),
        pairs=options.pairs,
        measured=options.measured,
        measures=options.measures,
        ranks=options.ranks,
    )
    given = (evaluation, options, finished)
    evaluators = [
        forking.Process(target=evaluate_checkpoints, args=given) for _ in range(options.evaluators)
    ]
    for process in evaluators:
        process.start()
    everything = [name for recipe in recipes for name in checkpoints(recipe, options)]
    earlier: list[str] = []
    for recipe in recipes:
        names = checkpoints(recipe, options)
        if not (options.out / names[-1]).exists():
            members.put(recipe)
            continue
        for name in names:
            if not is_there(options.out, name):
                finished.put(name) if name == names[-1] else earlier.append(name)
    end(trainers, members)
    for name in earlier:
        finished.put(name)
    end(evaluators, finished)
    there = sum(is_there(options.out, name) for name in everything)
    print(
        f"{there} of {len(everything)} checkpoints have results in {options.out / 'results'}",
        flush=True,
    )
    return there


def end(processes: list[Any], queue: SimpleQueue) -> None:
    """Let processes finish what is queued, and wait for them."""
    for _ in processes:
        queue.put(None)
    for process in processes:
        process.join()


def copy_records(out: Path, to: Path) -> None:
    """Results without documents, facts and losses of a zoo: what ``fit`` reads of the models."""
    from zoo_parts.records import write_small

    count = write_small(out / "results", to / "runs")
    (to / "facts.csv").write_text((out / "facts.csv").read_text())
    losses = {
        file.parent.name: pd.read_csv(file) for file in sorted(out.glob(f"{FOLDER}/*/training.csv"))
    }
    if losses:
        rows = pd.concat(losses, names=["member"]).reset_index(level="member")
        rows.to_csv(to / "training.csv", index=False)
    print(f"{to}: {count} results")


def main(argv: list[str] | None = None) -> None:
    """Prepare, train, evaluate."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--corpus", type=Path, metavar="DIR", help="train.parquet and validation.parquet with text"
    )
    parser.add_argument(
        "--blimp", type=Path, metavar="DIR", help="a folder of Parquet for each paradigm of BLiMP"
    )
    parser.add_argument(
        "--data", type=Path, required=True, metavar="DATA", help="tokens and documents, made once"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="ZOO")
    parser.add_argument("--members", nargs="+", metavar="NAME", help="only these")
    parser.add_argument(
        "--steps", type=int, default=600, metavar="N", help="of the standard recipe (%(default)s)"
    )
    parser.add_argument(
        "--windows",
        type=int,
        default=128,
        metavar="N",
        help="of 128 tokens, in a batch (%(default)s)",
    )
    parser.add_argument(
        "--device", default="cpu", metavar="D", help="of the training: cpu or cuda (%(default)s)"
    )
    cores = os.cpu_count() or 1
    parser.add_argument(
        "--trainers", type=int, metavar="N", help="processes; 4 on a GPU, else one a core"
    )
    parser.add_argument(
        "--turns",
        type=int,
        metavar="N",
        help="members that a trainer has in hand; 2 on a GPU, else 1",
    )
    parser.add_argument(
        "--evaluators",
        type=int,
        metavar="N",
        help="processes; a core each is left for them on a GPU",
    )
    parser.add_argument(
        "--pairs",
        type=int,
        default=20,
        metavar="N",
        help="scored of a paradigm of BLiMP (%(default)s)",
    )
    parser.add_argument(
        "--measured", type=int, default=48, metavar="N", help="documents of each task (%(default)s)"
    )
    parser.add_argument(
        "--measures", default="depth+regularity", help="as coupling_measures (%(default)s)"
    )
    parser.add_argument("--ranks", default="10+30", help="as coupling_ranks (%(default)s)")
    parser.add_argument(
        "--records", type=Path, metavar="DIR", help="copy results and facts, small, to be committed"
    )
    options = parser.parse_args(argv)
    on_gpu = options.device != "cpu"
    options.trainers = options.trainers or (4 if on_gpu else cores)
    options.turns = options.turns or (2 if on_gpu else 1)
    options.evaluators = options.evaluators or max(1, cores - 4 if on_gpu else cores // 2)
    if options.records:
        return copy_records(options.out, options.records)
    recipes = {recipe.name: recipe for recipe in zoo()}
    if unknown := [name for name in options.members or () if name not in recipes]:
        raise CouplingError(f"got no member {unknown[0]!r}, expected some of {', '.join(recipes)}")
    chosen = [recipes[name] for name in options.members or recipes]
    if options.corpus:
        from zoo_parts.text import prepare

        if options.blimp is None:
            raise CouplingError(
                "got --corpus without --blimp, expected the folder of its paradigms beside it"
            )
        prepare(options.corpus, options.blimp, options.data)
    if not (options.data / "tokens.npz").exists():
        raise CouplingError(
            f"got {options.data}, which is not prepared; give --corpus and --blimp once"
        )
    options.out.mkdir(parents=True, exist_ok=True)
    write_facts(chosen, options)
    run(chosen, options)


if __name__ == "__main__":
    command.run(main)
