"""How figures of a report look: sizes, a colour-blind safe palette (Okabe and Ito), and saving."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  (the backend is chosen before pyplot loads one)

BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GREY = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
    "#6F6F6F",
)
PALETTE = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GREY)
COLORMAP = "viridis"
PANEL = (4.2, 3.4)  # inches, one panel

SETTINGS: dict[Any, Any] = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 11,
    "axes.labelsize": 10,
    "font.size": 10,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "savefig.dpi": 150,
}


@contextmanager
def panels(path: Path, columns: int = 1, rows: int = 1, width: float = 1.0, title: str = "") -> Iterator[list]:
    """Open a figure of `rows` x `columns` panels; on leaving, lay it out, save it to `path` and close it.

    Args:
        path: the PNG file to write.
        columns: panels side by side.
        rows: panels above each other.
        width: of one panel, in standard panels.
        title: a line above all panels.

    Yields:
        The axes, row by row.
    """
    with plt.rc_context(SETTINGS):
        figure, axes = plt.subplots(
            rows, columns, figsize=(PANEL[0] * width * columns, PANEL[1] * rows), squeeze=False, layout="constrained"
        )
        if title:
            figure.suptitle(title, fontsize=12)
        try:
            yield list(axes.flat)
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path)
        finally:
            plt.close(figure)
