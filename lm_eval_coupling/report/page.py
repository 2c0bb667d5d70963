"""Saved runs as one self-contained HTML page, which loads nothing else.

Python gathers numbers and texts (:mod:`.data`), the browser shows them (``assets/`` and plotly.js).
Everything that was measured, prompts included, travels as JSON and is shown as text only.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any

from lm_eval_coupling.errors import CouplingError
from lm_eval_coupling.report.data import DOCUMENTS, gather
from lm_eval_coupling.saved.atomic import writing

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
    """Write the page; an earlier page at ``out`` stays as it was if that fails.

    Args:
        paths: folders that lm-eval wrote, searched recursively.
        out: file of the page.
        documents: most measured prompts of each model and task on the page. Their texts and
            matrices make it large: a page of very many tasks holds fewer, and says so.
        mixed: ``refuse`` or ``keep`` runs whose coupling settings differ.
        words: the ``words.csv`` of ``analysis/words.py``, shown with its documents.

    Returns:
        The file.

    Raises:
        CouplingError: if there is no run, plotly is missing, the page cannot be written, or
            ``words`` has none of its documents.
    """
    _plotly()  # fails now if plotly is missing, not after minutes of reading
    html = build_page(gather(paths, documents=documents, mixed=mixed, words=words))
    out = Path(out)
    with writing(out) as temporary:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(html, encoding="utf-8")
    return out


def build_page(data: dict[str, Any]) -> str:
    """Return the HTML of ``data``, as :func:`gather` returns it."""
    scripts = [_plotly(), _script()]
    # Nothing loads, and no script runs but these two: a prompt taken for markup would stay inert.
    policy = (
        f"default-src 'none'; script-src {' '.join(map(_hash, scripts))}; "
        "style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
    parts = {
        "policy": policy,
        "style": _asset("page.css"),
        "data": embeddable_json(data),
        "plotly": scripts[0],
        "script": scripts[1],
    }
    # The template is filled in one pass: a prompt may contain any placeholder.
    first, *others = _asset("page.html").split("{{")
    filled = [first]
    for piece in others:
        name, rest = piece.split("}}", 1)
        filled += [parts[name], rest]
    return "".join(filled)


def embeddable_json(value: Any) -> str:
    """Return JSON in which no HTML parser finds the end of a script element."""
    plain = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return plain.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _asset(name: str) -> str:
    assets = resources.files("lm_eval_coupling.report") / "assets"
    return (assets / name).read_text(encoding="utf-8")


def _script() -> str:
    """Join our scripts in one block, so that its names do not meet plotly's."""
    return "\n".join(['"use strict";', "{", *(_asset(f"{name}.js") for name in _SCRIPTS), "}"])


def _hash(script: str) -> str:
    digest = hashlib.sha256(script.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _plotly() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise CouplingError(
            "got no plotly, which draws the report; pip install 'lm-eval-coupling[analysis]'"
        ) from None
    return get_plotlyjs()
