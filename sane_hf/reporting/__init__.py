"""Reports of training runs: figures, plots, a page, a card. The last room, imported by the command line alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def report(run_dir: str | Path, zoo: str | None = None, seed: int = 0, quick: bool = False) -> dict[str, Any]:
    """Evaluate a training run and write its report; see `sane_hf.reporting.run.report`."""
    from sane_hf.reporting.run import report as run_report  # matplotlib and scikit-learn are extras

    return run_report(run_dir, zoo, seed, quick)


__all__ = ["report"]
