"""Saved runs of lm-eval as one table: scores, coupling and facts about the model, one row per (model, task)."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.saved.names import add_facts, facts_from_name

_DATED = re.compile(r"_(\d{4}-\d{2}-\d{2}T\d{2}-\d{2}-\d{2}(?:\.\d+)?)\.json$")
_NO_METRICS = ("alias", "name", "sample_len")  # releases before 0.4 write "acc" for "acc,none"
# What the numbers of depth coupling depend on: runs that measured other things besides are not different in these.
_DEPTH_SETTINGS = ("ranks", "dtype", "method", "measurement_version", "position")
_SAMPLE_SETTINGS = ("limit", "seed")  # which documents of a task; other tasks may have had others


def load_runs(
    paths: Path | str | Iterable[Path | str],
    *,
    newest: bool = True,
    mixed: str = "refuse",
    facts: Path | str | None = None,
) -> pd.DataFrame:
    """Scores of lm-eval's ``results_*.json`` joined with coupling: one row per (model, task), groups included.

    The newest run of a (model name, revision, task) counts, one with coupling before one without. Columns:

    * ``model, revision, task, alias, is_group, group`` (the group that the task belongs to, or ""), ``n_fewshot``,
      ``n_samples`` of ``n_total`` documents, ``task_version, lm_eval_version, chat_template, date, file``;
    * every metric and standard error under lm-eval's own key, such as ``acc,none`` and ``acc_stderr,none``; ``metric``
      names the one that lm-eval lists first;
    * ``fingerprint, dtype, n_params, n_layers, d_model, n_heads, vocab_size``, and from names or ``facts`` ``family, tuned,
      training_tokens, lineage`` and ``step`` (of a checkpoint);
    * ``run_id, interrupted, coupling_rank`` (of lm-eval's metric ``coupling,none``), ``worst_certificate``, ``measured`` and
      ``failed`` (documents of the task);
    * for every measure m of ``config.coupling`` and every rank K: ``m@K``, ``m_stderr@K``, ``m_n@K``, for instance
      ``coupling@10``, ``miscoupling_to_stderr@30``; ``chance@K`` (m̃ of chance) and ``coupling_excess@K`` =
      ``coupling@K`` − (1 − ``chance@K``); without a rank: ``line_shape_score``, ``line_shape_score_stderr``, …

    A group's values pool the documents of its tasks. What a run does not have is NaN.

    Args:
        paths: result files, or folders that are searched recursively.
        newest: of several runs of a (model name, revision, task) only the newest; otherwise all of them.
        mixed: ``refuse`` or ``keep`` runs whose coupling settings differ.
        facts: CSV file with what is known of the models; see :func:`~lm_eval_coupling.saved.names.add_facts`.

    Raises:
        CouplingError: if there is no result file, one is unreadable, or coupling settings differ.
    """
    if mixed not in ("refuse", "keep"):
        raise CouplingError(f"got mixed={mixed!r}, expected 'refuse' or 'keep'")
    rows: dict[tuple[str, ...], dict[str, Any]] = {}
    settings: dict[str, dict[str, Any]] = {}
    for file, run in _results(paths):
        settings[str(file)] = _coupling_of(run).get("settings", {})
        for row in _rows_of_run(run, file):
            key = (row["model"], row["revision"], row["task"], *(() if newest else (row["date"], row["file"])))
            if key not in rows or _precedence(row) >= _precedence(rows[key]):
                rows[key] = row
    kept = [rows[key] for key in sorted(rows)]
    if mixed == "refuse":
        _require_equal_settings(kept, settings)
    frame = pd.DataFrame(kept)
    return frame if facts is None else add_facts(frame, facts)


def _results(paths: Path | str | Iterable[Path | str]) -> Iterable[tuple[Path, dict[str, Any]]]:
    """Every results file at ``paths`` with its content; other people's JSON in a folder is passed over."""
    roots = [Path(paths)] if isinstance(paths, str | Path) else [Path(path) for path in paths]
    seen: set[Path] = set()
    for root in roots:
        if not root.exists():
            raise CouplingError(f"got {root}, which does not exist; give folders that lm-eval wrote or its result files")
        # `--output_path NAME.json` makes NAME_<date>.json instead of results_<date>.json
        files = [root] if root.is_file() else [f for f in sorted(root.rglob("*.json")) if _is_result_name(f.name)]
        for file in files:
            if (there := file.resolve()) in seen:  # of two paths, one may lead to the other
                continue
            run = _read(file)
            if isinstance(run, dict) and isinstance(run.get("results"), dict):
                seen.add(there)
                yield file, run
            elif file == root:
                raise CouplingError(f"got {file}, which has no results; expected a results_*.json that lm-eval wrote")
    if not seen:
        where = ", ".join(map(str, roots)) or "no folder"
        raise CouplingError(f"got {where}, where there is no results_*.json; give folders that lm-eval wrote")


def _is_result_name(name: str) -> bool:
    return name.startswith("results") or bool(_DATED.search(name))


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CouplingError(
            f"got {file}, which is no readable results file ({error}); remove it or run the evaluation again"
        ) from None


def _coupling_of(run: Mapping[str, Any]) -> dict[str, Any]:
    return (run.get("config") or {}).get("coupling") or {}


def _rows_of_run(run: Mapping[str, Any], file: Path) -> Iterable[dict[str, Any]]:
    config, coupling = run.get("config") or {}, _coupling_of(run)
    dated = _DATED.search(file.name)
    model = str(run.get("model_name") or coupling.get("model") or _pretrained(config) or file.parent.name)
    revision = str(config.get("model_revision") or coupling.get("revision") or "main")
    origin = {
        "lm_eval_version": run.get("lm_eval_version"),
        "chat_template": bool(run.get("chat_template")),
        "run_id": coupling.get("run_id"),
        "interrupted": bool(coupling.get("interrupted")),
        "date": dated[1] if dated else "",
        "file": str(file),
    }
    facts = {
        "fingerprint": coupling.get("fingerprint"),
        "dtype": str(coupling.get("model_dtype") or config.get("model_dtype") or "").removeprefix("torch.") or None,
        "n_params": _number(coupling.get("n_params") or config.get("model_num_parameters")),
    }
    facts |= {name: _number(coupling.get(name)) for name in ("n_layers", "d_model", "n_heads", "vocab_size")}
    facts |= facts_from_name(model, revision)
    children = run.get("group_subtasks") or {}
    groups = leaf_tasks(children)
    above = {child: group for group, members in children.items() for child in members or ()}
    for task, found in run["results"].items():
        metrics = {key if "," in key else f"{key},none": _number(found[key]) for key in found if key not in _NO_METRICS}
        yield (
            {"model": model, "revision": revision, "task": task, "alias": str(found.get("alias", task)).strip(" -")}
            | {"is_group": bool(groups.get(task)), "group": above.get(task, "")}
            | {"n_fewshot": _number((run.get("n-shot") or {}).get(task)), **_samples(run, task, found)}
            | {"task_version": _number((run.get("versions") or {}).get(task))}
            | origin
            | {"metric": next(filter(is_score, metrics), None)}
            | metrics
            | facts
            | _coupling_columns(coupling, groups.get(task) or [task])
        )


def is_score(column: str) -> bool:
    """Whether a column holds one of lm-eval's metrics: no standard error, and not coupling."""
    return "," in column and "_stderr," not in column and not column.startswith("coupling,")


def _pretrained(config: Mapping[str, Any]) -> str | None:
    arguments = config.get("model_args")
    if isinstance(arguments, str):
        arguments = dict(part.split("=", 1) for part in arguments.split(",") if "=" in part)
    return (arguments or {}).get("pretrained")


def _number(value: Any) -> float:
    """NaN for what is no number, such as lm-eval's standard error "N/A"."""
    return float(value) if isinstance(value, int | float) else math.nan


def _samples(run: Mapping[str, Any], task: str, found: Mapping[str, Any]) -> dict[str, float]:
    count = (run.get("n-samples") or {}).get(task)
    count = count if isinstance(count, Mapping) else {"effective": found.get("sample_len")}
    return {"n_samples": _number(count.get("effective")), "n_total": _number(count.get("original"))}


def leaf_tasks(subtasks: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Leaf tasks of each group, through groups of groups."""

    def below(name: str, above: tuple[str, ...]) -> list[str]:
        children = [child for child in subtasks.get(name) or [] if child not in above]
        return [leaf for child in children for leaf in below(child, (*above, name))] if children else [name]

    return {name: list(dict.fromkeys(below(name, ()))) for name, children in subtasks.items() if children}


def _coupling_columns(coupling: Mapping[str, Any], tasks: Sequence[str]) -> dict[str, Any]:
    members = [coupling["tasks"][task] for task in tasks if task in coupling.get("tasks", {})]
    if not members:
        return {"coupling_rank": math.nan, "worst_certificate": math.nan, "measured": 0, "failed": 0}
    columns: dict[str, Any] = {
        "coupling_rank": coupling["headline_rank"],
        "worst_certificate": _number(coupling.get("worst_certificate")),
        "measured": sum(member["measured"] for member in members),
        "failed": sum(member["failed"] for member in members),
    }
    for name, first in members[0]["measures"].items():
        for rank in [None] if "mean" in first else first:
            parts = [m["measures"].get(name, {}) if rank is None else m["measures"].get(name, {}).get(rank) for m in members]
            pooled = parts[0] if len(parts) == 1 else pool([part for part in parts if part])
            columns |= zip(_columns(name, rank), (pooled["mean"], pooled["stderr"], pooled["n"]), strict=True)
    for rank, chance in coupling.get("chance", {}).items():
        columns[f"chance@{rank}"] = chance
        columns[f"coupling_excess@{rank}"] = columns.get(f"coupling@{rank}", math.nan) - (1 - chance)
    return columns


@functools.cache
def _columns(name: str, rank: str | None) -> tuple[str, str, str]:
    at = "" if rank is None else f"@{rank}"
    return f"{name}{at}", f"{name}_stderr{at}", f"{name}_n{at}"


def pool(parts: Sequence[Mapping[str, Any]]) -> dict[str, float | int]:
    """Mean, standard error and number of the values of several samples, from those of each: as if computed from all."""
    parts = [part for part in parts if part["n"]]
    n = sum(part["n"] for part in parts)
    if n == 0:
        return {"mean": math.nan, "stderr": math.nan, "n": 0}
    mean = sum(part["n"] * part["mean"] for part in parts) / n
    squares = sum(part["n"] * (part["mean"] - mean) ** 2 for part in parts)
    squares += sum((part["n"] - 1) * part["n"] * part["stderr"] ** 2 for part in parts if part["n"] > 1)
    return {"mean": mean, "stderr": math.sqrt(squares / (n - 1) / n) if n > 1 else math.nan, "n": n}


def _precedence(row: Mapping[str, Any]) -> tuple[bool, str]:
    return row["measured"] > 0, row["date"]


def _require_equal_settings(rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse runs whose coupling was not measured in the same way, or of one task not on the same documents."""
    files: dict[str, list[str]] = {}
    for row in rows:
        if settings[row["file"]]:
            files.setdefault(row["task"], []).append(row["file"])
    _require_equal([file for of_task in files.values() for file in of_task], settings, _DEPTH_SETTINGS)
    for of_task in files.values():
        _require_equal(of_task, settings, _SAMPLE_SETTINGS)


def _require_equal(files: Sequence[str], settings: Mapping[str, Mapping[str, Any]], keys: Sequence[str]) -> None:
    for file in files:
        for key in keys:
            first, other = settings[files[0]].get(key), settings[file].get(key)
            if first != other:
                raise CouplingError(
                    f"got runs with different coupling settings: {key} is {first!r} in {files[0]} but {other!r} in {file}; "
                    "measure them alike, give one of them, or pass mixed='keep'"
                )
