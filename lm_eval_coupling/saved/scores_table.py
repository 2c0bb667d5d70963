"""Saved runs of lm-eval as one table: scores, coupling and facts, one row per model and task."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from lm_eval_coupling.errors import CouplingError, flag, one_of
from lm_eval_coupling.errors import path as as_path
from lm_eval_coupling.errors import paths as as_paths
from lm_eval_coupling.saved.facts import add_facts
from lm_eval_coupling.saved.precedence import DEPTH_SETTINGS, Standing, takes_place
from lm_eval_coupling.saved.saved_run import SavedRun, SavedRuns, find_runs
from lm_eval_coupling.saved.task_rows import rows_of_run

logger = logging.getLogger(__name__)

# Settings that choose the documents of a task; other tasks may have had others.
_SAMPLE_SETTINGS = ("limit", "seed")
_WEIGHTS = ("model", "revision", "variant")


def load_runs(
    paths: Path | str | Iterable[Path | str],
    *,
    newest: bool = True,
    mixed: str = "refuse",
    facts: Path | str | None = None,
) -> pd.DataFrame:
    """Join scores of lm-eval's ``results_*.json`` with coupling: one row per model and task.

    Rows of one task are apart where the weights (``model, revision, variant, dtype, fingerprint``)
    or what makes the prompts and answers (``prompting``) differ. Of otherwise equal runs one with
    coupling counts before one without, then the newest. An older one stays if it holds more
    documents that were measured alike. Copies of a file count once. Columns:

    * ``model, revision, variant`` (further arguments of the model, such as ``peft=…``),
      ``fingerprint, task, alias, prompting, is_group, group`` (the first group that the task
      belongs to, or ""), ``groups`` (all of them, through groups of groups), ``n_fewshot``,
      ``n_samples`` of ``n_total`` documents, ``task_version`` (a number or a text),
      ``lm_eval_version, chat_template, date`` (in the files' names), ``time`` (seconds since the
      epoch), ``file``;
    * every metric and standard error under lm-eval's own key, such as ``acc,none`` and
      ``acc_stderr,none``; ``metric`` names the one that lm-eval lists first, ``directions`` which
      are better when higher, as pairs;
    * ``dtype, n_params, n_layers, d_model, n_heads, vocab_size``, and from names, a sweep's plan
      or ``facts``: ``family, tuned, training_tokens, lineage`` and ``step`` (of a checkpoint), and
      further columns of these;
    * ``run_id, interrupted, coupling_rank`` (of lm-eval's metric ``coupling,none``),
      ``worst_certificate``, ``measured`` and ``failed`` (documents of the task), and
      ``measured_tasks`` (the task, or those of a group, of which documents were measured);
    * for every measure m of ``config.coupling`` and every rank K: ``m@K``, ``m_stderr@K`` and
      ``m_n@K``, for instance ``coupling@10``; ``chance@K`` (the expected coupling of unrelated
      layers) and ``coupling_excess@K`` = ``coupling@K`` − ``chance@K``; without a rank:
      ``line_shape_score``, ``line_shape_score_stderr``, …

    A group's values pool the documents of its tasks. What a run does not have is NaN. A file that
    cannot be read is named in a warning and passed over.

    Args:
        paths: result files, or folders that are searched recursively.
        newest: of several runs of the same weights, task and prompts only that one, else all.
        mixed: ``refuse`` or ``keep`` runs whose coupling settings differ.
        facts: CSV file of facts about the models (:func:`~lm_eval_coupling.saved.facts.add_facts`).

    Returns:
        The rows, a file's in the order of its tasks.

    Raises:
        CouplingError: if there is no result file that can be read, or coupling settings differ.
    """
    one_of("mixed", mixed, ("refuse", "keep"))
    newest, facts = flag("newest", newest), None if facts is None else as_path("facts", facts)
    paths = as_paths("paths", paths)
    saved = find_runs(paths)
    require_results(saved, paths)
    for problem in saved.passed_over:
        logger.warning("passed over: %s", problem)
    return rows_of_runs(saved.runs, newest=newest, mixed=mixed, facts=facts)


def require_results(saved: SavedRuns, paths: Iterable[Path | str]) -> None:
    """Raise CouplingError if no run has results that can be read."""
    if not any(run.file for run in saved.runs):
        where = ", ".join(map(str, paths)) or "no folder"
        none = f"got {where}, where there is no results_*.json; give folders that lm-eval wrote"
        raise CouplingError(saved.passed_over[0] if saved.passed_over else none)


def rows_of_runs(
    runs: Iterable[SavedRun],
    *,
    newest: bool = True,
    mixed: str = "refuse",
    facts: Path | str | None = None,
) -> pd.DataFrame:
    """Make the table of :func:`load_runs` from runs that were found already.

    Returns:
        The rows, as there.
    """
    runs = [run for run in runs if run.file]
    settings = {str(run.file): run.settings for run in runs}
    rows = [row for run in sorted(runs, key=_by_time) for row in rows_of_run(run)]
    kept = sorted(_newest(rows, settings) if newest else rows, key=_order)
    if mixed == "refuse":
        _require_equal_settings(kept, settings)
    frame = pd.DataFrame(kept)
    return frame if facts is None else add_facts(frame, facts)


def _by_time(run: SavedRun) -> tuple[float, str]:
    return run.time, str(run.file)


def _order(row: Mapping[str, Any]) -> tuple[str, ...]:
    names = (*_WEIGHTS, "fingerprint", "task", "prompting", "date", "file")
    return tuple(str(row[name]) for name in names)


def _newest(
    rows: Iterable[dict[str, Any]], settings: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return the row that takes precedence for each weights, task and prompting.

    A row of scores without coupling has no fingerprint. It is left out if weights of its name were
    measured on the same task and prompting, unless both dtypes are known and differ.

    Args:
        rows: in the order of their times; of equal precedence (:mod:`.precedence`) the last counts.
        settings: settings of coupling, by results file.
    """
    latest: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        names = (*_WEIGHTS, "task", "prompting", "dtype", "fingerprint")
        key = tuple(row[name] for name in names)
        if key not in latest or takes_place(
            _standing(row, settings), _standing(latest[key], settings)
        ):
            latest[key] = row
    unknown = (None, None)  # dtype and fingerprint
    measured = {(*key[:-1], None) for key in latest if key[-1]}
    measured |= {(*key[:-2], *unknown) for key in measured}
    return [row for key, row in latest.items() if key not in measured]


def _standing(row: Mapping[str, Any], settings: Mapping[str, Mapping[str, Any]]) -> Standing:
    return Standing.of(settings[row["file"]], row["measured"], row["n_samples"])


def _require_equal_settings(
    rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Mapping[str, Any]]
) -> None:
    """Refuse coupling that was not measured alike, or not on the same documents of a task."""
    files: dict[str, list[str]] = {}
    for row in rows:
        if settings[row["file"]]:
            files.setdefault(row["task"], []).append(row["file"])
    every = dict.fromkeys(file for of_task in files.values() for file in of_task)
    _require_equal(list(every), settings, DEPTH_SETTINGS)
    for of_task in files.values():
        _require_equal(of_task, settings, _SAMPLE_SETTINGS)


def _require_equal(
    files: Sequence[str], settings: Mapping[str, Mapping[str, Any]], keys: Sequence[str]
) -> None:
    for file in files:
        for key in keys:
            first, other = (settings[name].get(key) for name in (files[0], file))
            if first != other:
                raise CouplingError(
                    f"got runs with different coupling settings: {key} is {first!r} in {files[0]} "
                    f"but {other!r} in {file}; measure them alike, give one of them, or pass "
                    "mixed='keep' (--mixed keep)"
                )
