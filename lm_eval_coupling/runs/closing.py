"""The lines under lm-eval's table: what was measured, where it lies, and what to do next."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval_coupling.measures.formulas.means import mean_and_error
from lm_eval_coupling.runs.results import CouplingInfo
from lm_eval_coupling.runs.rows import Row, document_couplings, worst_certificate
from lm_eval_coupling.saved.tables import TRAINED, UNTRAINED

TASKS = 20  # more of them, as of MMLU, are left to `show`
# Smallest coupling above chance, and what it is called.
_STRENGTHS = ((0.1, "clearly coupled"), (0.02, "weakly coupled"), (0.0, "barely above chance"))
_HEADER = ("task", "coupling", "untrained", "documents", "prompts", "worst certificate")

_INTERRUPTED = "Interrupted: what was measured is kept, the same command measures the rest."


def closing_lines(info: CouplingInfo, results: Mapping[str, Any]) -> str:
    """Return a summary of a run for the terminal, empty if nothing was measured.

    Args:
        info: the run's, with its rows and the tables that were written.
        results: lm-eval's, for the number of evaluated documents.
    """
    if not info.rows:
        return _INTERRUPTED if info.get("interrupted") else ""
    rank = info["headline_rank"]
    table = [_HEADER, *(_table_row(info, results, task) for task in info["tasks"])]
    lines = [f"Coupling at K = {rank}, where chance is {info['chance'][rank]:.4f}"]
    lines += _aligned(table[: TASKS + 1], without=() if UNTRAINED in info else ("untrained",))
    if len(table) > TASKS + 1:
        lines.append(f"  and {len(table) - TASKS - 1} tasks more")
    lines += _verdict(info)
    return "\n".join(lines + _remarks(info))


def _table_row(info: CouplingInfo, results: Mapping[str, Any], task: str) -> tuple[str, ...]:
    rows = [row for row in info.rows if row.document.task == task]
    trained, untrained = (
        [row for row in rows if row.weights == weights] for weights in (TRAINED, UNTRAINED)
    )
    worst = worst_certificate(trained)
    # With --predict_only lm-eval counts no documents.
    evaluated = (results.get("n-samples", {}).get(task) or {}).get("effective") or "?"
    return (
        task,
        _coupling(trained, info["headline_rank"]),
        _coupling(untrained, info["headline_rank"]),
        f"{info['tasks'][task]['measured']} of {evaluated}",
        str(sum(row.place == 0 for row in trained)),
        "-" if math.isnan(worst) else f"{worst:.0e}",
    )


def _coupling(rows: Sequence[Row], rank: int) -> str:
    mean = mean_and_error(document_couplings(rows, rank).values())
    if not mean["n"]:
        return "-"
    return f"{mean['mean']:.4f}" + (f" ± {mean['stderr']:.4f}" if mean["n"] > 1 else "")


def _verdict(info: CouplingInfo) -> list[str]:
    """Say in words how far the mean over all measured documents lies above chance."""
    rank = info["headline_rank"]
    chance = info["chance"][rank]
    means = {
        weights: mean_and_error(
            document_couplings([r for r in info.rows if r.weights == weights], rank).values()
        )
        for weights in (TRAINED, UNTRAINED)
    }
    trained, untrained = means[TRAINED], means[UNTRAINED]
    if trained["n"] < 2:
        return []
    lines = [f"In all: {_against_chance(trained, chance)}"]
    if untrained["n"] > 1:
        lines.append(f"Untrained twin: {_against_chance(untrained, chance)}")
    return lines


def _against_chance(summary: Mapping[str, float], chance: float) -> str:
    """Compare the mean coupling of documents with that of random matrices."""
    from scipy.special import stdtrit

    value = f"{summary['mean']:.4f} ± {summary['stderr']:.4f} over {summary['n']} documents"
    excess = summary["mean"] - chance
    # Of two documents, an interval of 95 % reaches 13 standard errors far.
    if abs(excess) <= stdtrit(summary["n"] - 1, 0.975) * summary["stderr"]:
        return f"{value}, not distinguishable from chance"
    if excess < 0:
        return f"{value}, {-excess:.4f} below chance"
    strength = next(word for least, word in _STRENGTHS if excess >= least)
    return f"{value}, {excess:.4f} above chance: {strength}"


def _aligned(table: Sequence[Sequence[str]], without: Sequence[str]) -> list[str]:
    columns = [column for column in zip(*table, strict=True) if column[0] not in without]
    widths = [max(map(len, column)) for column in columns]
    return [
        "  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in zip(*columns, strict=True)
    ]


def _remarks(info: CouplingInfo) -> list[str]:
    lines = []
    if info["reused"]:
        lines.append(f"Prompts measured before and found in the store: {info['reused']}.")
    if info["failed"]:
        lines.append(f"Documents that could not be measured: {info['failed']}; the tables say why.")
    if info["interrupted"]:
        lines.append(_INTERRUPTED)
    if info.tables:
        folder = info.tables[0].parent
        names = (
            info.tables[0].name
            if len(info.tables) == 1
            else f"{len(info.tables)} files *coupling_*.parquet"
        )
        lines.append(f"Tables: {names} in {folder}")
        lines.append(f"Next: {shlex.join(['lm-eval-coupling', 'show', str(folder)])}")
    elif info.unwritten:
        lines.append(
            f"No tables were written: {info.unwritten}. "
            "The same command takes what was measured from the store."
        )
    else:
        lines.append(
            "No tables were written: "
            "give --output_path DIR, or coupling_out=DIR among the model arguments."
        )
    return lines
