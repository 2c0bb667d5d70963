"""lm-eval in one process for many checkpoints: tasks load once, each checkpoint leaves a run."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lm_eval
import transformers
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager
from zoo_parts.recipes import TASKS

from lm_eval_coupling.harness import lm, plugin

# Import torch, transformers and TransformerLens before the evaluators fork, not in each of them.
PRELOADED = (lm.CouplingLM, transformers.LlamaForCausalLM, transformers.PreTrainedTokenizerFast)


class LoadedTasks(TaskManager):
    """Task manager that loads tasks once: their documents are the same for every checkpoint."""

    def load(self, task_list: Any) -> Any:
        """Return the tasks that the first call loaded."""
        if not hasattr(self, "_loaded"):
            self._loaded = super().load(task_list)
        return self._loaded


class Evaluation:
    """Evaluation of checkpoints on BLiMP and the kept-out text, scored and measured.

    Args:
        tasks: some of ``TASKS``.
        data: folder that ``text.prepare`` wrote; tasks find their documents there.
        out: folder of the zoo; names of models and results are relative to it.
        pairs: minimal pairs scored of each paradigm of BLiMP.
        measured: documents measured of each task.
        measures: as ``coupling_measures``.
        ranks: as ``coupling_ranks``.
    """

    def __init__(
        self,
        data: Path,
        out: Path,
        *,
        tasks: Sequence[str] = TASKS,
        pairs: int,
        measured: int,
        measures: str,
        ranks: str,
    ) -> None:
        """Load the tasks."""
        plugin.install()
        self.out, self.names = out, list(tasks)
        self.measured, self.measures, self.ranks = measured, measures, ranks
        with inside(data):
            self.tasks = LoadedTasks(include_path=str(Path(__file__).parent))
            for name, task in self.tasks.load(self.names)["tasks"].items():
                # lm-eval reads all documents at every evaluation, whatever the limit.
                if name != "kept_out":
                    split = task.config.validation_split
                    documents = task.dataset[split]
                    task.dataset[split] = documents.select(range(min(pairs, len(documents))))

    def run(self, model: str) -> None:
        """Evaluate the checkpoint in ``out/model``; lm-eval's files go into ``out/results``."""
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
                tasks=self.names,
                task_manager=self.tasks,
                batch_size=64,
                device="cpu",
                evaluation_tracker=tracker,
            )
            samples = results.pop("samples")
            tracker.save_results_aggregated(results, samples)
            for task, of_task in samples.items():
                tracker.save_results_samples(task, of_task)


def has_results(out: Path, model: str) -> bool:
    """Return whether the results of a checkpoint are written."""
    return any((out / "results" / model.replace("/", "__")).glob("results_*.json"))


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Change the working directory for a while."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
