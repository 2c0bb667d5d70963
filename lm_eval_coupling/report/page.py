"""Saved runs as one self-contained HTML page: opened from disk it reaches for nothing else.

Python gathers numbers and texts (:mod:`.data`), the browser shows them (``assets/`` and plotly.js). Everything that was
measured, prompts included, travels as JSON and is shown as text only.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any

from lm_eval_coupling.errors import CouplingError, why
from lm_eval_coupling.report.data import DOCUMENTS, gather

_SCRIPTS = (
    "basics",
    "data",
    "tables",
    "plots",
    "overview",
    "layers",
    "documents",
    "provenance",
    "page",
)

__all__ = ["DOCUMENTS", "gather", "write_report"]


def write_report(
    paths: Path | str | Iterable[Path | str],
    out: Path | str,
    *,
    documents: int = DOCUMENTS,
    mixed: str = "refuse",
    words: Path | str | None = None,
) -> Path:
    """Write the page.

    Args:
        paths: folders that lm-eval wrote, searched recursively.
        out: the page's file; made anew.
        documents: how many measured prompts of each model and task it may hold, the texts and matrices being what
            makes it large; a page of very many tasks holds fewer, and says so.
        mixed: ``refuse`` or ``keep`` runs whose coupling settings differ.
        words: the ``words.csv`` of ``analysis/words.py``, shown with the documents that it has words of.

    Returns:
        The file.

    Raises:
        CouplingError: if there is no run, plotly is missing, the page cannot be written, or ``words`` has none of its
            documents.
    """
    _plotly()  # better missed now than after minutes of reading
    html = page(gather(paths, documents=documents, mixed=mixed, words=words))
    out = Path(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(html, encoding="utf-8")
    except OSError as error:
        raise CouplingError(
            f"got {out} for the report, which cannot be written ({why(error)}); choose another file"
        ) from None
    return out


def page(data: dict[str, Any]) -> str:
    """The HTML of ``data``, as :func:`gather` returns it."""
    scripts = [_plotly(), _script()]
    # A policy of no loads at all, and of no script but these two: were a prompt ever taken for markup, it would stay inert.
    policy = (
        f"default-src 'none'; script-src {' '.join(map(_hash, scripts))}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )
    parts = {
        "policy": policy,
        "style": _asset("page.css"),
        "data": embeddable_json(data),
        "plotly": scripts[0],
        "script": scripts[1],
    }
    # One pass over the template, none over what is put in: a prompt may contain any placeholder.
    first, *others = _asset("page.html").split("{{")
    return first + "".join(
        parts[name] + rest for name, rest in (piece.split("}}", 1) for piece in others)
    )


def embeddable_json(value: Any) -> str:
    """JSON that no HTML parser can take for the end of its script element."""
    plain = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return plain.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _asset(name: str) -> str:
    return (
        resources.files("lm_eval_coupling.report")
        .joinpath("assets", name)
        .read_text(encoding="utf-8")
    )


def _script() -> str:
    """All of ours as one, in a block of its own, so that its names meet no others."""
    return "\n".join(['"use strict";', "{", *(_asset(f"{name}.js") for name in _SCRIPTS), "}"])


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _plotly() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise CouplingError(
            "got no plotly, which draws the report: pip install 'lm-eval-coupling[analysis]'"
        ) from None
    return get_plotlyjs()
