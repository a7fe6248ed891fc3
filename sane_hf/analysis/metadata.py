"""What is known about a checkpoint without its weights: epoch and hyperparameters, as features for a probe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

MOST_CATEGORIES = 12


def metadata_features(columns: Mapping[str, Sequence]) -> np.ndarray:
    """Turn columns of a zoo into features, generously, so that this baseline is as strong as it can be.

    Text, flags and numbers with at most 12 different values become one column per value (a linear probe then learns
    the mean of each epoch); other numbers stay as they are, and positive ones that span more than a factor of ten are
    given by their logarithm too. Constant columns are left out; if all are, one column of zeros is left.

    Args:
        columns: name -> n values (numbers, strings, booleans; None counts as a value of its own).

    Returns:
        (n, F) float64, F at least 1.

    Raises:
        ValueError: if the columns differ in length.

    Example:
        >>> metadata_features({"activation": ["relu", "tanh", "relu"], "seed": [1, 1, 1]}).tolist()
        [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]
    """
    features: list[np.ndarray] = []
    rows = len(next(iter(columns.values()), ()))
    for name, values in columns.items():
        if len(values) != rows:
            raise ValueError(f"column {name!r} has {len(values)} rows where the first has {rows}")
        distinct = sorted(set(values), key=lambda value: (value is None, str(value)))
        numeric = all(isinstance(value, int | float | np.number) for value in distinct)
        if len(distinct) == 1:
            continue
        if not numeric or len(distinct) <= MOST_CATEGORIES:
            index = {value: position for position, value in enumerate(distinct)}
            features.append(np.eye(len(distinct))[[index[value] for value in values]])
            continue
        numbers = np.asarray(values, np.float64)[:, None]
        features.append(numbers)
        if numbers.min() > 0 and numbers.max() > 10 * numbers.min():
            features.append(np.log(numbers))
    return np.concatenate(features, axis=1) if features else np.zeros((rows, 1))
