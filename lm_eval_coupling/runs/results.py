"""A run's values in lm-eval's results and samples, and in tables beside them."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from lm_eval_coupling.errors import CouplingError, why
from lm_eval_coupling.measures.formulas.means import mean_and_error
from lm_eval_coupling.runs.rows import DocumentKey, DocumentPrompt, Row, document_couplings
from lm_eval_coupling.saved.atomic import write_text
from lm_eval_coupling.saved.strict_json import strict
from lm_eval_coupling.saved.tables import TRAINED, write_tables


class CouplingInfo(dict):
    """The facts under ``config.coupling`` of the results, with the rows for the tables.

    lm-eval hands results on as plain dictionaries, from an evaluation to a tracker that may be made
    much later. The rows travel along as attributes, which JSON does not see.

    Attributes:
        rows: measured prompts.
        out: folder for the tables; None for the folder of the results.
        tables: files that were written.
        unwritten: reason for which there are no tables; empty if there is none.
        unstored: why a store that was asked for lacks some of the records; empty if it has all.
    """

    def __init__(
        self, facts: Mapping[str, Any], rows: Sequence[Row] = (), out: Path | None = None
    ) -> None:
        """Keep ``facts`` as strict JSON has them, without NaN."""
        super().__init__(strict(facts, name=lambda rank_or_text: rank_or_text))
        self.rows = rows
        self.out = out
        self.tables: list[Path] = []
        self.unwritten = self.unstored = ""

    def __deepcopy__(self, memo: dict[int, Any]) -> CouplingInfo:
        """Copy the facts alone: lm-eval's loggers copy all results, several times."""
        copied = CouplingInfo({}, self.rows, self.out)
        copied.update(copy.deepcopy(dict(self), memo))
        copied.tables = list(self.tables)
        copied.unwritten, copied.unstored = self.unwritten, self.unstored
        return copied

    def write_tables(self, folder: Path | None, date: str) -> list[Path]:
        """Write the tables into ``out``, else into ``folder``; nowhere if both are None.

        Tables that this run wrote before, under an earlier date, are removed.

        Returns:
            The files that were written.
        """
        folder = self.out or folder
        if folder is None or not self.rows:
            return []
        written = []
        for task in dict.fromkeys(row.document.task for row in self.rows):
            own = [row.to_columns() for row in self.rows if row.document.task == task]
            written += write_tables(
                own, folder, date, self | {"prompts": self.get("prompts", {}).get(task)}
            )
        for older in self.tables:
            if older not in written:
                older.unlink(missing_ok=True)
        self.tables = written
        return written


def add_to_results(
    results: dict[str, Any], info: CouplingInfo, members: Mapping[str, Sequence[str]]
) -> None:
    """Add coupling to lm-eval's results: a metric per task and group, a value per sample.

    Args:
        results: what `lm_eval.evaluate` returned; changed in place.
        info: the run's, with its rows; becomes ``config.coupling``.
        members: names of the leaf tasks of every group.
    """
    trained = [row for row in info.rows if row.weights == TRAINED]
    values = document_couplings(trained, info["headline_rank"])
    tasks = [name for name in results["results"] if name not in members]
    for name, leaves in {**{task: [task] for task in tasks}, **members}.items():
        mean = mean_and_error(value for key, value in values.items() if key.task in leaves)
        if mean["n"]:
            _add_metric(results, name, mean)
    for task, samples in (results.get("samples") or {}).items():
        for sample in samples:
            value = values.get(_key(task, sample), math.nan)
            sample["coupling"] = None if math.isnan(value) else value
    results.setdefault("config", {})["coupling"] = info


def with_logged_ids(
    rows: Sequence[Row], results: Mapping[str, Any], chosen: Mapping[str, Sequence[int]]
) -> list[Row]:
    """Return the rows with the ``doc_id`` in lm-eval's samples, or else the number in the data set.

    With ``--samples``, lm-eval numbers the requests from 0, in the order of the data set.

    Args:
        rows: with the numbers of the requests.
        results: what `lm_eval.evaluate` returned, with or without samples.
        chosen: the documents that ``--samples`` chose, by task.
    """
    logged = {
        _key(task, sample): sample["doc_id"]
        for task, samples in (results.get("samples") or {}).items()
        for sample in reversed(samples)  # the first of equal documents wins
    }
    renumbered = {task: sorted(set(numbers)) for task, numbers in chosen.items() if numbers}

    def doc_id(prompt: DocumentPrompt) -> int:
        numbers = renumbered.get(prompt.document.task, ())
        own = numbers[prompt.doc_id] if prompt.doc_id < len(numbers) else prompt.doc_id
        return logged.get(prompt.document, own)

    return [replace(row, prompt=replace(row.prompt, doc_id=doc_id(row.prompt))) for row in rows]


def save_run(
    results: dict[str, Any],
    info: CouplingInfo | None,
    folder: Path,
    members: Mapping[str, Sequence[str]] | None = None,
) -> Path:
    """Write results, samples and tables of a run that lm-eval's own tracker does not save.

    The files have lm-eval's names. Results come last: where they are, the run is complete.

    Args:
        results: as `lm_eval.evaluate` returns them, with ``model_name`` and ``samples``.
        info: what was measured; None if the run only scores.
        folder: gets a folder of the model's name.
        members: names of the leaf tasks of every group; none by default.

    Returns:
        The file of results.

    Raises:
        CouplingError: if a file cannot be written.
    """
    time = datetime.now()
    date = time.isoformat().replace(":", "-")
    sanitized = re.sub(r'["<>:/|\\?*\[\]]+', "__", results["model_name"])
    results = results | {"model_name_sanitized": sanitized, "date": time.timestamp()}
    if info is not None:
        add_to_results(results, info, members or {})
    samples = results.pop("samples")
    where = folder / sanitized
    try:
        where.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CouplingError(
            f"got {folder} for the results, which cannot be written ({why(error)}); "
            "choose another --out"
        ) from None
    if info is not None:
        info.write_tables(where, date)
    for task, members in samples.items():
        lines = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in members)
        write_text(where / f"samples_{task}_{date}.jsonl", lines)
    dumped = json.dumps(results, indent=2, ensure_ascii=False, default=str)
    return write_text(where / f"results_{date}.json", dumped)


def _key(task: str, sample: Mapping[str, Any]) -> DocumentKey:
    return DocumentKey(task, sample["doc_hash"], sample["prompt_hash"])


def _add_metric(results: dict[str, Any], name: str, mean: Mapping[str, float]) -> None:
    stderr = mean["stderr"] if mean["n"] > 1 else "N/A"
    for column in ("results", "groups"):
        if name in results.get(column, {}):
            results[column][name].update(
                {"coupling,none": mean["mean"], "coupling_stderr,none": stderr}
            )
    results.setdefault("higher_is_better", {}).setdefault(name, {})["coupling"] = True
