"""The harness in one process for many checkpoints: tasks are loaded once, every checkpoint leaves an ordinary run."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lm_eval
import transformers
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager

from lm_eval_coupling.harness import (
    lm as _measured,  # with torch and TransformerLens: once, not in every evaluator
)
from lm_eval_coupling.harness import plugin

TASKS = ("blimp", "kept_out")
USED = (_measured.CouplingLM, transformers.LlamaForCausalLM, transformers.PreTrainedTokenizerFast)


class LoadedTasks(TaskManager):
    """Loads tasks at the first call only: their documents are the same for every checkpoint."""

    def load(self, task_list: Any) -> Any:
        """What the first call loaded."""
        if not hasattr(self, "_loaded"):
            self._loaded = super().load(task_list)
        return self._loaded


class Evaluation:
    """BLiMP and the kept-out text, scored and measured.

    Args:
        data: what ``text.prepare`` wrote; tasks find their documents there.
        out: folder of the zoo; models and results are named from there.
        pairs: minimal pairs scored of each paradigm of BLiMP.
        measured: documents measured of BLiMP, and of the kept-out text.
        measures: as ``coupling_measures``.
        ranks: as ``coupling_ranks``.
    """

    def __init__(
        self, data: Path, out: Path, *, pairs: int, measured: int, measures: str, ranks: str
    ) -> None:
        """Load the tasks."""
        plugin.install()
        self.out, self.measured, self.measures, self.ranks = out, measured, measures, ranks
        with inside(data):
            self.tasks = LoadedTasks(include_path=str(Path(__file__).parent))
            for name, task in self.tasks.load(list(TASKS))["tasks"].items():
                if (
                    name != "kept_out"
                ):  # lm-eval goes through all documents at every evaluation, whatever the limit
                    split = task.config.validation_split
                    task.dataset[split] = task.dataset[split].select(
                        range(min(pairs, len(task.dataset[split])))
                    )

    def run(self, model: str) -> None:
        """Evaluate the checkpoint in the folder ``out/model`` and write what lm-eval writes into ``out/results``."""
        with inside(self.out):
            tracker = EvaluationTracker(output_path="results")
            results = lm_eval.simple_evaluate(
                plugin.MODEL,
                model_args={
                    "pretrained": model,
                    "dtype": "float32",
                    "coupling_ranks": self.ranks,
                    "coupling_limit": self.measured,
                    "coupling_measures": self.measures,
                    "coupling_store": str(self.out / "store" / model.replace("/", "-")),
                },
                tasks=list(TASKS),
                task_manager=self.tasks,
                batch_size=64,
                device="cpu",
                evaluation_tracker=tracker,
            )
            samples = results.pop("samples")
            tracker.save_results_aggregated(results, samples)
            for task, of_task in samples.items():
                tracker.save_results_samples(task, of_task)


def is_there(out: Path, model: str) -> bool:
    """Whether the results of a checkpoint are written."""
    return any((out / "results" / model.replace("/", "__")).glob("results_*.json"))


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Work in a folder for a while."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
