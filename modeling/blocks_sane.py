"""Building blocks of SANE: transformer layers, learned positions, per-layer linear paths, pooling over tokens."""

from collections.abc import Callable

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_sane import SaneConfig

WEIGHT_STATISTICS = 10  # of a token and of its layer, see `weight_statistics`


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    weights = query @ key.transpose(-2, -1) * scaling  # (B, heads, T, T)
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class ResidualLinear(nn.Linear):
    """A linear layer that writes into the residual stream; it starts smaller, by depth, as in GPT-2."""


class SaneAttention(nn.Module):
    """Bidirectional self-attention without biases."""

    def __init__(self, config: SaneConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.dropout
        self.is_causal = False
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.o_proj = ResidualLinear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs):
        batch, tokens, _ = hidden_states.shape
        qkv = self.qkv_proj(hidden_states).view(batch, tokens, 3, -1, self.head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, T, head_dim)
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=self.scaling,
            dropout=self.attention_dropout if self.training else 0.0,
            **kwargs,
        )
        return self.o_proj(output.reshape(batch, tokens, -1)), weights


class SaneMLP(nn.Module):
    """Feed-forward block without biases."""

    def __init__(self, config: SaneConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.activation = ACT2FN[config.hidden_act]
        self.fc2 = ResidualLinear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation(self.fc1(hidden_states)))


class SaneLayer(GradientCheckpointingLayer):
    """Pre-norm transformer layer of both encoder and decoder."""

    def __init__(self, config: SaneConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, bias=False)
        self.attention = SaneAttention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, bias=False)
        self.mlp = SaneMLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs):
        attended, _ = self.attention(self.norm1(hidden_states), attention_mask, **kwargs)
        hidden_states = hidden_states + self.dropout(attended)
        return hidden_states + self.dropout(self.mlp(self.norm2(hidden_states)))


class SanePositions(nn.Module):
    """Learned embedding of (index in the sequence, layer[, token in the layer]), added to the token embedding.

    With three parts the first two share one half of the features and the third fills the other, as in the original.
    """

    def __init__(self, config: SaneConfig):
        super().__init__()
        self.sizes = tuple(config.max_positions)
        self.tables = nn.ModuleList(nn.Embedding(size, config.hidden_size // 2) for size in self.sizes)

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        index, layer, *within = [table(positions[..., part]) for part, table in enumerate(self.tables)]
        return torch.cat([index + layer, within[0]] if within else [index, layer], dim=-1)  # (B, T, H)


class LayerPath(nn.Module):
    """A linear map of its own for every layer of the network that is read.

    One product computes all layers' outputs and the token's own is taken, which keeps the graph static. A path that
    starts as the identity, as far as its sizes allow, passes from the first step what there is room for.
    """

    def __init__(self, num_layers: int, in_features: int, out_features: int, identity: bool):
        super().__init__()
        self.identity = identity
        self.weight = nn.Parameter(torch.empty(num_layers, in_features, out_features))
        self.bias = nn.Parameter(torch.empty(num_layers, out_features))

    def forward(self, inputs: torch.Tensor, layer: torch.Tensor) -> torch.Tensor:
        num_layers, in_features, out_features = self.weight.shape
        outputs = inputs @ self.weight.transpose(0, 1).reshape(in_features, num_layers * out_features)
        outputs = outputs.unflatten(-1, (num_layers, out_features))  # (B, T, L, out)
        own = outputs.take_along_dim(layer[..., None, None], dim=-2).squeeze(-2)
        return own + self.bias[layer]


def layer_means(latents: torch.Tensor, layer: torch.Tensor, weight: torch.Tensor, num_layers: int):
    """Mean of the latents over the tokens of each layer.

    Args:
        latents: (B, T, Z) float.
        layer: (B, T) long, layer of each token.
        weight: (B, T) float, 1 for real tokens and 0 for padded ones.
        num_layers: L.

    Returns:
        (B, L, Z) means (zero for layers that are not there) and (B, L) number of tokens.
    """
    membership = nn.functional.one_hot(layer, num_layers).to(latents.dtype) * weight[..., None]  # (B, T, L)
    count = membership.sum(dim=1)
    return (membership.transpose(1, 2) @ latents) / count.clamp(min=1)[..., None], count


def weight_statistics(tokens: torch.Tensor, mask: torch.Tensor, layer: torch.Tensor, num_layers: int) -> torch.Tensor:
    """Statistics of the real weights of every token, and of those of its layer in the window.

    What tells networks apart are second moments and extremes, which a transformer is slow to compute from weights.

    Args:
        tokens: (B, T, D) float.
        mask: (B, T, D) bool, true where a weight is.
        layer: (B, T) long, layer of each token.
        num_layers: L.

    Returns:
        (B, T, 10) float: mean, log standard deviation, mean magnitude, smallest and largest weight of the token, then
        the same of the layer; finite where there is no weight.
    """
    count = mask.sum(dim=-1, keepdim=True).to(tokens.dtype)
    real = tokens * mask
    sums = torch.cat([count, *(part.sum(-1, keepdim=True) for part in (real, real.square(), real.abs()))], dim=-1)
    lowest = tokens.masked_fill(~mask, float("inf")).amin(dim=-1)
    highest = tokens.masked_fill(~mask, float("-inf")).amax(dim=-1)
    membership = nn.functional.one_hot(layer, num_layers).bool()  # (B, T, L)
    layer_sums = membership.to(tokens.dtype).transpose(1, 2) @ sums  # (B, L, 4)
    layer_lowest = lowest[..., None].masked_fill(~membership, float("inf")).amin(dim=1)  # (B, L)
    layer_highest = highest[..., None].masked_fill(~membership, float("-inf")).amax(dim=1)
    own = layer[..., None]
    return torch.cat(
        [
            _moments(sums, lowest, highest),
            _moments(
                layer_sums.take_along_dim(own, dim=1), layer_lowest.gather(1, layer), layer_highest.gather(1, layer)
            ),
        ],
        dim=-1,
    )


def _moments(sums: torch.Tensor, lowest: torch.Tensor, highest: torch.Tensor) -> torch.Tensor:
    """(B, T, 4) count and sums of weights, squares and magnitudes, and extremes (B, T), to (B, T, 5) statistics."""
    count, total, squares, magnitudes = sums.unbind(-1)
    count = count.clamp(min=1)
    mean = total / count
    variance = (squares / count - mean.square()).clamp(min=0)
    extremes = [torch.where(value.isfinite(), value, 0.0) for value in (lowest, highest)]
    return torch.stack([mean, 0.5 * (variance + 1e-4).log(), magnitudes / count, *extremes], dim=-1)


def default_positions(sequence: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor:
    """Positions (B, T, parts) of a sequence that is one layer: index, layer 0[, token in the layer]."""
    index = torch.arange(sequence.shape[1], device=sequence.device)
    parts = [index, torch.zeros_like(index), index][: len(sizes)]
    return torch.stack(parts, dim=-1).expand(sequence.shape[0], -1, -1)


def real_weights(tokens: torch.Tensor, mask: torch.Tensor | None, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """(B, T, D) bool, true where a real weight is: by the mask, or, without one, in all tokens that are not padded."""
    mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    return mask if attention_mask is None else mask & attention_mask.bool()[..., None]


def token_weight(sequence: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """(B, T) float, 1 for real tokens and 0 for padded ones."""
    if attention_mask is None:
        return torch.ones(sequence.shape[:2], dtype=sequence.dtype, device=sequence.device)
    return attention_mask.to(sequence.dtype)


__all__ = [
    "WEIGHT_STATISTICS",
    "LayerPath",
    "ResidualLinear",
    "SaneAttention",
    "SaneLayer",
    "SanePositions",
    "default_positions",
    "layer_means",
    "real_weights",
    "token_weight",
    "weight_statistics",
]
