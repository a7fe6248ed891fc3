"""What differs between the networks of a population: hyperparameters and initial weights, all from one seed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sane_hf.architectures import build

INITIALIZATIONS = ("uniform", "normal", "xavier_uniform", "xavier_normal", "kaiming_uniform", "kaiming_normal")
ACTIVATIONS = ("tanh", "relu")
LEARNING_RATES = (2e-4, 1e-2)  # log-uniform between
DROPOUTS = (0.0, 0.1, 0.3, 0.5)
WEIGHT_DECAYS = (0.0, 1e-4, 1e-3, 1e-2)
_NARROW = 0.1  # standard deviation of "uniform" and "normal"


@dataclass(frozen=True)
class Hyperparameters:
    """How one network of a population is made; `seed` governs its initial weights, data order and dropout."""

    activation: str = "tanh"
    initialization: str = "kaiming_uniform"
    learning_rate: float = 1e-3
    dropout: float = 0.0
    weight_decay: float = 0.0
    seed: int = 0

    def config(self) -> dict[str, Any]:
        """Return the part that belongs to the architecture's configuration."""
        return {"activation": self.activation, "dropout": self.dropout}


def draw_hyperparameters(index: int, seed: int, fixed: bool = False) -> Hyperparameters:
    """Draw the hyperparameters of network `index` of the population of seed `seed`, each independently.

    A network's draw does not depend on how many others there are.

    Args:
        index: of the network, from 0.
        seed: of the population.
        fixed: vary the network's seed only.

    Returns:
        Activation and initialisation uniformly, learning rate log-uniformly from 2e-4 to 1e-2, dropout and weight
        decay (L2) from four values each.

    Example:
        >>> draw_hyperparameters(3, seed=0) == draw_hyperparameters(3, seed=0) != draw_hyperparameters(4, seed=0)
        True
        >>> draw_hyperparameters(3, seed=0, fixed=True).learning_rate
        0.001
    """
    stream = np.random.default_rng([seed, index])
    own = int(stream.integers(2**31))
    if fixed:
        return Hyperparameters(seed=own)
    low, high = (math.log(bound) for bound in LEARNING_RATES)
    return Hyperparameters(
        activation=str(stream.choice(ACTIVATIONS)),
        initialization=str(stream.choice(INITIALIZATIONS)),
        learning_rate=math.exp(stream.uniform(low, high)),
        dropout=float(stream.choice(DROPOUTS)),
        weight_decay=float(stream.choice(WEIGHT_DECAYS)),
        seed=own,
    )


def initialize(architecture: str, config: dict[str, Any], initialization: str, seed: int) -> dict[str, Tensor]:
    """Make the weights a network starts from.

    Args:
        architecture: its name.
        config: its configuration; the gain of xavier and kaiming follows its `activation`.
        initialization: one of `INITIALIZATIONS`: "uniform" and "normal" have mean 0 and standard deviation 0.1,
            the others are PyTorch's. Biases are PyTorch's, U(±1/sqrt(fan in)).
        seed: the same seed gives the same weights; the global random state is left alone.

    Returns:
        A state dict.

    Raises:
        ValueError: an unknown initialisation, or as `sane_hf.architectures.build`.
    """
    if initialization not in INITIALIZATIONS:
        raise ValueError(f"initialization {initialization!r} is unknown; known are {list(INITIALIZATIONS)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        state_dict = build(architecture, config).state_dict()
        activation: Any = config.get("activation", "relu")
        gain = nn.init.calculate_gain(activation)
        for tensor in state_dict.values():
            if tensor.ndim < 2:
                continue
            if initialization == "uniform":
                nn.init.uniform_(tensor, -_NARROW * 3**0.5, _NARROW * 3**0.5)
            elif initialization == "normal":
                nn.init.normal_(tensor, 0.0, _NARROW)
            elif initialization == "xavier_uniform":
                nn.init.xavier_uniform_(tensor, gain)
            elif initialization == "xavier_normal":
                nn.init.xavier_normal_(tensor, gain)
            elif initialization == "kaiming_uniform":
                nn.init.kaiming_uniform_(tensor, nonlinearity=activation)
            else:
                nn.init.kaiming_normal_(tensor, nonlinearity=activation)
    return {name: tensor.detach() for name, tensor in state_dict.items()}
