"""Log-log pictures of saved benchmarks, beside their JSON files.

    python tests/benchmarks/plot.py [FILE.json …]

Draws what `against_release.py` and `growth.py` wrote: seconds of a prompt over its tokens beside
the release's procedure, and seconds by stage over each size.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from machine import RESULTS  # noqa: E402
from matplotlib import pyplot as plt  # noqa: E402

COLOURS = {
    "forward": "#8c8c8c",
    "certificate": "#56b4e9",
    "jacobians": "#d55e00",
    "spectra": "#009e73",
    "pairs": "#cc79a7",
    "total": "#000000",
}
AXES = {
    "tokens": "tokens of the prompt",
    "d_model": "d_model",
    "layers": "layers",
    "prompts": "prompts",
}


def against_release(found: dict, figure) -> None:
    """Seconds of one prompt over its tokens."""
    axes = figure.subplots()
    rows = sorted(found["results"], key=lambda row: row["tokens"])
    tokens = [row["tokens"] for row in rows]
    differentiated, layers = len(rows[0]["layers_differentiated_by_baseline"]), rows[0]["layers"]
    part = (
        f"\n(from {differentiated} of {layers} layers)" if rows[0]["jacobians_extrapolated"] else ""
    )
    together = [row["ours"][-1] for row in rows]
    theirs, ours = (
        [row["release"]["total"] for row in rows],
        [we["seconds"]["total"] for we in together],
    )
    axes.plot(tokens, theirs, "o-", color="#d55e00", label=f"release's procedure{part}")
    axes.plot(
        tokens,
        ours,
        "o-",
        color="#0072b2",
        label=f"this package, {together[0]['together']} prompts at a time",
    )
    for at, their, we, ratio in zip(
        tokens, theirs, ours, (we["ratio"]["total"] for we in together), strict=True
    ):
        axes.plot([at] * 2, [we, their], ":", color="#8c8c8c")
        side = "right" if at == tokens[-1] else "left"  # inside the axes
        axes.annotate(f" {ratio:.0f}× ", (at, (their * we) ** 0.5), va="center", ha=side)
    _finish(axes, AXES["tokens"], tokens)
    axes.set_ylabel("seconds a prompt")
    axes.legend(frameon=False)


def growth(found: dict, figure) -> None:
    """Seconds by stage over each size."""
    grid = figure.subplots(1, len(AXES), sharey=True)
    for axes, (name, label) in zip(grid, AXES.items(), strict=True):
        rows = found["results"][name]["rows"]
        sizes = [row["size"] for row in rows]
        for stage, colour in COLOURS.items():
            axes.plot(
                sizes,
                [row[stage] or float("nan") for row in rows],
                "o-",
                ms=3,
                color=colour,
                label=stage,
            )
        _finish(axes, label, sizes)
    grid[0].set_ylabel("seconds")
    grid[-1].legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))


DRAWINGS = {"against_release": (against_release, (5, 4)), "growth": (growth, (13, 3.6))}


def _finish(axes, label: str, sizes: list[int]) -> None:
    axes.set(xscale="log", yscale="log", xlabel=label)
    axes.set_xticks(sizes, [str(size) for size in sizes], rotation=45 if len(sizes) > 4 else 0)
    axes.xaxis.minorticks_off()
    axes.grid(alpha=0.3)


def draw(path: Path) -> Path | None:
    """The picture of one JSON file, or None if there is none to draw."""
    found = json.loads(path.read_text())
    if found.get("benchmark") not in DRAWINGS:
        return None
    drawing, size = DRAWINGS[found["benchmark"]]
    figure = plt.figure(figsize=size, layout="constrained")
    drawing(found, figure)
    about = found["machine"]
    figure.suptitle(
        f"{about['processor']}, {about['threads']} threads, {about['device']}, {about['dtype']}",
        fontsize=9,
    )
    figure.savefig(path.with_suffix(".png"), dpi=150)
    plt.close(figure)
    return path.with_suffix(".png")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "files", nargs="*", type=Path, help="default all in tests/benchmarks/results"
    )
    options = parser.parse_args(arguments)
    for path in options.files or sorted(RESULTS.glob("*.json")):
        if (picture := draw(path)) is not None:
            print(picture)


if __name__ == "__main__":
    main()
