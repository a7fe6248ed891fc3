"""The small CNN of the SANE papers' zoos, sized for 8x8 images: three convolutions, two dense layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .base import Architecture

ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU}


@dataclass(frozen=True)
class CnnSmallConfig:
    """Fields of `cnn_small`: the activation, and the dropout rate before each dense layer while training."""

    activation: str = "tanh"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation {self.activation!r} is unknown; known are {sorted(ACTIVATIONS)}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be at least 0 and below 1, found {self.dropout}")


class CnnSmall(nn.Module):
    """1x8x8 images to 10 logits with 1,568 weights.

    Example:
        >>> network = CnnSmall(CnnSmallConfig(activation="relu"))
        >>> network(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
        >>> sum(tensor.numel() for tensor in network.state_dict().values())
        1568
    """

    def __init__(self, config: CnnSmallConfig) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, kernel_size=3)  # 8x8 -> 6x6
        self.conv2 = nn.Conv2d(8, 6, kernel_size=3)  # 6x6 -> 4x4
        self.conv3 = nn.Conv2d(6, 4, kernel_size=2)  # 4x4 -> 3x3
        self.fc1 = nn.Linear(36, 20)
        self.fc2 = nn.Linear(20, 10)
        self.activation = ACTIVATIONS[config.activation]()
        self.dropout1 = nn.Dropout(config.dropout)
        self.dropout2 = nn.Dropout(config.dropout)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (batch, 1, 8, 8) to logits (batch, 10)."""
        hidden = self.activation(self.conv1(images))
        hidden = self.activation(self.conv2(hidden))
        hidden = self.activation(self.conv3(hidden))
        hidden = self.dropout1(torch.flatten(hidden, 1))
        hidden = self.dropout2(self.activation(self.fc1(hidden)))
        return self.fc2(hidden)


CNN_SMALL = Architecture(
    name="cnn_small",
    config_class=CnnSmallConfig,
    module=CnnSmall,
    input_shape=lambda config: (1, 8, 8),
    num_classes=lambda config: 10,
)
