"""Build docs/measures.md, the reference of all columns, from the registry of measures.

``python -m coupling_analysis.measures_page > docs/measures.md``
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable, Iterator, Sequence

from lm_eval_coupling.errors import CODES
from lm_eval_coupling.measures.registry import (
    OUTCOME,
    PROMPT,
    Column,
    Measure,
    Reading,
    SampleReading,
    default_measures,
    measures_argument,
    registered_measures,
)
from lm_eval_coupling.saved.tables import DOCUMENT, IMAGE, RESPONSE

_SIZES = {
    "rank": "the numbers K asked for (`coupling_ranks`), ascending",
    "max_rank": "the largest K",
    "layer": "blocks, in order of depth; of two layers, the first is the Jacobian's, the second "
    "that of the singular vectors",
    "layer+1": "points of the stream: x^0, the input of the first block, to x^L",
    "seq": "tokens of the prompt",
    "token": "tokens that a measure over tokens compares",
    "chosen": "blocks that a measure over tokens compares",
    "window": "windows of blocks, in order of depth",
    "component": "principal components, at most 3",
    "d_model": "dimensions of the stream",
    "2": "U, then V",
}
_INTRO = """\
# Measures and columns

<!-- Made by `python -m coupling_analysis.measures_page > docs/measures.md`; a test compares. -->

A run writes one Parquet file per task, `coupling_…`, with one row per measured prompt and token.
Untrained twins have files of their own, `untrained_coupling_…`. Every field's metadata repeats its
line from here. Arrays are float32, single numbers float64. `load_records` reads nested lists as
arrays; in Python, what was measured is an attribute of `PromptCoupling`. What was not measured is
null, what is undefined is NaN, and `reason` says why.

Chance is the expected value for unrelated blocks, whose A is a Gaussian matrix. It is exact for
each reading.

Notation: x^l is the residual stream after block l, f^l = x^l − x^{l−1} is what block l adds, and
J^l = ∂f^l/∂x^{l−1} at the measured token. J = U S Vᵀ has the K largest singular triplets, and
A = U_{l'}ᵀ J^l V_{l'}.
"""


# A test runs these recipes.
_RECIPES = """\
## Read without this package

Each recipe reads one document's matrices, `[rank, layer, layer]`; `FILE` is a table of the run.

```python
# pandas
column = pandas.read_parquet(FILE)["normalized_miscoupling"]
m = numpy.stack([numpy.stack(of_rank) for of_rank in column[0]])
```

```python
# polars
column = polars.read_parquet(FILE)["normalized_miscoupling"]
m = numpy.array(column[0].to_list())
```

```python
# duckdb; within SQL, normalized_miscoupling[1][2][3] counts from 1
rows = duckdb.sql(f"SELECT normalized_miscoupling FROM '{FILE}'").fetchall()
m = numpy.array(rows[0][0])
```

```r
# R; its first two dimensions are the layers, the last the rank
column <- arrow::read_parquet(FILE)$normalized_miscoupling
m <- simplify2array(lapply(column[[1]], function(of_rank) do.call(rbind, as.list(of_rank))))
```
"""


def build_page() -> str:
    """Return the page as Markdown."""
    return "\n".join(
        [
            _INTRO,
            *_overview(),
            *_common(),
            *(line for m in registered_measures().values() for line in _measure(m)),
            *_codes(),
            _RECIPES,
        ]
    )


def _overview() -> Iterator[str]:
    yield "## What can be asked for\n"
    rows = [
        (
            f"`{m.name}`",
            "yes" if m.default else "",
            str(m.version),
            ", ".join(f"`{s}`" for s in ("dtype", *m.settings)),
            m.doc,
        )
        for m in registered_measures().values()
    ]
    yield from _table(("measure", "default", "version", "depends on", "what it says"), rows)
    yield (
        f"The default is `{measures_argument([])}`. The order does not matter, and what is in the "
        "store is not measured again.\n"
    )


def _common() -> Iterator[str]:
    yield "## Columns of every table\n"
    yield from _columns((*DOCUMENT, *PROMPT, *OUTCOME))
    yield "Rows at a token of a response or continuation have in addition:\n"
    yield from _columns(RESPONSE)
    yield "Tables of images (`lm-eval-coupling vision`) have in addition:\n"
    yield from _columns(IMAGE)
    yield "Sizes:\n"
    yield from _table(("size", "of what"), [(f"`{name}`", what) for name, what in _SIZES.items()])


def _measure(measure: Measure) -> Iterator[str]:
    yield f"## `{measure.name}`\n"
    others = [] if measure.name in default_measures() else [measure.name]
    arguments = ",".join(filter(None, (measures_argument(others), measure.option)))
    yield f"{measure.doc} Asked for with `{arguments}`.\n"
    yield from _columns(measure.columns)
    if rows := [*map(_reading, measure.readings), *map(_of_sample, measure.sample_readings)]:
        yield "Readings, as they are summarized, fitted and drawn:\n"
        head = (
            *("reading", "label", "one for", "expected with the score", "at chance"),
            "what it tells",
        )
        yield from _table(head, rows)


def _reading(reading: Reading) -> Sequence[str]:
    has_rank = reading.of_rank and reading.over == "prompt"
    name = f"`{reading.name}@K`" if has_rank else f"`{reading.name}`"
    sign = {1: "up", -1: "down", 0: "–"}[reading.sign]
    chance = "–" if reading.chance is None else f"{reading.chance(10):.4f} at K = 10"
    tells = reading.doc or f"see the column `{reading.column}`"
    return name, reading.label, reading.over, sign, chance, tells


def _of_sample(reading: SampleReading) -> Sequence[str]:
    sign = {1: "up", -1: "down", 0: "–"}[reading.sign]
    return f"`{reading.name}`", reading.label, "task", sign, "–", reading.doc


def _columns(columns: Iterable[Column]) -> Iterator[str]:
    rows = [
        (
            f"`{c.name}`",
            f"`[{', '.join(c.dimensions)}]`" if c.shape else c.kind,
            c.doc + (f" (`{c.option}`)" if c.option else ""),
        )
        for c in columns
    ]
    yield from _table(("column", "shape", "what it is"), rows)


def _codes() -> Iterator[str]:
    yield "## Reasons\n"
    rows = [
        (f"`{code}`", what, "yes" if settled else "no") for code, (what, settled) in CODES.items()
    ]
    yield from _table(("code", "meaning", "kept in the store"), rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"| {' | '.join('---' for _ in head)} |"
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"
    yield ""


if __name__ == "__main__":
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")
    print(build_page(), end="")
