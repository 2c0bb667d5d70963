"""Saved runs of known coupling, scores and answers, for `fit`."""

import json
import math

import numpy as np
from saved_runs import DATE, record, sample, save, task_summary, write_samples

from lm_eval_coupling.fit.observations import observe
from lm_eval_coupling.fit.scores import scored_rows
from lm_eval_coupling.saved.scores_table import load_runs

QUICK = 199  # resamples


def save_model(folder, model, coupling, scores, *, date=DATE, rows=(), change=None, **about):
    """A run with this coupling@10 and this accuracy on every task (of 50 documents); the folder it
    is in.
    """
    summaries = {task: task_summary(coupling + 0.01) for task in scores}
    about = {"fingerprint": model, "run_id": model} | about
    where = save(folder, summaries, model=model, date=date, rows=rows, **about)
    file = where / f"results_{date}.json"
    run = json.loads(file.read_text())
    for task, accuracy in scores.items():
        run["results"][task] |= {
            "acc,none": accuracy,
            "acc_stderr,none": math.sqrt(accuracy * (1 - accuracy) / 49),
        }
    if change:
        change(run)
    file.write_text(json.dumps(run))
    return where


def observations(folder, *, x=None, **kwargs):
    notes = []
    return observe(scored_rows(load_runs(folder), notes, **kwargs), notes, x=x)


def save_documents(folder, model, values, right, task="arc", likelihoods=None, **about):
    """A run whose documents have this coupling@10 and these answers; samples are in another order
    than records.
    """
    rows = [record(task, i) | {"n_tokens": 10 + i} for i in range(len(values))]
    for row, coupling in zip(rows, values, strict=True):
        row["normalized_miscoupling"] = np.full_like(row["normalized_miscoupling"], 1 - coupling)
    where = save_model(
        folder, model, float(np.mean(values)), {task: float(np.mean(right))}, rows=rows, **about
    )
    samples = []
    for i, correct in enumerate(right):
        chances = (likelihoods or {}).get(
            i, (-1.0, -2.0) if not correct else (-2.0, -1.0)
        )  # the second choice is right
        given = [[str(chance), "False"] for chance in chances]
        samples.append(sample(f"d{i}", acc=float(correct), doc_id=99 - i, filtered_resps=given))
    write_samples(where, task, samples[::-1])
    return where
