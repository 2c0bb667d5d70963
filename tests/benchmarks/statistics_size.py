"""Size at 5 % and coverage at 95 % of every statistic that speaks in ``finding.txt``.

    python tests/benchmarks/statistics_size.py [--repetitions 1000] [--quick] [--resume]

Each row simulates one statistic where nothing depends on anything (``size``: the share of p ≤ 0.05;
``claims``: the share of results that the words would call beyond chance) and where the truth is
known (``coverage`` of the 95 % interval). Tests of permutations draw 199 of them. Rows with
``only_in`` are of statistics that stand in this table of ``fit`` and not in ``finding.txt``. A row
outside 3–7 % or 92–98 % has a ``reason``.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from simulated_models import (
    answers,
    families,
    in_families,
    pairs,
    three,
    true_area,
    true_correlation,
)

from lm_eval_coupling.statistics import (
    auroc,
    auroc_together,
    auroc_within,
    compare_correlations,
    correlation,
    correlation_within,
    document_reliability,
    family_effect,
    logistic_effect,
    logistic_together,
    partial_correlation,
    simultaneous_p_values,
)
from lm_eval_coupling.statistics.sentences import is_beyond_chance

RESAMPLES = 199
COLUMNS = {"model": "model", "task": "task", "document": "document"}
# Reasons for rates outside 3–7 % and 92–98 %, by the statistic's name.
REASONS = {
    "strengths, |r| = 0.0": "two correlations near 0 differ less in strength than in value, whose "
    "errors make the interval; nothing is claimed unless a correlation is beyond chance",
    "family effect, mixed": "few unequal families: the error takes variances as known",
    "family effect, cluster": "skewed data: a far family leaves about 2 degrees of freedom",
}
Draw = Callable[[np.random.Generator], tuple[object, float]]


def cases() -> Iterator[tuple[dict[str, object], Draw, Draw | None]]:
    """Yield a description, what is drawn under chance, and what is drawn with a known truth."""
    for data in ("normal", "lognormal"):
        for method, sizes in (("pearson", (8, 12, 20, 40)), ("spearman", (12, 40))):
            for n in sizes:
                about = {"statistic": f"correlation, {method}", "data": data, "models": n}
                about |= {"only_in": "correlations.csv"} if method == "spearman" else {}
                draw = functools.partial(_correlation, n=n, method=method, data=data)
                yield about, functools.partial(draw, rho=0.0), functools.partial(draw, rho=0.6)
        for number in (5, 8, 12, 20):
            for kind in ("equal", "unequal"):
                about = {"statistic": "correlation across families", "data": data}
                about |= {"models": len(families(number, kind)), "families": f"{number} {kind}"}
                draw = functools.partial(_across, number=number, kind=kind, data=data)
                yield about, functools.partial(draw, rho=0.0), functools.partial(draw, rho=0.6)
        for number in (3, 8):
            about = {"statistic": "correlation within families", "data": data}
            about |= {"models": len(families(number)), "families": f"{number} unequal"}
            draw = functools.partial(_within, number=number, data=data)
            yield about, functools.partial(draw, rho=0.0), functools.partial(draw, rho=0.6)
        for number in (None, 8):
            about = {"statistic": "partial correlation", "data": data}
            about |= {"models": 20 if number is None else len(families(number))}
            about |= {} if number is None else {"families": f"{number} unequal"}
            draw = functools.partial(_partial, number=number, data=data)
            yield about, functools.partial(draw, rho=0.0), functools.partial(draw, rho=0.6)
        for first, second in ((0.0, 0.0), (0.5, 0.5), (0.6, 0.0), (0.8, 0.3)):
            about = {"statistic": f"strengths, |r| = {first} and {second}", "data": data}
            draw = functools.partial(_strengths, first=first, second=second, data=data)
            chance, truth = (draw, None) if first == second else (None, draw)
            yield about | {"models": 20}, chance, truth
        for number in (None, 8):
            about = {"statistic": "20 predictors at once", "data": data}
            about |= {"models": 20 if number is None else len(families(number))}
            about |= {} if number is None else {"families": f"{number} unequal"}
            yield about, functools.partial(_simultaneous, number=number, data=data), None
        for method in ("mixed", "cluster"):
            for number in (5, 8, 20):
                about = {"statistic": f"family effect, {method}", "only_in": "families.csv"}
                about |= {"data": data}
                about |= {"models": len(families(number)), "families": f"{number} unequal"}
                draw = functools.partial(_family_effect, number=number, method=method, data=data)
                yield about, functools.partial(draw, slope=0.0), functools.partial(draw, slope=0.5)
    for data in ("normal", "lognormal"):
        for models, documents in ((1, 70), (1, 300), (3, 70), (3, 300)):
            about = {"statistic": "AUROC" if models == 1 else "AUROC of models together"}
            about |= {"data": data, "models": models, "documents": documents}
            draw = functools.partial(_auroc, models=models, documents=documents, data=data)
            yield about, functools.partial(draw, shift=0.0), functools.partial(draw, shift=0.6)
            name = "odds" if models == 1 else "odds of models together"
            draw = functools.partial(_odds, models=models, documents=documents, data=data)
            yield about | {"statistic": name}, draw, None
        about = {"statistic": "AUROC within tasks", "data": data, "models": 1, "documents": 150}
        draw = functools.partial(_auroc_within, data=data)
        yield about, functools.partial(draw, shift=0.0), functools.partial(draw, shift=0.6)
    for models in (6, 20):
        about = {"statistic": "reliability", "data": "normal", "models": models, "documents": 40}
        yield about, None, functools.partial(_reliability, models=models)


def _correlation(rng, *, n, rho, method, data):
    x, y = pairs(rng, n, rho, data)
    result = correlation(x, y, method=method, resamples=RESAMPLES, seed=_seed(rng))
    ranked = 6 / math.pi * math.asin(rho / 2)
    return result, ranked if method == "spearman" else true_correlation(rho, data)


def _across(rng, *, number, kind, rho, data):
    family = families(number, kind)
    x, y = in_families(rng, family, rho, data=data)
    result = correlation(x, y, family=family, resamples=RESAMPLES, seed=_seed(rng))
    return result, true_correlation(rho, data)


def _within(rng, *, number, rho, data):
    family = families(number)
    x, y = pairs(rng, len(family), rho, data)
    levels = 3 * rng.normal(size=number)[family]
    frame = pd.DataFrame({"x": x + levels, "y": y + levels, "family": family})
    result = correlation_within(frame, "x", "y", "family", resamples=RESAMPLES, seed=_seed(rng))
    return result, true_correlation(rho, data)


def _partial(rng, *, number, rho, data):
    family = np.arange(20) if number is None else families(number)
    x, y = in_families(rng, family, rho, share=0.5, data=data)
    z = rng.normal(size=len(x))
    frame = pd.DataFrame({"x": x + z, "y": y + z, "z": z, "family": family})
    result = partial_correlation(
        frame, "x", "y", ["z"], family="family", resamples=RESAMPLES, seed=_seed(rng)
    )
    return result, true_correlation(rho, data)


def _strengths(rng, *, first, second, data):
    y, a, b = three(rng, 20, first, second, 0.3, data)
    result = compare_correlations(y, a, -b, resamples=RESAMPLES, seed=_seed(rng))
    return result, true_correlation(first, data) - true_correlation(second, data)


def _simultaneous(rng, *, number, data):
    family = np.arange(20) if number is None else families(number)
    common, score = in_families(rng, family, data=data)
    predictors = pd.DataFrame(common[:, None] + 0.5 * rng.normal(size=(len(family), 20)))
    p = simultaneous_p_values(
        predictors, pd.Series(score), family=family, resamples=RESAMPLES, seed=_seed(rng)
    )
    return float(p.min()), math.nan


def _family_effect(rng, *, number, slope, method, data):
    family = families(number)
    x, noise = in_families(rng, family, data=data)
    frame = pd.DataFrame({"s": slope * x + noise, "x": x, "family": family})
    result = family_effect(frame, score="s", predictor="x", family="family", method=method)
    return result, slope


def _auroc(rng, *, models, documents, shift, data):
    frame = answers(rng, models, documents, shift, data)
    if models == 1:
        return auroc(frame["value"], frame["right"]), true_area(shift)
    return auroc_together(frame, "value", "right", **COLUMNS), true_area(shift)


def _auroc_within(rng, *, shift, data):
    frame = answers(rng, 1, 150, shift, data)
    return auroc_within(frame, "value", "right", "task")[1], true_area(shift)


def _odds(rng, *, models, documents, data):
    frame = answers(rng, models, documents, data=data)
    named = {"correct": "right", "predictor": "value"}
    result = logistic_effect(frame, **named) if models == 1 else None
    return result or logistic_together(frame, **named, **COLUMNS), 1.0


def _reliability(rng, *, models):
    noise, documents = 3.0, 40
    values = rng.normal(size=(models, 1)) + noise * rng.normal(size=(models, documents))
    result = document_reliability(pd.DataFrame(values), splits=1)
    return result, 1 / (1 + noise**2 / documents)


def _seed(rng) -> int:
    return int(rng.integers(2**31))


def measure(chance: Draw | None, truth: Draw | None, repetitions: int) -> dict[str, float]:
    """Return size, claims and coverage over seeded repetitions, in percent."""
    rates: dict[str, list[bool]] = {"size": [], "claims": [], "coverage": []}
    for i in range(repetitions):
        if chance is not None:
            result, null = chance(np.random.default_rng([20261129, i]))
            if isinstance(result, float):
                rates["size"].append(result <= 0.05)
            else:
                rates["size"].append(result.p <= 0.05)
                of = getattr(result, "effect", result)
                rates["claims"].append(
                    result.p < 0.05 and not of.low <= null <= of.high
                    if of is not result
                    else is_beyond_chance(result, null=null)
                )
                if truth is None:
                    rates["coverage"].append(of.low <= null <= of.high)
        if truth is not None:
            result, value = truth(np.random.default_rng([20261130, i]))
            of = getattr(result, "effect", result)
            rates["coverage"].append(of.low <= value <= of.high)
    return {name: round(100 * float(np.mean(v)), 1) for name, v in rates.items() if v}


def main(argv: list[str] | None = None) -> None:
    """Simulate all cases and write the rates as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=1000)
    parser.add_argument("--quick", action="store_true", help="20 repetitions of each case")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="keep the rows of --out that have as many repetitions",
    )
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "statistics_size.json"
    )
    options = parser.parse_args(argv)
    repetitions = 20 if options.quick else options.repetitions
    earlier = json.loads(options.out.read_text())["rates_in_percent"] if options.resume else []
    rows = []
    for about, chance, truth in cases():
        kept = next((row for row in earlier if about.items() <= row.items()), None)
        if kept is None or kept["repetitions"] < repetitions:
            started = time.process_time()
            kept = about | measure(chance, truth, repetitions) | {"repetitions": repetitions}
            print(kept, f"{time.process_time() - started:.1f} s", flush=True)
        kept = {name: value for name, value in kept.items() if name != "reason"} | _reason(kept)
        rows.append(kept)
        # Rows that an interrupted call has not come to stay as they were.
        done = _keys(rows)
        known = [row for row in earlier if not any(own.items() <= row.items() for own in done)]
        results = {"resamples": RESAMPLES, "rates_in_percent": rows + known}
        options.out.write_text(json.dumps(results, indent=1) + "\n")


def _reason(row: dict[str, object]) -> dict[str, str]:
    """Return the reason for rates outside 3–7 % and 92–98 %; none where they are within."""
    if 3 <= row.get("size", 5) <= 7 and 92 <= row.get("coverage", 95) <= 98:
        return {}
    reasons = (words for start, words in REASONS.items() if row["statistic"].startswith(start))
    return {"reason": next(reasons, "unknown")}


def _keys(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    """Return what describes each row, without its rates."""
    rates = ("size", "claims", "coverage", "repetitions", "reason")
    return [{name: row[name] for name in row if name not in rates} for row in rows]


if __name__ == "__main__":
    main()
