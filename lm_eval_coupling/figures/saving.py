"""Pictures on disk, as PNG and SVG."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.text import Text

from lm_eval_coupling.saved.atomic import writing


def save_figure(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write a picture as ``name.png`` and ``name.svg``, laid out once for both.

    Returns:
        The two files.

    Raises:
        CouplingError: if one of them cannot be written.
    """
    # LaTeX may be missing, and names of models are no LaTeX.
    for text in figure.findobj(Text):
        text.set_usetex(False)
    files = [folder / f"{name}.{suffix}" for suffix in ("png", "svg")]
    with matplotlib.rc_context({"text.usetex": False}):  # ticks are made when the picture is drawn
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        for file in files:
            with writing(file) as temporary:
                figure.savefig(temporary)
    return files
