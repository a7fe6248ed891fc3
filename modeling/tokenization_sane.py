"""The weight tokenizer: state dicts to tokens, mask and positions, and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature

from .batches_sane import check_mapping, grouped, padded, unpack
from .files_sane import TokenizerFiles
from .layout_sane import TokenLayout
from .permutation_sane import PermutationGroups
from .rows_sane import describe, fingerprint, zeros
from .statistics_sane import LayerNormalizer, LayerStatistics, check_finite, gather

StateDict = Mapping[str, Tensor]

NORMALIZATIONS = ("none", "standardize", "minmax", "l2")

_FIT_CHUNK = 1 << 22  # weights: networks gathered at once while fitting
_MOST_PLANS = 1024


class WeightTokenizer(LayerNormalizer, TokenizerFiles):
    """Turns the weights of networks into sequences of tokens, and tokens into weights.

    A token is a row of a weight matrix (one output channel with its bias), or a piece of it; see [`TokenLayout`].
    `AutoTokenizer` loads it, and its code travels with it.

    Args:
        token_size (`int`): Weights per token (D). 0 takes the widest row of the networks first seen.
        normalization (`str`): What `fit` learns for every layer. `"none"`: nothing, tokens are the weights, bit for
            bit. `"standardize"`: mean 0, standard deviation 1 (the paper). `"minmax"`: range [-1, 1]. `"l2"`: l2
            norm 1 on average over the networks (root mean square).
        rows (`str`): `"cut"`: rows are cut at `token_size` (the paper); `"equal"`: into equal chunks.
        ignore_norm (`bool`): Leave normalisation layers out; decoding takes them from the reference.

    Raises:
        `ValueError`: On a value that is none of the above.

    Attributes:
        layouts (`dict[str, TokenLayout]`): The architectures known, by fingerprint; empty before `fit`.
        statistics (`dict[str, Tensor]`): Shift and scale of each layer, float64 of shape `(2, L)`.
        groups (`dict[str, PermutationGroups]`): Their permutation groups, where set.
        references (`dict[str, dict[str, Tensor]]`): The network to which others are aligned, where set.

    Example:

    A Linear layer of two outputs and three inputs, with bias:

    ```python
    >>> import torch
    >>> from sane_hf.modeling import WeightTokenizer
    >>> weights = {"weight": torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), "bias": torch.tensor([7.0, 8.0])}
    >>> tokenizer = WeightTokenizer(token_size=5)
    >>> batch = tokenizer(weights)
    >>> batch["tokens"]
    tensor([[[1., 2., 3., 7., 0.],
             [4., 5., 6., 8., 0.]]])
    >>> batch["mask"].long()
    tensor([[[1, 1, 1, 1, 0],
             [1, 1, 1, 1, 0]]])
    >>> batch["positions"]
    tensor([[[0, 0, 0],
             [1, 0, 1]]])
    >>> batch["attention_mask"]
    tensor([[True, True]])
    >>> tokenizer.decode(batch["tokens"], reference=weights)["bias"]
    tensor([7., 8.])

    ```
    """

    model_input_names = ("tokens", "mask", "attention_mask", "positions")

    def __init__(self, token_size: int = 0, normalization: str = "none", rows: str = "cut", ignore_norm: bool = False):
        if normalization not in NORMALIZATIONS:
            raise ValueError(
                f"normalization must be one of {', '.join(map(repr, NORMALIZATIONS))}, not {normalization!r}."
            )
        self.token_size = token_size
        self.normalization = normalization
        self.rows = rows
        self.ignore_norm = ignore_norm
        self.layouts: dict[str, TokenLayout] = {}
        self.statistics: dict[str, Tensor] = {}
        self.groups: dict[str, PermutationGroups] = {}
        self.references: dict[str, dict[str, Tensor]] = {}
        self._plans: dict[tuple, tuple[TokenLayout, torch.dtype]] = {}
        TokenLayout.plan({"": (1,)}, token_size, rows, ignore_norm)  # raises on bad arguments

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(token_size={self.token_size}, normalization={self.normalization!r}, "
            f"rows={self.rows!r}, ignore_norm={self.ignore_norm}, architectures={len(self.layouts)})"
        )

    def __call__(
        self, weights: StateDict | Sequence[StateDict], start: int | None = None, length: int | None = None
    ) -> BatchFeature:
        """Tokenise networks, of one architecture or of several.

        Args:
            weights (`Mapping[str, Tensor]` or a sequence of them): State dicts.
            start (`int`, *optional*): First token of the window, 0 if not given. A window reads only the rows of the
                tensors that it covers.
            length (`int`, *optional*): Most tokens of the window, which ends where the network ends.

        Returns:
            `BatchFeature` of new tensors, padded to the longest:
            - **tokens** `(B, T, D)`: float32, or float64 if any tensor is; 0 on padding.
            - **mask** `(B, T, D)`: bool, true where a weight is.
            - **attention_mask** `(B, T)`: bool, false on tokens that only pad a shorter network.
            - **positions** `(B, T, 3)`: int64, index in the sequence, layer, row in the layer (counted from 0).

        Raises:
            `ValueError`: On weights that are not finite, tensors that fit no fitted architecture, unsupported dtypes,
                an architecture without statistics, a window outside of the network.
        """
        batch = [weights] if isinstance(weights, Mapping) else list(weights)
        if not batch:
            raise ValueError("There is no network to tokenise: the list is empty.")
        plans = self._plan_all(batch)
        dtype = torch.float64 if any(found == torch.float64 for _, found in plans) else torch.float32
        groups = grouped([layout for layout, _ in plans])
        parts = []
        for layout, members in groups:
            networks = [batch[member] for member in members]
            known = None if self.normalization == "none" else self.shift_and_scale(layout)
            with torch.no_grad():
                tokens, total = layout.read_tokens(networks, start, length, dtype, known)
            check_finite(total, layout, list(zip(members, networks, strict=True)), start, length)
            device = tokens.device
            parts.append(
                {
                    "tokens": tokens,
                    "mask": zeros(tokens.shape, torch.bool, device).copy_(layout.mask(start, length)),
                    "attention_mask": torch.ones(tokens.shape[:2], dtype=torch.bool, device=device),
                    "positions": layout.positions(start, length).to(device).repeat(len(members), 1, 1),
                }
            )
        return BatchFeature(parts[0] if len(parts) == 1 else padded(parts, groups, len(batch)))

    def decode(
        self, tokens: Tensor, reference: StateDict | Sequence[StateDict] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Weights of whole networks from their tokens, bit for bit if `normalization` is `"none"`.

        Args:
            tokens (`Tensor` of shape `(T, D)` or `(B, T, D)`): Tokens; those behind a network's last are not read.
            reference (`Mapping[str, Tensor]` or a sequence of B, *optional*): A network of the same architecture for
                all, or one for each. Gives shapes and dtypes, and the tensors that are no tokens, which are copied.
                Without it the tokenizer must know exactly one architecture; its canonical reference is used if set.

        Returns:
            `dict[str, Tensor]` for one network given without a list of references, whether `(T, D)` or `(1, T, D)`;
            else `list[dict[str, Tensor]]`. New tensors on the device of `tokens`, in the order of the reference.

        Raises:
            `ValueError`: On fewer tokens than the network has, another token size, a reference that fits no fitted
                architecture, or tensors that only a reference can give.
        """
        if tokens.ndim not in (2, 3):
            raise ValueError(f"tokens have shape {tuple(tokens.shape)}; decode needs (T, D) or (B, T, D).")
        sequences = (tokens[None] if tokens.ndim == 2 else tokens).detach()
        several = not (reference is None or isinstance(reference, Mapping))
        given: list[StateDict | None]
        if reference is None:
            layout, known = self._only_layout()
            layouts, given = [layout] * len(sequences), [known] * len(sequences)
        elif isinstance(reference, Mapping):
            layouts, given = [self.layout(reference)] * len(sequences), [reference] * len(sequences)
        else:
            layouts, given = [layout for layout, _ in self._plan_all(reference)], list(reference)
        if len(given) != len(sequences):
            raise ValueError(f"There are {len(sequences)} token sequences, but {len(given)} references.")
        networks: list[dict[str, Tensor]] = [{}] * len(sequences)
        for layout, members in grouped(layouts):
            if sequences.shape[1] < layout.num_tokens or sequences.shape[2] != layout.token_size:
                raise ValueError(
                    f"tokens have shape {tuple(tokens.shape)}; this network has {layout.num_tokens} tokens of "
                    f"{layout.token_size} weights. A window has to be merged into the whole sequence first."
                )
            part = sequences[members] if len(members) < len(sequences) else sequences
            part = self.denormalize(part[:, : layout.num_tokens], layout)
            own = [given[member] for member in members]
            for member, one, found in zip(members, own, unpack(part, layout, own), strict=True):
                networks[member] = {
                    name: found[name] if one is None or name in found else one[name].detach().clone()
                    for name in (layout.shapes if one is None else one)
                }
        return networks if several or len(networks) != 1 else networks[0]

    def fit(self, state_dicts: StateDict | Iterable[StateDict]) -> WeightTokenizer:
        """Learn the architectures of a training split and the statistics of their layers, in one pass.

        Afterwards these are the only architectures known: a network with a tensor too few or too many is an error, and
        tensors are taken in the order of the first network of each, whatever order they come in.

        Args:
            state_dicts (`Iterable[Mapping[str, Tensor]]`): Networks, of one architecture or of several; a generator
                will do. Never those of a validation or test split.

        Returns:
            `WeightTokenizer`: itself.

        Raises:
            `ValueError`: On weights that are not finite, unsupported dtypes, and if there are no networks.
        """
        # Statistics do not depend on the token size, which may be known only after the last network.
        rows: dict[str, TokenLayout] = {}
        statistics: dict[str, LayerStatistics] = {}
        waiting: dict[str, list[tuple[int, StateDict]]] = {}
        for number, state_dict in enumerate([state_dicts] if isinstance(state_dicts, Mapping) else state_dicts):
            check_mapping(number, state_dict)
            entries = {name: describe(name, tensor) for name, tensor in state_dict.items()}
            key = fingerprint(entries)
            if key not in rows:
                rows[key] = TokenLayout.plan(state_dict, 0, self.rows, self.ignore_norm)
                statistics[key], waiting[key] = LayerStatistics(len(rows[key].layers)), []
            if self.normalization != "none":
                waiting[key].append((number, state_dict))
                if len(waiting[key]) * rows[key].num_weights >= _FIT_CHUNK:
                    gather(waiting.pop(key), rows[key], statistics[key])
                    waiting[key] = []
        if not rows:
            raise ValueError("There is no network to fit the tokenizer on: state_dicts is empty.")
        for key, layout in rows.items():
            gather(waiting[key], layout, statistics[key])
        self.token_size = self.token_size or max(layout.token_size for layout in rows.values())
        self.layouts = {key: layout.resized(self.token_size) for key, layout in rows.items()}
        self.statistics = {
            key: found.shift_and_scale(self.normalization)
            for key, found in statistics.items()
            if self.normalization != "none"
        }
        self._plans.clear()
        return self

    def add_architecture(self, weights: StateDict) -> TokenLayout:
        """Make an architecture known without statistics, as `normalization="none"` allows.

        Args:
            weights (`Mapping[str, Tensor]`): A network of that architecture, whose order of tensors is kept.

        Returns:
            `TokenLayout`: Its layout.

        Raises:
            `ValueError`: If `normalization` is not `"none"`: statistics can only come from [`WeightTokenizer.fit`].
        """
        if self.normalization != "none":
            raise ValueError(
                f"normalization is {self.normalization!r}, whose statistics only fit learns: fit the tokenizer on "
                "training networks of this architecture too, or use a tokenizer with normalization='none'."
            )
        layout = TokenLayout.plan(weights, self.token_size, self.rows, self.ignore_norm)
        self.token_size = layout.token_size
        self._plans.clear()
        return self.layouts.setdefault(layout.fingerprint, layout)

    def layout(self, weights: StateDict) -> TokenLayout:
        """The token layout of a network, planned on first sight and kept.

        Raises:
            `ValueError`: If it fits no fitted architecture.
        """
        return self._plan_all([weights])[0][0]

    def set_groups(self, network: TokenLayout | StateDict, groups: PermutationGroups) -> None:
        """Set the permutation groups of an architecture.

        Raises:
            `ValueError`: If they do not fit its tensors.
        """
        layout = network if isinstance(network, TokenLayout) else self.layout(network)
        groups.check(layout.shapes)
        self.groups[layout.fingerprint] = groups

    def set_reference(self, weights: StateDict) -> None:
        """Set the canonical reference of an architecture, to which its networks are aligned. It is copied."""
        layout = self.layout(weights)
        self.references[layout.fingerprint] = {name: weights[name].detach().cpu().clone() for name in layout.shapes}

    def _plan_all(self, batch: Sequence[StateDict]) -> list[tuple[TokenLayout, torch.dtype]]:
        """Layout and token dtype of each network. What is found is kept under a key that is cheap to make."""
        plans = []
        for number, weights in enumerate(batch):
            check_mapping(number, weights)
            if not self.token_size:
                widest = [TokenLayout.plan(network, 0, self.rows, self.ignore_norm).token_size for network in batch]
                self.token_size = max(widest)
            key = tuple(
                [
                    (name, tensor.shape, tensor.dtype) if isinstance(tensor, Tensor) else describe(name, tensor)
                    for name, tensor in weights.items()
                ]
            )
            plan = self._plans.get(key)
            if plan is None:
                layout = self._find_layout(weights)
                plan = layout, layout.token_dtype(weights)
                if len(self._plans) >= _MOST_PLANS:
                    self._plans.clear()
                self._plans[key] = plan
            plans.append(plan)
        return plans

    def _find_layout(self, weights: StateDict) -> TokenLayout:
        if not self.layouts:
            return TokenLayout.plan(weights, self.token_size, self.rows, self.ignore_norm)
        entries = {name: describe(name, tensor) for name, tensor in weights.items()}
        layout = self.layouts.get(fingerprint(entries))
        if layout is not None:
            return layout
        closest = max(self.layouts.values(), key=lambda known: len(known.shapes.keys() & entries.keys()))
        fault = closest.mismatch(entries)
        kind = (
            f"the closest of {len(self.layouts)} fitted architectures" if len(self.layouts) > 1 else "the fitted one"
        )
        way_out = " (or add_architecture)" if self.normalization == "none" else ""
        raise ValueError(
            f"The network is of another architecture than {kind}. {fault} Correct it, or fit the tokenizer on "
            f"training networks of this architecture too{way_out}."
        )

    def _only_layout(self) -> tuple[TokenLayout, dict[str, Tensor] | None]:
        if len(self.layouts) != 1:
            raise ValueError(
                f"The tokenizer knows {len(self.layouts)} architectures, so decode needs a reference: pass the state "
                "dict of a network of the architecture that the tokens belong to."
            )
        ((key, layout),) = self.layouts.items()
        if layout.copied and key not in self.references:
            raise ValueError(
                f"Tensor {layout.copied[0]!r} ({len(layout.copied)} in all) is not among the tokens: pass a reference "
                "to decode, or set a canonical one with set_reference."
            )
        return layout, self.references.get(key)

    def to_dict(self) -> dict[str, Any]:
        """All but the references as plain JSON data."""
        architectures = []
        for key, layout in self.layouts.items():
            architecture: dict[str, Any] = {"fingerprint": key, "layout": layout.to_dict()}
            if key in self.statistics:
                pairs = zip(*self.statistics[key].tolist(), strict=True)
                architecture["statistics"] = {
                    layer.name: {"shift": shift, "scale": scale}
                    for layer, (shift, scale) in zip(layout.layers, pairs, strict=True)
                }
            architectures.append(architecture)
        return {
            "tokenizer_class": type(self).__name__,
            "version": 1,
            "token_size": self.token_size,
            "normalization": self.normalization,
            "rows": self.rows,
            "ignore_norm": self.ignore_norm,
            "architectures": architectures,
            "permutation_groups": {key: groups.to_dict() for key, groups in self.groups.items()},
            "references": list(self.references),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> WeightTokenizer:
        """Inverse of [`WeightTokenizer.to_dict`], without references.

        Raises:
            `ValueError`: On a version that this code does not know.
        """
        if data.get("version") != 1:
            raise ValueError(f"Weight tokenizer of version {data.get('version')!r}; this code reads 1: upgrade it.")
        tokenizer = cls(data["token_size"], data["normalization"], data["rows"], data["ignore_norm"])
        for architecture in data["architectures"]:
            layout = TokenLayout.from_dict(architecture["layout"])
            tokenizer.layouts[layout.fingerprint] = layout
            if "statistics" in architecture:
                found = [architecture["statistics"][layer.name] for layer in layout.layers]
                pairs = [[layer["shift"] for layer in found], [layer["scale"] for layer in found]]
                tokenizer.statistics[layout.fingerprint] = torch.tensor(pairs, dtype=torch.float64)
        tokenizer.groups = {
            key: PermutationGroups.from_dict(groups) for key, groups in data["permutation_groups"].items()
        }
        return tokenizer
