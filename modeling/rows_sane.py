"""The rows of one layer, and what names and shapes alone tell about the tensors of a network."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor

TOKENISED_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
COPIED_DTYPES = (
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint16, torch.uint32, torch.uint64),
)
ROW_FORMS = ("cut", "equal")
NORM_STATISTICS = ("running_mean", "running_var")

_NUMPY_DTYPES = {torch.float64: np.float64, torch.float32: np.float32, torch.bool: np.bool_}

# For each tensor its shape and whether it is floating; the order is that of the state dict.
Entries = dict[str, tuple[tuple[int, ...], bool]]

# Reads a tensor, or some of its rows, for a batch: (B, rows, ...).
Reader = Callable[[str, slice | None], Tensor]


@dataclass(frozen=True)
class LayerLayout:
    """One layer of a [`TokenLayout`]: `rows` output channels of `width` weights, each cut into `chunks` tokens.

    The first `lead` chunks of a row hold `lead_size` weights, the others `tail_size`. The bias, if there is one, is
    the last weight of each row.
    """

    index: int
    name: str
    bias: str | None
    rows: int
    width: int
    chunks: int
    lead: int
    lead_size: int
    tail_size: int
    token_start: int
    flat_start: int

    @property
    def columns(self) -> int:
        """Weights in a row without the bias."""
        return self.width - (self.bias is not None)

    @property
    def num_tokens(self) -> int:
        return self.rows * self.chunks

    @property
    def token_stop(self) -> int:
        return self.token_start + self.num_tokens

    @property
    def num_weights(self) -> int:
        return self.rows * self.width

    @property
    def bias_start(self) -> int:
        """Offset of the bias in the flat vector, right behind the weight."""
        return self.flat_start + self.rows * self.columns

    @property
    def flat_stop(self) -> int:
        return self.flat_start + self.num_weights

    def chunk_start(self, chunk: int) -> int:
        """Column of the row at which a chunk begins."""
        return min(chunk, self.lead) * self.lead_size + max(chunk - self.lead, 0) * self.tail_size

    def runs(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Runs `(first, last, size)` of equally sized chunks among the chunks `start` to `stop` of a row."""
        for first, last, size in (
            (start, min(stop, self.lead), self.lead_size),
            (max(start, self.lead), stop, self.tail_size),
        ):
            if first < last:
                yield first, last, size


def describe(name: str, value: object) -> tuple[tuple[int, ...], bool]:
    """Shape of a tensor, and whether it is floating and so tokenised.

    Raises:
        `ValueError`: On a value that is no tensor, and on dtypes that have no exact place among tokens.
    """
    if isinstance(value, Tensor):
        if value.dtype in TOKENISED_DTYPES:
            return tuple(value.shape), True
        if value.dtype in COPIED_DTYPES:
            return tuple(value.shape), False
        raise ValueError(
            f"Tensor {name!r} has dtype {value.dtype}, which cannot be tokenised. Convert it to one of "
            f"{', '.join(map(str, TOKENISED_DTYPES))}; integer and boolean tensors are carried along."
        )
    raise ValueError(
        f"{name!r} is {type(value).__name__}, not a tensor. Pass the state dict of a model, tensors only."
    )


def is_shape(value: object) -> bool:
    """Whether this is the shape of a tensor rather than a tensor."""
    return isinstance(value, (tuple, list)) and all(isinstance(size, int) and size >= 0 for size in value)


def readable(name: str, tensor: Tensor) -> Tensor:
    """The tensor itself, or a `ValueError` if it has no values that could be read as they lie."""
    if tensor.layout is not torch.strided:
        raise ValueError(f"Tensor {name!r} is sparse ({tensor.layout}). Call .to_dense() on it first.")
    if tensor.is_meta:
        raise ValueError(f"Tensor {name!r} lies on the meta device and has no values. Load the weights first.")
    return tensor


def fingerprint(entries: Mapping[str, tuple[tuple[int, ...], bool]]) -> str:
    """Names an architecture: 32 hexadecimal digits from names, shapes and which are floating, in whatever order."""
    rows = sorted([name, list(shape), floating] for name, (shape, floating) in entries.items())
    return hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest()[:32]


def find_biases(entries: Entries) -> dict[str, str]:
    """The bias of each weight that has one: the same name with "bias" for "weight", one floating entry per row."""
    found = {}
    for name, (shape, floating) in entries.items():
        prefix, _, leaf = name.rpartition(".")
        if not floating or not shape or "weight" not in leaf:
            continue
        bias = name[: len(name) - len(leaf)] + leaf.replace("weight", "bias")
        if entries.get(bias) == ((shape[0],), True):
            found[name] = bias
    return found


def find_norm_tensors(entries: Entries) -> frozenset[str]:
    """Tensors of normalisation layers, told by structure: running statistics, or a one-dimensional `weight`."""
    modules: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, (shape, _) in entries.items():
        module, _, leaf = name.rpartition(".")
        modules.setdefault(module, {})[leaf] = shape
    norms = {
        module
        for module, leaves in modules.items()
        if any(leaf in leaves for leaf in NORM_STATISTICS) or len(leaves.get("weight", ())) == 1
    }
    return frozenset(name for name in entries if name.rpartition(".")[0] in norms)


def row_size(shape: tuple[int, ...]) -> int:
    """Weights in one row of a tensor, which is one index of its first axis."""
    return prod(shape[1:])


def rectangles(first: int, last: int, chunks: int) -> Iterator[tuple[int, int, int, int]]:
    """The tokens `first` to `last` of a layer as rectangles (row start, row stop, chunk start, chunk stop): the end of
    a row begun before, whole rows, the beginning of a row."""
    row, chunk = divmod(first, chunks)
    if chunk:
        stop = min(chunk + last - first, chunks)
        yield row, row + 1, chunk, stop
        row, first = row + 1, first + stop - chunk
    whole, rest = divmod(last - first, chunks)
    if whole:
        yield row, row + whole, 0, chunks
    if rest:
        yield row + whole, row + whole + 1, 0, rest


def plan_layers(entries: Entries, token_size: int, rows: str, ignore_norm: bool) -> tuple[LayerLayout, ...]:
    """The layers of a [`TokenLayout`], one for each tokenised tensor that is no bias of another."""
    if isinstance(token_size, bool) or not isinstance(token_size, int) or token_size < 0:
        raise ValueError(f"token_size must be an integer, 0 (widest row) or more, not {token_size!r}.")
    if rows not in ROW_FORMS:
        raise ValueError(f"rows must be one of {', '.join(map(repr, ROW_FORMS))}, not {rows!r}.")
    ignored = find_norm_tensors(entries) if ignore_norm else frozenset()
    tokenised = {name: entry for name, entry in entries.items() if entry[1] and name not in ignored}
    if not tokenised:
        raise ValueError(
            f"Nothing to tokenise: none of the {len(entries)} tensors is floating"
            f"{' and outside of normalisation layers' if ignore_norm else ''}. Pass the state dict of a model."
        )
    bias_of = find_biases(tokenised)
    biases = set(bias_of.values())
    counts = {}  # name of the layer: rows, width
    for name, (shape, _) in tokenised.items():
        if name not in biases:
            counts[name] = (shape[0] if shape else 1, row_size(shape) + (name in bias_of))
    size = token_size or max((width for count, width in counts.values() if count), default=0) or 1
    layers: list[LayerLayout] = []
    token = flat = 0
    for name, (count, width) in counts.items():
        chunks = -(-width // size)
        if rows == "cut":
            lead, lead_size, tail_size = width // size, size, width % size
        else:
            tail_size, lead = divmod(width, max(chunks, 1))
            lead_size = tail_size + 1
        bias = bias_of.get(name)
        layer = LayerLayout(len(layers), name, bias, count, width, chunks, lead, lead_size, tail_size, token, flat)
        token, flat = layer.token_stop, layer.flat_stop
        layers.append(layer)
    return tuple(layers)


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros. NumPy asks the system for memory that is zero already, in huge pages: without them, touching large memory
    for the first time costs several times what filling it does."""
    if device.type == "cpu":
        return torch.from_numpy(np.zeros(shape, _NUMPY_DTYPES[dtype]))
    return torch.zeros(shape, dtype=dtype, device=device)


def fill_tokens(
    tokens: Tensor,
    layers: Iterable[LayerLayout],
    start: int,
    read: Reader,
    padding: int | None = 0,
    shift_and_scale: Tensor | None = None,
) -> Tensor:
    """Write the tokens of some layers, from token `start` on, into `tokens` of shape (B, T, D).

    Padding is set to `padding`, or left as it is if that is None. With `shift_and_scale`, of shape (2, layers of the
    network), the weights are normalised on the way.
    """
    stop, batch = start + tokens.shape[1], len(tokens)
    for layer in layers:
        first = max(start, layer.token_start) - layer.token_start
        last = min(stop, layer.token_stop) - layer.token_start
        for top, bottom, left, right in rectangles(first, last, layer.chunks):
            rows = None if bottom - top == layer.rows else slice(top, bottom)
            shape = (bottom - top, right - left)
            offset = layer.token_start + top * layer.chunks + left - start
            block = tokens[:, offset : offset + shape[0] * shape[1]].unflatten(1, shape)
            weight = read(layer.name, rows).reshape(batch, shape[0], layer.columns)
            for begin, end, size in layer.runs(left, right):
                target, column = block[:, :, begin - left : end - left], layer.chunk_start(begin)
                count = end - begin - (layer.bias is not None and end == layer.chunks)  # chunks of weights only
                if count:
                    source = weight[:, :, column : column + count * size].unflatten(2, (count, size))
                    target[:, :, :count, :size].copy_(source)
                if layer.bias is not None and begin + count < end:
                    bias = read(layer.bias, rows).reshape(batch, shape[0])
                    target[:, :, count, : size - 1].copy_(weight[:, :, column + count * size :])
                    target[:, :, count, size - 1].copy_(bias)
                if shift_and_scale is not None:
                    shift, scale = shift_and_scale[:, layer.index].tolist()
                    target[..., :size].sub_(shift).div_(scale)
                if padding is not None and size < tokens.shape[2]:
                    target[..., size:].fill_(padding)
    return tokens


def layer_rows(tokens: Tensor, layer: LayerLayout) -> Tensor:
    """The rows of a layer, bias included, from the tokens (B, T, D) of whole networks: (B, rows, width).

    A view of `tokens` where rows are not cut. Differentiable.
    """
    if not layer.num_tokens:
        return tokens.new_empty(len(tokens), layer.rows, layer.width)
    block = tokens[:, layer.token_start : layer.token_stop].unflatten(1, (layer.rows, layer.chunks))
    runs = [block[:, :, begin:end, :size].flatten(2) for begin, end, size in layer.runs(0, layer.chunks)]
    return runs[0] if len(runs) == 1 else torch.cat(runs, 2)
