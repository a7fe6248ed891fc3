"""What can be looked up for the tokens of a layout: position, layer, mask, place in the flat vector."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from functools import cached_property

import torch
from torch import Tensor

from .rows_sane import LayerLayout, fill_tokens

_SMALL_TABLE = 4 << 20  # bytes: tables up to this size are built whole, once, and windows are slices of them
_LARGEST_TABLE = 64 << 20  # bytes: larger tables are not kept


class TokenTables:
    """Base of [`TokenLayout`]: tables with one row per token, built when asked for, whole or for a window."""

    token_size: int
    layers: tuple[LayerLayout, ...]
    shapes: dict[str, tuple[int, ...]]
    tables: dict[str, Tensor]

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole network (T)."""
        return self.layers[-1].token_stop if self.layers else 0

    @property
    def num_weights(self) -> int:
        """Weights among the tokens, which is the length of the flat vector (N)."""
        return self.layers[-1].flat_stop if self.layers else 0

    @cached_property
    def slices(self) -> dict[str, tuple[int, int]]:
        """Start and stop of every tokenised tensor in the flat vector, in its order."""
        found = {}
        for layer in self.layers:
            found[layer.name] = (layer.flat_start, layer.bias_start)
            if layer.bias is not None:
                found[layer.bias] = (layer.bias_start, layer.flat_stop)
        return found

    def window(self, start: int | None = None, length: int | None = None) -> tuple[int, int]:
        """First and one past the last token of a window, which ends at the end of the network.

        Raises:
            `ValueError`: On a start outside of the network or a length below 1.
        """
        first = 0 if start is None else start
        if not 0 <= first < max(self.num_tokens, 1):
            raise ValueError(
                f"start is {start}, but the network has {self.num_tokens} tokens: use 0 to {self.num_tokens - 1}."
            )
        if length is not None and length < min(self.num_tokens, 1):
            raise ValueError(f"length is {length}; a window needs at least 1 token.")
        return first, self.num_tokens if length is None else min(first + length, self.num_tokens)

    def positions(self, start: int | None = None, length: int | None = None) -> Tensor:
        """Positions of the tokens: index in the sequence, layer, row in the layer (chunks of a row share it).

        Returns:
            `Tensor` of shape `(T, 3)`, int64, shared between calls: do not change it in place.
        """

        def build(first: int, last: int) -> Tensor:
            parts = [
                torch.stack([token + layer.token_start, torch.full_like(token, layer.index), token // layer.chunks], 1)
                for layer, token in self._tokens_by_layer(first, last)
            ]
            return torch.cat(parts) if parts else torch.empty(0, 3, dtype=torch.int64)

        return self._table("positions", build, 24 * self.num_tokens, start, length)

    def layer_of_token(self, start: int | None = None, length: int | None = None) -> Tensor:
        """Index of the layer of every token: `Tensor` of shape `(T,)`, int64."""
        return self.positions(start, length)[:, 1]

    def mask(self, start: int | None = None, length: int | None = None) -> Tensor:
        """True where a token holds a weight, false on padding.

        Returns:
            `Tensor` of shape `(T, D)`, bool, shared between calls: do not change it in place.
        """

        def build(first: int, last: int) -> Tensor:
            sizes = []
            for layer, token in self._tokens_by_layer(first, last):
                lead = token % layer.chunks < layer.lead
                sizes.append(torch.where(lead, layer.lead_size, layer.tail_size))
            size = torch.cat(sizes) if sizes else torch.empty(0, dtype=torch.int64)
            return torch.arange(self.token_size) < size[:, None]

        return self._table("mask", build, self.num_tokens * self.token_size, start, length)

    def gather_index(self, start: int | None = None, length: int | None = None) -> Tensor:
        """Index into the flat vector of every entry of the tokens, N on padding.

        Returns:
            `Tensor` of shape `(T, D)`, int64, shared between calls: do not change it in place.
        """

        def build(first: int, last: int) -> Tensor:
            index = torch.empty(1, last - first, self.token_size, dtype=torch.int64)
            layers = self.layers_between(first, last)
            return fill_tokens(index, layers, first, self._flat_positions, padding=self.num_weights)[0]

        return self._table("gather_index", build, 8 * self.num_tokens * self.token_size, start, length)

    def flat_rows(self, name: str, rows: slice | None) -> tuple[int, int, int]:
        """Where some rows of a tensor lie in the flat vector: start, stop, number of rows."""
        start, stop = self.slices[name]
        count = self.shapes[name][0] if self.shapes[name] else 1
        if rows is None:
            return start, stop, count
        size = (stop - start) // count
        return start + rows.start * size, start + rows.stop * size, rows.stop - rows.start

    def _flat_positions(self, name: str, rows: slice | None) -> Tensor:
        """A reader that gives, for every weight, its position in the flat vector."""
        start, stop, _ = self.flat_rows(name, rows)
        return torch.arange(start, stop)[None]

    def _tokens_by_layer(self, start: int, stop: int) -> Iterator[tuple[LayerLayout, Tensor]]:
        for layer in self.layers_between(start, stop):
            first = max(start, layer.token_start) - layer.token_start
            yield layer, torch.arange(first, min(stop, layer.token_stop) - layer.token_start)

    @cached_property
    def _token_stops(self) -> list[int]:
        return [layer.token_stop for layer in self.layers]

    def layers_between(self, start: int, stop: int) -> Iterator[LayerLayout]:
        """The layers that have tokens among `start` to `stop`."""
        for layer in self.layers[bisect_right(self._token_stops, start) :]:
            if layer.token_start >= stop:
                break
            if layer.num_tokens:
                yield layer

    def _table(
        self, name: str, build: Callable[[int, int], Tensor], size: int, start: int | None, length: int | None
    ) -> Tensor:
        first, last = self.window(start, length)
        whole = last - first == self.num_tokens
        if name not in self.tables:
            if size > (_LARGEST_TABLE if whole else _SMALL_TABLE):
                return build(first, last)
            # a table built under inference mode would be of no use in training afterwards
            with torch.inference_mode(False):
                self.tables[name] = build(0, self.num_tokens)
        return self.tables[name] if whole else self.tables[name][first:last]
