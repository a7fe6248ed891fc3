"""Bandwidths by rule, relative to the standard deviation of each dimension."""

from __future__ import annotations

from collections.abc import Callable


def scott(num_anchors: int, num_dimensions: int) -> float:
    """Scott's rule: n^(-1/(d+4)).

    Args:
        num_anchors: Number of anchors n.
        num_dimensions: Dimensions d that share a draw: Z for `kde_independent`, T·Z for `kde_shared_anchor`.

    Returns:
        The bandwidth, relative to the standard deviation of each dimension.

    Raises:
        ValueError: A number below 1.

    Example:
        >>> round(scott(20, 1), 3)
        0.549
    """
    _check(num_anchors, num_dimensions)
    return float(num_anchors ** (-1 / (num_dimensions + 4)))


def silverman(num_anchors: int, num_dimensions: int) -> float:
    """Silverman's rule: (n (d+2) / 4)^(-1/(d+4)); arguments and result as in `scott`.

    Example:
        >>> round(silverman(20, 1), 3)
        0.582
    """
    _check(num_anchors, num_dimensions)
    return float((num_anchors * (num_dimensions + 2) / 4) ** (-1 / (num_dimensions + 4)))


def _check(num_anchors: int, num_dimensions: int) -> None:
    if num_anchors < 1 or num_dimensions < 1:
        raise ValueError(
            f"a bandwidth rule needs at least one anchor and one dimension; found {num_anchors} and {num_dimensions}."
        )


BANDWIDTH_RULES: dict[str, Callable[[int, int], float]] = {"scott": scott, "silverman": silverman}
