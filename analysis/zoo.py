r"""Train a zoo of small language models: what goes with their scores, beside size and loss?

    python analysis/zoo.py --corpus CORPUS --blimp BLIMP --data DATA --out ZOO
    lm-eval-coupling fit ZOO/results --facts ZOO/facts.csv
    python analysis/checkpoints.py ZOO/results
    python analysis/zoo.py --data DATA --out ZOO --records analysis/results/zoo

Llamas of 3 to 12 blocks and 64 to 256 components learn from one corpus. They differ in depth,
width, shape, repetition of the text, steps, weight decay, learning rate and seed; some read spoiled
text (see zoo_parts/recipes.py). Every checkpoint is an ordinary transformers folder, every
evaluation an ordinary run of lm-eval: BLiMP and the bits per byte of kept-out text, measured on the
same documents.

Processes train members (--trainers); others evaluate checkpoints on the CPU as soon as they are
saved (--evaluators). Complete work is not repeated: the same command goes on after a stop. Without
--corpus and --blimp, DATA must exist. On two CPU cores --windows 8 takes about two hours.
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
from zoo_parts.recipes import TASKS, Recipe, zoo

from lm_eval_coupling.errors import CouplingError

FOLDER = "zoo"  # of the models in OUT, so that names in results tell whose checkpoint each is
FACTS = ("family", "text", "length", "rate", "decay", "shuffled", "noise", "seed")


def one_thread() -> None:
    """Limit torch to one thread: processes share the cores, and members are small."""
    import torch

    torch.set_num_threads(1)


def train_members(options: argparse.Namespace, members: SimpleQueue, finished: SimpleQueue) -> None:
    """Train members until none is left, a few in turns, and pass on their checkpoints.

    Last checkpoints are passed on first. Earlier ones follow at the end, or beside a GPU as soon as
    the evaluators are idle.
    """
    one_thread()
    import torch

    size = {"steps": options.steps, "windows": options.windows, "device": options.device}
    waiting, training, earlier = True, [], []
    while waiting or training:
        while waiting and len(training) < options.turns:
            if waiting := (recipe := members.get()) is not None:
                training.append(Training(recipe, options, size))
        for member in list(training):
            # Kernels of small models leave room for those of others, hence a stream for each.
            with torch.cuda.stream(member.stream):
                if not member.make_step():
                    training.remove(member)
            for name in member.take_saved():
                finished.put(name) if name == member.last else earlier.append(name)
        if earlier and options.device != "cpu" and finished.empty():
            finished.put(earlier.pop(0))
    for name in earlier:
        finished.put(name)


class Training:
    """Member in training, with a CUDA stream of its own on a GPU."""

    def __init__(self, recipe: Recipe, options: argparse.Namespace, size: dict[str, Any]) -> None:
        """Prepare the training; nothing is computed yet."""
        import torch
        from zoo_parts.training import train

        self.recipe, self.start = recipe, time.perf_counter()
        self.last = checkpoints(recipe, options)[-1]
        self.stream = None if options.device == "cpu" else torch.cuda.Stream()
        self._saved: list[str] = []
        self._steps = train(recipe, options.data, options.out / FOLDER / recipe.name, **size)

    def make_step(self) -> bool:
        """Make a step or save a checkpoint; return whether there is more to do."""
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

    def take_saved(self) -> list[str]:
        """Return the checkpoints saved since the last call."""
        names, self._saved = self._saved, []
        return names


def evaluate_checkpoints(evaluation, options: argparse.Namespace, finished: SimpleQueue) -> None:
    """Evaluate checkpoints until none is left."""
    one_thread()
    while (model := finished.get()) is not None:
        start = time.perf_counter()
        try:
            evaluation.run(model)
        except Exception:
            traceback.print_exc()
        print(f"{model}: evaluated in {time.perf_counter() - start:.0f} s", flush=True)


def name_of(recipe: Recipe, checkpoint: str) -> str:
    """Return the name of a model as lm-eval gets it in OUT."""
    return f"{FOLDER}/{recipe.name}/{checkpoint}"


def checkpoints(recipe: Recipe, options: argparse.Namespace) -> list[str]:
    """Return the names of a member's models, the final one last."""
    return [name_of(recipe, f"checkpoint-{step}") for step in recipe.saved(options.steps)]


def write_facts(recipes: list[Recipe], options: argparse.Namespace) -> None:
    """Write ``facts.csv``: facts of every checkpoint that ``fit`` cannot read off a name."""
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
    """Train and evaluate what is missing; return how many checkpoints have results in the end."""
    spawning, forking = multiprocessing.get_context("spawn"), multiprocessing.get_context("fork")
    members, finished = spawning.SimpleQueue(), spawning.SimpleQueue()
    trainers = [
        spawning.Process(target=train_members, args=(options, members, finished))
        for _ in range(options.trainers)
    ]
    for process in trainers:
        process.start()
    # From here on neither this process nor the evaluators, forks of it, may touch the GPU.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    one_thread()
    from zoo_parts.evaluation import Evaluation, has_results

    evaluation = Evaluation(
        options.data.resolve(),
        options.out.resolve(),
        tasks=options.tasks,
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
    every = [name for recipe in recipes for name in checkpoints(recipe, options)]
    earlier: list[str] = []
    for recipe in recipes:
        names = checkpoints(recipe, options)
        if not (options.out / names[-1]).exists():
            members.put(recipe)
            continue
        for name in names:
            if not has_results(options.out, name):
                finished.put(name) if name == names[-1] else earlier.append(name)
    join_processes(trainers, members)
    for name in earlier:
        finished.put(name)
    join_processes(evaluators, finished)
    done = sum(has_results(options.out, name) for name in every)
    results = options.out / "results"
    print(f"{done} of {len(every)} checkpoints have results in {results}", flush=True)
    return done


def join_processes(processes: list[Any], queue: SimpleQueue) -> None:
    """Let processes finish the queue, and wait for them."""
    for _ in processes:
        queue.put(None)
    for process in processes:
        process.join()


def copy_records(out: Path, to: Path) -> None:
    """Copy all that ``fit`` reads of a zoo: facts, losses in one table, results without documents.

    Args:
        out: the zoo's folder.
        to: folder of the copy.
    """
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


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line, with defaults that depend on the device."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--corpus", type=Path, metavar="DIR", help="train.parquet and validation.parquet")
    add("--blimp", type=Path, metavar="DIR", help="a folder of Parquet per paradigm of BLiMP")
    add("--data", type=Path, required=True, metavar="DATA", help="tokens and documents, made once")
    add("--out", type=Path, required=True, metavar="ZOO")
    add("--members", nargs="+", metavar="NAME", help="only these")
    add("--steps", type=int, default=600, metavar="N", help="of the standard recipe (600)")
    add("--windows", type=int, default=128, metavar="N", help="of 128 tokens, in a batch (128)")
    add("--device", default="cpu", metavar="D", help="of the training: cpu or cuda (cpu)")
    add("--trainers", type=int, metavar="N", help="processes (4 on a GPU, else one per core)")
    add("--turns", type=int, metavar="N", help="members per trainer at a time (2 on a GPU, else 1)")
    help_evaluators = "processes (the free cores on a GPU, else half of them)"
    add("--evaluators", type=int, metavar="N", help=help_evaluators)
    add("--tasks", nargs="+", default=TASKS, choices=TASKS, help="blimp and kept_out by default")
    add("--pairs", type=int, default=20, metavar="N", help="scored per paradigm of BLiMP (20)")
    add("--measured", type=int, default=48, metavar="N", help="documents per task (48)")
    add("--measures", default="depth+regularity", help="as coupling_measures (%(default)s)")
    add("--ranks", default="10+30", help="as coupling_ranks (%(default)s)")
    add("--records", type=Path, metavar="DIR", help="only copy results and facts, small, to DIR")
    options = parser.parse_args(argv)
    cores, on_gpu = os.cpu_count() or 1, options.device != "cpu"
    options.trainers = options.trainers or (4 if on_gpu else cores)
    options.turns = options.turns or (2 if on_gpu else 1)
    options.evaluators = options.evaluators or max(1, cores - 4 if on_gpu else cores // 2)
    return options


def main(argv: list[str] | None = None) -> None:
    """Prepare, train, evaluate."""
    options = parse_options(argv)
    if options.records:
        return copy_records(options.out, options.records)
    recipes = {recipe.name: recipe for recipe in zoo()}
    if unknown := [name for name in options.members or () if name not in recipes]:
        raise CouplingError(f"got no member {unknown[0]!r}, expected some of {', '.join(recipes)}")
    members = [recipes[name] for name in options.members or recipes]
    if options.corpus:
        from zoo_parts.text import prepare

        if options.blimp is None:
            raise CouplingError("got --corpus without --blimp, expected both; add --blimp DIR")
        prepare(options.corpus, options.blimp, options.data)
    if not (options.data / "tokens.npz").exists():
        raise CouplingError(
            f"got {options.data}, which is not prepared; give --corpus and --blimp once"
        )
    options.out.mkdir(parents=True, exist_ok=True)
    write_facts(members, options)
    run(members, options)


if __name__ == "__main__":
    command.run(main)
