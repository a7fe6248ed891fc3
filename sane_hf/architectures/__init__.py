"""The networks that zoos are made of, each declared once: configuration, module, input shape, classes.

To add one: write a file beside `cnn_small.py` and a line in `ARCHITECTURES`; tests/architectures and tests/members
run their shared contract over every entry of the table.
"""

from __future__ import annotations

from torch import nn

from .base import Architecture, Config
from .cnn_small import CNN_SMALL

ARCHITECTURES: dict[str, Architecture] = {
    CNN_SMALL.name: CNN_SMALL,
}


def get_architecture(name: str) -> Architecture:
    """Return the architecture called `name`.

    Raises:
        ValueError: no such architecture; the message lists those known.
    """
    try:
        return ARCHITECTURES[name]
    except KeyError:
        raise ValueError(f"architecture {name!r} is unknown; known are {sorted(ARCHITECTURES)}") from None


def build(name: str, config: Config = None) -> nn.Module:
    """Build a freshly initialised network.

    Args:
        name: a key of `ARCHITECTURES`.
        config: fields of its configuration as a mapping or JSON text (a zoo's `architecture_config` column).

    Returns:
        The module, in training mode, initialised as PyTorch does.

    Raises:
        ValueError: unknown architecture, unknown field, or a value out of range.

    Example:
        >>> build("cnn_small", {"activation": "relu"}).fc2
        Linear(in_features=20, out_features=10, bias=True)
    """
    return get_architecture(name).build(config)


__all__ = ["ARCHITECTURES", "Architecture", "Config", "build", "get_architecture"]
