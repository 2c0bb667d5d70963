"""Saved runs with hostile texts for the report, and what a test reads off its page."""

import base64
import json
from html.parser import HTMLParser

import numpy as np
from saved_runs import record

NASTY = (
    "</script><script>window.pwned=1</script><!--<img src=x onerror='window.pwned=2'> "
    '"quoted" {{script}} & &amp; \\u003c '
    "\u2028 \u202eright-to-left\u202c 漢字 🙂 \x00"
)
BAD_MODEL = "org/<b>bold</b><img src=x onerror=window.pwned=3>%{x}"
RECORDS = {
    "arc": [record("arc", i, p) for i in range(3) for p in range(2)],
    "gsm": [record("gsm", i, seed=1) for i in range(2)],
}


def packed(text, layers):
    """Independent inverse of pack()."""
    whole = np.frombuffer(base64.b64decode(text), dtype="<u2").astype(float).reshape(layers, layers)
    return np.where(whole == 65535, np.nan, whole / 10000)


def nasty_arguments():
    return {f"gen_args_{i}": {"arg_0": "Why?", "arg_1": f" {i}{NASTY}"} for i in range(2)}


def row_of(data, model, task):
    (row,) = [row for row in data["rows"] if (row["model"], row["task"]) == (model, task)]
    return row


class Tags(HTMLParser):
    def __init__(self, html):
        super().__init__()
        self.tags, self.inside, self.content = [], None, {}
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.inside = len(self.tags) if tag in ("script", "style") else None

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside:
            self.content[self.inside] = self.content.get(self.inside, "") + data


def table(window, holder):
    """Texts of a table's cells, row by row."""
    return window.run(
        f"[...document.querySelectorAll('#{holder} tbody tr')]"
        ".map(tr => [...tr.cells].map(cell => cell.innerText.trim()))"
    )


def headers(window, holder):
    return window.run(
        f"[...document.querySelectorAll('#{holder} thead th button')]"
        ".map(button => button.dataset.name)"
    )


def column(window, holder, name):
    return [row[headers(window, holder).index(name)] for row in table(window, holder)]


def set_value(window, selector, value, event="change"):
    window.run(
        f"(() => {{ const e = document.querySelector('{selector}'); e.value = {json.dumps(value)};"
        f"e.dispatchEvent(new Event('{event}', {{bubbles: true}})); }})()"
    )


def open_row(window, model, task):
    set_value(window, "#level", "all")
    index = table(window, "rows").index(
        next(r for r in table(window, "rows") if r[0].endswith(model) and r[1] == task)
    )
    window.click(f"#rows tbody tr:nth-child({index + 1}) button")
    window.until("!document.querySelector('#layers').hidden")
