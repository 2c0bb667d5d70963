"""Facts about a run's model, measurements and software, recorded in its results and tables."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Sequence
from typing import Any

from lm_eval_coupling.measures.formulas.headline import chance_coupling, headline_rank
from lm_eval_coupling.runs.rows import Row, task_summaries, worst_certificate
from lm_eval_coupling.runs.session import Session
from lm_eval_coupling.saved.tables import SCHEMA_VERSION, TRAINED, UNTRAINED
from lm_eval_coupling.versions import installed_version

PACKAGES = ("lm-eval-coupling", "lm-eval", "transformer-lens", "transformers", "torch")


def about_model(session: Session, config: Any) -> dict[str, Any]:
    """Return size and identity of the measured model; ``config`` is transformers' configuration."""
    model, architecture = session.trained.model, config.get_text_config()
    return {
        "fingerprint": model.fingerprint,
        "way": f"{model.wrapping}: {model.wrapping_reason}",
        "model_dtype": str(model.dtype),
        "device": str(model.device),
        "d_model": model.d_model,
        "n_layers": model.n_layers,
        "n_params": model.n_params,
        "n_heads": getattr(architecture, "num_attention_heads", None),
        "vocab_size": getattr(architecture, "vocab_size", None),
    }


def about_measurement(
    rows: Sequence[Row], tasks: Iterable[str], ranks: Sequence[int]
) -> dict[str, Any]:
    """Summarize what was measured of every task, and of an untrained twin separately."""
    tasks = list(tasks)
    summaries = {
        weights: task_summaries([row for row in rows if row.weights == weights], tasks, ranks)
        for weights in (TRAINED, UNTRAINED)
    }
    trained = summaries[TRAINED]
    return {
        "headline_rank": headline_rank(ranks),
        "chance": {k: chance_coupling(k) for k in ranks},
        "measured": sum(summary["measured"] for summary in trained.values()),
        "failed": sum(summary["failed"] for summary in trained.values()),
        "worst_certificate": worst_certificate(rows),
        "tasks": trained,
    } | ({UNTRAINED: {"tasks": summaries[UNTRAINED]}} if summaries[UNTRAINED] else {})


def about_software() -> dict[str, Any]:
    """Return a new name for the run, and the versions of the packages that compute."""
    return {
        "run_id": uuid.uuid4().hex,
        "schema_version": SCHEMA_VERSION,
        "versions": {name: installed_version(name) for name in PACKAGES},
    }
