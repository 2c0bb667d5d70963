"""Saved runs of lm-eval as one table: scores, coupling and facts about the model, one row per (model, task)."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from lm_eval_coupling.errors import CouplingError, flag, one_of
from lm_eval_coupling.errors import path as as_path
from lm_eval_coupling.errors import paths as as_paths
from lm_eval_coupling.saved.names import add_facts
from lm_eval_coupling.saved.precedence import DEPTH_SETTINGS, Standing, setting, takes_place
from lm_eval_coupling.saved.saved_run import SavedRun, SavedRuns, find_runs
from lm_eval_coupling.saved.task_rows import rows_of_run

logger = logging.getLogger(__name__)

_SAMPLE_SETTINGS = ("limit", "seed")  # which documents of a task; other tasks may have had others


def load_runs(
    paths: Path | str | Iterable[Path | str],
    *,
    newest: bool = True,
    mixed: str = "refuse",
    facts: Path | str | None = None,
) -> pd.DataFrame:
    """Scores of lm-eval's ``results_*.json`` joined with coupling: one row per (model, task), groups included.

    Rows of one task under one name are apart where the weights (``fingerprint``, ``variant``: further arguments of the model
    such as ``peft=…``) or what makes the prompts (``prompting``) are not the same; otherwise one with coupling counts before
    one without, and the newest, unless an older one holds more documents that were measured alike: a short trial takes no
    run's place. Columns:

    * ``model, revision, variant, fingerprint, task, alias, prompting, is_group, group`` (the group that the task belongs to,
      or ""), ``n_fewshot``, ``n_samples`` of ``n_total`` documents, ``task_version, lm_eval_version, chat_template, date,
      file``;
    * every metric and standard error under lm-eval's own key, such as ``acc,none`` and ``acc_stderr,none``; ``metric``
      names the one that lm-eval lists first, ``directions`` which are better when higher, as pairs;
    * ``dtype, n_params, n_layers, d_model, n_heads, vocab_size``, and from names, a sweep's plan or ``facts`` ``family,
      tuned, training_tokens, lineage`` and ``step`` (of a checkpoint), and what else these tell;
    * ``run_id, interrupted, coupling_rank`` (of lm-eval's metric ``coupling,none``), ``worst_certificate``, ``measured`` and
      ``failed`` (documents of the task);
    * for every measure m of ``config.coupling`` and every rank K: ``m@K``, ``m_stderr@K``, ``m_n@K``, for instance
      ``coupling@10``, ``miscoupling_to_stderr@30``; ``chance@K`` (the coupling of unrelated layers, 1 − √(1 − 1/K)) and
      ``coupling_excess@K`` = ``coupling@K`` − ``chance@K``; without a rank: ``line_shape_score``,
      ``line_shape_score_stderr``, …

    A group's values pool the documents of its tasks. What a run does not have is NaN. A file that cannot be read is named
    and passed over.

    Args:
        paths: result files, or folders that are searched recursively.
        newest: of several runs of the same weights, task and prompts only that one; otherwise all of them.
        mixed: ``refuse`` or ``keep`` runs whose coupling settings differ.
        facts: CSV file with what is known of the models; see :func:`~lm_eval_coupling.saved.names.add_facts`.

    Returns:
        The rows, a file's in the order of its tasks.

    Raises:
        CouplingError: if there is no result file that can be read, or coupling settings differ.
    """
    one_of("mixed", mixed, ("refuse", "keep"))
    newest, facts = flag("newest", newest), None if facts is None else as_path("facts", facts)
    paths = as_paths("paths", paths)
    found = find_runs(paths)
    require_results(found, paths)
    for problem in found.passed_over:
        logger.warning("passed over: %s", problem)
    return rows_of_runs(found.runs, newest=newest, mixed=mixed, facts=facts)


def require_results(found: SavedRuns, paths: Iterable[Path | str]) -> None:
    """Raise CouplingError if no run has results that can be read."""
    if not any(run.file for run in found.runs):
        where = ", ".join(map(str, paths)) or "no folder"
        none = f"got {where}, where there is no results_*.json; give folders that lm-eval wrote"
        raise CouplingError(found.passed_over[0] if found.passed_over else none)


def rows_of_runs(
    runs: Iterable[SavedRun],
    *,
    newest: bool = True,
    mixed: str = "refuse",
    facts: Path | str | None = None,
) -> pd.DataFrame:
    """:func:`load_runs` of runs that were found already."""
    runs = [run for run in runs if run.file]
    settings = {str(run.file): run.settings for run in runs}
    rows = [row for run in sorted(runs, key=lambda run: run.date) for row in rows_of_run(run)]
    kept = sorted(_newest(rows, settings) if newest else rows, key=_order)
    if mixed == "refuse":
        _require_equal_settings(kept, settings)
    frame = pd.DataFrame(kept)
    return frame if facts is None else add_facts(frame, facts)


def _order(row: Mapping[str, Any]) -> tuple[str, ...]:
    names = ("model", "revision", "variant", "fingerprint", "task", "prompting", "date", "file")
    return tuple(str(row[name]) for name in names)


def _newest(
    rows: Iterable[dict[str, Any]], settings: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Of the same weights, task and prompts the one that counts (precedence.py), of ``rows`` in the order of their dates.

    Weights that only scores were taken of have no fingerprint: they are those of that name, if there is one such model.

    Returns:
        One row of each.
    """
    latest: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in rows:
        key = (
            *(
                row[name]
                for name in ("model", "revision", "variant", "fingerprint", "task", "prompting")
            ),
        )
        if key not in latest or takes_place(
            *(_standing(one, settings) for one in (row, latest[key]))
        ):
            latest[key] = row
    known = {key[:3] + key[4:] for key in latest if key[3]}
    return [row for key, row in latest.items() if key[3] or key[:3] + key[4:] not in known]


def _standing(row: Mapping[str, Any], settings: Mapping[str, Mapping[str, Any]]) -> Standing:
    return Standing.of(settings[row["file"]], row["measured"], row["n_samples"])


def _require_equal_settings(
    rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Mapping[str, Any]]
) -> None:
    """Refuse runs whose coupling was not measured in the same way, or of one task not on the same documents."""
    files: dict[str, list[str]] = {}
    for row in rows:
        if settings[row["file"]]:
            files.setdefault(row["task"], []).append(row["file"])
    _require_equal(
        [file for of_task in files.values() for file in of_task], settings, DEPTH_SETTINGS
    )
    for of_task in files.values():
        _require_equal(of_task, settings, _SAMPLE_SETTINGS)


def _require_equal(
    files: Sequence[str], settings: Mapping[str, Mapping[str, Any]], keys: Sequence[str]
) -> None:
    for file in files:
        for key in keys:
            first, other = (setting(settings[name], key) for name in (files[0], file))
            if first != other:
                raise CouplingError(
                    f"got runs with different coupling settings: {key} is {first!r} in {files[0]} but {other!r} in {file}; "
                    "measure them alike, give one of them, or pass mixed='keep' (--mixed keep)"
                )
