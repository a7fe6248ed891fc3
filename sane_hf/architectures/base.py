"""What an architecture declares so that populations, members and symmetry can use it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

Config = Mapping[str, Any] | str | None


@dataclass(frozen=True)
class Architecture:
    """One family of networks: its configuration, its module, what goes in and what comes out.

    Attributes:
        name: the name written into a zoo's `architecture` column.
        config_class: a frozen dataclass of JSON values; its `__post_init__` checks them.
        module: builds the network from an instance of `config_class`. It must be traceable by `torch.fx`.
        input_shape: function of the configuration, shape of one input (channels, height, width).
        num_classes: function of the configuration, number of logits.
    """

    name: str
    config_class: type
    module: Callable[[Any], nn.Module]
    input_shape: Callable[[Any], tuple[int, ...]]
    num_classes: Callable[[Any], int]

    def config(self, config: Config = None) -> Any:
        """Return a checked instance of `config_class`.

        Args:
            config: a mapping of fields, its JSON text (a zoo's `architecture_config` column), an instance of
                `config_class`, or None for the defaults.

        Raises:
            ValueError: an unknown field or a value out of range, naming the architecture and the field.
        """
        if isinstance(config, self.config_class):
            return config
        if isinstance(config, str):
            try:
                config = json.loads(config)
            except json.JSONDecodeError as error:
                raise ValueError(f"architecture {self.name!r}: its configuration is not JSON: {error}") from error
        config = {} if config is None else config
        if not isinstance(config, Mapping):
            raise ValueError(
                f"architecture {self.name!r}: a configuration is a mapping of fields, found {type(config).__name__}"
            )
        known = [field.name for field in dataclasses.fields(self.config_class)]
        unknown = sorted(set(config) - set(known))
        if unknown:
            raise ValueError(f"architecture {self.name!r} has no field {unknown[0]!r}; its fields are {known}")
        try:
            return self.config_class(**config)
        except ValueError as error:
            raise ValueError(f"architecture {self.name!r}: {error}") from error

    def config_json(self, config: Config = None) -> str:
        """Return the checked configuration, all fields spelled out, as JSON text with sorted keys."""
        return json.dumps(dataclasses.asdict(self.config(config)), sort_keys=True)

    def build(self, config: Config = None) -> nn.Module:
        """Return a freshly initialised module of this architecture."""
        return self.module(self.config(config))
