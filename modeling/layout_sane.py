"""The token layout of an architecture: which weight lies in which token, planned once from names and shapes.

A layer of the layout is one weight-like tensor, with its bias as the last column where it has one. A row is one output
channel, flattened (SANE, Schürholt et al., ICML 2024, section 3.1); rows are cut into tokens of `token_size` weights
and zero-padded. The flat vector of a network is all its tokenised tensors, row-major, one after the other.

Nothing here loops over rows: a layer is at most three rectangles of tokens (a begun row, whole rows, a begun row), and
each is filled by a handful of strided copies.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from .rows_sane import (
    Entries,
    LayerLayout,
    Reader,
    describe,
    fill_tokens,
    fingerprint,
    is_shape,
    layer_rows,
    plan_layers,
    readable,
    zeros,
)
from .tables_sane import TokenTables

_SMALL_NETWORK = 1 << 18  # weights: networks up to this size are stacked over the batch, larger ones are copied singly


@dataclass(frozen=True, eq=False)
class TokenLayout(TokenTables):
    """Where every weight of an architecture lies among its tokens. Make one with [`TokenLayout.plan`].

    Args:
        token_size (`int`): Weights per token (D).
        rows (`str`): `"cut"`: rows are cut at `token_size`, the last chunk is zero-padded (the paper). `"equal"`: rows
            are cut into the least number of chunks whose sizes differ by at most one, each zero-padded.
        ignore_norm (`bool`): Whether normalisation layers are left out and copied from the reference.
        layers (`tuple[LayerLayout, ...]`): The tokenised layers in order.
        copied (`tuple[str, ...]`): Names of the tensors that are no tokens: integer and boolean ones, ignored ones.
        shapes (`dict[str, tuple[int, ...]]`): Shape of every tensor, copied ones too, in the order of the state dict.
        floating (`frozenset[str]`): Names of the floating tensors.

    Example:

    A Linear layer of two outputs and three inputs, with bias, in tokens of four weights:

    ```python
    >>> import torch
    >>> from sane_hf.modeling import TokenLayout, tokens_from_flat
    >>> layer = {"weight": torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), "bias": torch.tensor([7.0, 8.0])}
    >>> layout = TokenLayout.plan(layer, token_size=4)
    >>> layout.flatten(layer)
    tensor([1., 2., 3., 4., 5., 6., 7., 8.])
    >>> tokens_from_flat(layout.flatten(layer)[None], layout)
    tensor([[[1., 2., 3., 7.],
             [4., 5., 6., 8.]]])
    >>> layout.gather_index()
    tensor([[0, 1, 2, 6],
            [3, 4, 5, 7]])
    >>> TokenLayout.plan(layer, token_size=3).mask()
    tensor([[ True,  True,  True],
            [ True, False, False],
            [ True,  True,  True],
            [ True, False, False]])
    >>> TokenLayout.plan(layer, token_size=3, rows="equal").gather_index()
    tensor([[0, 1, 8],
            [2, 6, 8],
            [3, 4, 8],
            [5, 7, 8]])

    ```
    """

    token_size: int
    rows: str
    ignore_norm: bool
    layers: tuple[LayerLayout, ...]
    copied: tuple[str, ...]
    shapes: dict[str, tuple[int, ...]]
    floating: frozenset[str]
    tables: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def plan(
        cls,
        shapes: Mapping[str, Tensor | Sequence[int]],
        token_size: int,
        rows: str = "cut",
        ignore_norm: bool = False,
        order: Sequence[str] | None = None,
    ) -> TokenLayout:
        """Plan the layout of an architecture.

        A tensor whose last name part contains "weight" takes the vector of the same name with "bias" as its last
        column if that has one entry per row. Every other floating tensor is a layer of its own: scalars are one row of
        one weight, vectors one row per entry. No weight's value is read.

        Args:
            shapes (`Mapping[str, Tensor | Sequence[int]]`): A state dict, or a shape for each name (then floating).
            token_size (`int`): Weights per token; 0 takes the widest row.
            rows (`str`): `"cut"` or `"equal"`, see the class.
            ignore_norm (`bool`): Leave out normalisation layers, told by structure: modules with `running_mean` or
                `running_var`, or with a one-dimensional `weight`.
            order (`Sequence[str]`, *optional*): The names in the order to use, if not that of `shapes`.

        Returns:
            `TokenLayout`: The layout.

        Raises:
            `ValueError`: On a complex, float8, quantised or sparse tensor, on a value that is no tensor, on an `order`
                that names other tensors, on a token size below 0, and where there is nothing to tokenise.
        """
        entries = {
            name: (tuple(value), True) if is_shape(value) else describe(name, value) for name, value in shapes.items()
        }
        if order is not None:
            if len(order) != len(entries) or set(order) != set(entries):
                odd = sorted(set(order) ^ set(entries)) or sorted(name for name in set(order) if order.count(name) > 1)
                raise ValueError(
                    f"order must name each of the {len(entries)} tensors once; it differs at {odd[0]!r}"
                    f"{f' and {len(odd) - 1} more' if len(odd) > 1 else ''}."
                )
            entries = {name: entries[name] for name in order}
        return cls._plan(entries, token_size, rows, ignore_norm)

    @classmethod
    def _plan(cls, entries: Entries, token_size: int, rows: str, ignore_norm: bool) -> TokenLayout:
        layers = plan_layers(entries, token_size, rows, ignore_norm)
        tokenised = {name for layer in layers for name in (layer.name, layer.bias)}
        return cls(
            token_size or max((layer.width for layer in layers if layer.rows), default=0) or 1,
            rows,
            ignore_norm,
            layers,
            copied=tuple(name for name in entries if name not in tokenised),
            shapes={name: shape for name, (shape, _) in entries.items()},
            floating=frozenset(name for name, (_, floating) in entries.items() if floating),
        )

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of the tokenised tensors in the order of the flat vector."""
        return tuple(self.slices)

    @cached_property
    def fingerprint(self) -> str:
        """Names the architecture: a hash of all names, shapes and which are floating, whatever their order."""
        return fingerprint({name: (shape, name in self.floating) for name, shape in self.shapes.items()})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TokenLayout) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash((self.fingerprint, self.token_size, self.rows, self.ignore_norm))

    def __reduce__(self):
        # the tables are cheap to make again, and need not travel to worker processes
        return TokenLayout.from_dict, (self.to_dict(),)

    def to_dict(self) -> dict:
        """The layout as plain JSON data. [`TokenLayout.from_dict`] plans it again from the names and shapes."""
        return {
            "version": 1,
            "token_size": self.token_size,
            "rows": self.rows,
            "ignore_norm": self.ignore_norm,
            "tensors": [[name, list(shape), name in self.floating] for name, shape in self.shapes.items()],
        }

    @classmethod
    def from_dict(cls, data: Mapping) -> TokenLayout:
        """Inverse of [`TokenLayout.to_dict`].

        Raises:
            `ValueError`: On a version that this code does not know.
        """
        if data.get("version") != 1:
            raise ValueError(
                f"Token layout of version {data.get('version')!r}; this code reads version 1: upgrade it."
            )
        entries = {name: (tuple(shape), bool(floating)) for name, shape, floating in data["tensors"]}
        return cls._plan(entries, data["token_size"], data["rows"], data["ignore_norm"])

    def resized(self, token_size: int) -> TokenLayout:
        """The layout of the same architecture at another token size; 0 takes the widest row."""
        return TokenLayout.from_dict({**self.to_dict(), "token_size": token_size})

    def flatten(self, state_dict: Mapping[str, Tensor]) -> Tensor:
        """All tokenised tensors as one vector.

        Args:
            state_dict (`Mapping[str, Tensor]`): Tensors of this architecture, in any order, of any strides.

        Returns:
            `Tensor` of shape `(N,)`: float64 if any of them is, else float32, so that every value is exact.

        Raises:
            `ValueError`: On a tensor that is missing, unexpected, of another shape, sparse, or on the meta device.
        """
        return self.flatten_many([state_dict])[0]

    def flatten_many(self, state_dicts: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """[`TokenLayout.flatten`] for a batch: `Tensor` of shape `(B, N)`."""
        for state_dict in state_dicts:
            self.check(state_dict)
        first = state_dicts[0][self.keys[0]] if state_dicts else torch.empty(0)
        flat = zeros((len(state_dicts), self.num_weights), self.token_dtype(*state_dicts), first.device)
        for part, read in self._readers(flat, state_dicts):
            for name, (start, stop) in self.slices.items():
                tensor = read(name, None)
                part[:, start:stop].view(tensor.shape).copy_(tensor)
        return flat

    def unflatten(
        self, flat: Tensor, reference: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """The tensors of a flat vector, in the order of the state dict. Differentiable.

        Args:
            flat (`Tensor` of shape `(N,)` or `(B, N)`): Flat vectors.
            reference (`Mapping[str, Tensor]`, *optional*): Gives the dtypes, and copies of the tensors that are no
                tokens. Without it all dtypes are that of `flat`, and only tokenised tensors are returned.

        Returns:
            `dict[str, Tensor]` for one vector, else a list of them. Tensors are views of `flat` if the dtype allows.

        Raises:
            `ValueError`: If the length is not N, or the reference is of another architecture.
        """
        if flat.shape[-1:] != (self.num_weights,) or flat.ndim not in (1, 2):
            raise ValueError(
                f"flat has shape {tuple(flat.shape)}; this layout needs (N,) or (B, N), N {self.num_weights}."
            )
        if reference is not None:
            self.check(reference)
        if flat.ndim == 2:
            return [self._unflatten(row, reference) for row in flat.unbind(0)]
        return self._unflatten(flat, reference)

    def _unflatten(self, flat: Tensor, reference: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        tensors = {}
        for name, shape in self.shapes.items():
            if name in self.slices:
                start, stop = self.slices[name]
                tensor = flat[start:stop].view(shape)
                tensors[name] = tensor if reference is None else tensor.to(reference[name].dtype)
            elif reference is not None:
                tensors[name] = reference[name].detach().clone()
        return tensors

    def check(self, state_dict: Mapping[str, Tensor]) -> None:
        """Raise a `ValueError` naming the first tensor that does not fit this architecture."""
        fault = self.mismatch({name: describe(name, tensor) for name, tensor in state_dict.items()})
        if fault is not None:
            raise ValueError(fault)

    def mismatch(self, entries: Entries) -> str | None:
        """What does not fit this architecture, naming the tensor: a missing one first; `None` if all fits.

        Args:
            entries (`dict[str, tuple[tuple[int, ...], bool]]`): Shape of each tensor and whether it is floating.
        """
        for name, shape in self.shapes.items():
            kind = "floating" if name in self.floating else "integer or boolean"
            if name not in entries:
                return f"Tensor {name!r} is missing: a {kind} one of shape {shape} is expected."
            found, floating = entries[name]
            if found != shape or floating != (name in self.floating):
                is_kind = "floating" if floating else "integer or boolean"
                return f"Tensor {name!r} is {is_kind} of shape {found}; a {kind} one of shape {shape} is expected."
        for name, (shape, _) in entries.items():
            if name not in self.shapes:
                return f"Tensor {name!r} of shape {shape} is unexpected."
        return None

    def token_dtype(self, *state_dicts: Mapping[str, Tensor]) -> torch.dtype:
        """The dtype that holds every tokenised value exactly: float64 if any tensor is, else float32."""
        double = any(state_dict[name].dtype == torch.float64 for state_dict in state_dicts for name in self.keys)
        return torch.float64 if double else torch.float32

    def read_tokens(
        self,
        state_dicts: Sequence[Mapping[str, Tensor]],
        start: int | None = None,
        length: int | None = None,
        dtype: torch.dtype | None = None,
        shift_and_scale: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Tokens of networks that are known to have this layout. A window reads only the rows that it covers.

        Args:
            state_dicts (`Sequence[Mapping[str, Tensor]]`): B networks.
            start (`int`, *optional*): First token of the window, 0 if not given.
            length (`int`, *optional*): Most tokens of the window; all if not given.
            dtype (`torch.dtype`, *optional*): float32 or float64; that of [`TokenLayout.flatten`] if not given.
            shift_and_scale (`Tensor` of shape `(2, layers)`, *optional*): What to subtract from the weights of each
                layer, and what to divide them by then.

        Returns:
            `tuple[Tensor, Tensor]`: The tokens, of shape `(B, T, D)`, 0 on padding; and the sum of all weights read,
            which is not finite if one of them is not.
        """
        first, last = self.window(start, length)
        shape = (len(state_dicts), last - first, self.token_size)
        tokens = zeros(shape, dtype or self.token_dtype(*state_dicts), state_dicts[0][self.keys[0]].device)
        total = tokens.new_zeros(())
        for part, read in self._readers(tokens, state_dicts):

            def read_and_add(name: str, rows: slice | None, read: Reader = read) -> Tensor:
                found = read(name, rows)
                total.add_(found.sum(dtype=total.dtype))  # here, because the copy that follows finds it in the cache
                return found

            fill_tokens(part, self.layers_between(first, last), first, read_and_add, None, shift_and_scale)
        return tokens, total

    def _readers(self, out: Tensor, state_dicts: Sequence[Mapping[str, Tensor]]) -> Iterator[tuple[Tensor, Reader]]:
        """Parts of the batch `out`, each with a function that reads a tensor, or some rows of it, for that part."""
        # Small tensors cost their Python call, so they are read for the whole batch at once; large ones their bytes.
        single = len(state_dicts) == 1 or self.num_weights > _SMALL_NETWORK
        groups = [[state_dict] for state_dict in state_dicts] if single else [state_dicts]
        for number, group in enumerate(groups):

            def read(name: str, rows: slice | None, group: Sequence[Mapping[str, Tensor]] = group) -> Tensor:
                found = [readable(name, state_dict[name]) for state_dict in group]
                if rows is not None:
                    found = [tensor[rows] if tensor.ndim else tensor for tensor in found]
                return found[0][None] if len(found) == 1 else torch.stack(found)

            yield out[number : number + len(group)], read


def tokens_from_flat(flat: Tensor, layout: TokenLayout, start: int | None = None, length: int | None = None) -> Tensor:
    """Tokens of flat vectors. Differentiable.

    Args:
        flat (`Tensor` of shape `(B, N)`): Flat vectors, see [`TokenLayout.flatten_many`].
        layout (`TokenLayout`): Their layout.
        start (`int`, *optional*): First token of the window, 0 if not given.
        length (`int`, *optional*): Tokens of the window, which ends at the end of the network; all if not given.

    Returns:
        `Tensor` of shape `(B, T, D)` and the dtype of `flat`, 0 on padding.

    Raises:
        `ValueError`: If the shape of `flat` is not `(B, N)`, or the window lies outside of the network.
    """
    if flat.ndim != 2 or flat.shape[1] != layout.num_weights:
        raise ValueError(f"flat has shape {tuple(flat.shape)}; this layout needs (B, N) with N {layout.num_weights}.")
    first, last = layout.window(start, length)

    def read(name: str, rows: slice | None) -> Tensor:
        begin, end, _ = layout.flat_rows(name, rows)
        return flat[:, begin:end]

    tokens = flat.new_empty(len(flat), last - first, layout.token_size)
    return fill_tokens(tokens, layout.layers_between(first, last), first, read)


def flat_from_tokens(tokens: Tensor, layout: TokenLayout) -> Tensor:
    """Flat vectors of the tokens of whole networks, the inverse of [`tokens_from_flat`]. Differentiable.

    Args:
        tokens (`Tensor` of shape `(B, T, D)`): All tokens of each network; what lies on padding is not read.
        layout (`TokenLayout`): Their layout.

    Returns:
        `Tensor` of shape `(B, N)` and the dtype of `tokens`.

    Raises:
        `ValueError`: If the shape of `tokens` is not that of the layout.
    """
    if tokens.ndim != 3 or tokens.shape[1:] != (layout.num_tokens, layout.token_size):
        raise ValueError(
            f"tokens have shape {tuple(tokens.shape)}; "
            f"this layout needs (B, {layout.num_tokens}, {layout.token_size})."
        )
    parts = [tokens.new_empty(len(tokens), 0)]
    for layer in layout.layers:
        rows = layer_rows(tokens, layer)
        parts.append(rows[:, :, : layer.columns].flatten(1))
        if layer.bias is not None:
            parts.append(rows[:, :, layer.columns])
    return torch.cat(parts, 1)
