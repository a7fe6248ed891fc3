"""What each module of `torch.nn` means for the permutation of axes: the rules of `operations` with its parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from sane_hf.symmetry.axes import AxisNode
from sane_hf.symmetry.operations import (
    Context,
    Value,
    channel_norm,
    convolution,
    embedding,
    group_norm,
    layer_norm,
    linear,
    pool,
    reshape,
)


def _module_linear(ctx: Context, module: nn.Linear, x: Value) -> list[AxisNode]:
    return linear(ctx, x, ctx.parameter(module.weight), ctx.parameter(module.bias))


def _module_conv(ctx: Context, module: Any, x: Value) -> list[AxisNode]:
    return convolution(ctx, x, ctx.parameter(module.weight), ctx.parameter(module.bias), module.groups)


def _module_batch_norm(ctx: Context, module: Any, x: Value) -> list[AxisNode]:
    tensors = (module.weight, module.bias, module.running_mean, module.running_var)
    instance = isinstance(module, (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d))
    unbatched = instance and len(x.shape) == {"1": 2, "2": 3, "3": 4}[type(module).__name__[-2]]
    return channel_norm(ctx, x, [ctx.parameter(tensor) for tensor in tensors], 0 if unbatched else 1)


def _module_layer_norm(ctx: Context, module: Any, x: Value) -> list[AxisNode]:
    bias = ctx.parameter(getattr(module, "bias", None))
    return layer_norm(ctx, x, module.normalized_shape, ctx.parameter(module.weight), bias)


def _module_group_norm(ctx: Context, module: nn.GroupNorm, x: Value) -> list[AxisNode]:
    return group_norm(ctx, x, module.num_groups, ctx.parameter(module.weight), ctx.parameter(module.bias))


def _module_prelu(ctx: Context, module: nn.PReLU, x: Value) -> list[AxisNode]:
    weight = ctx.parameter(module.weight)
    return channel_norm(ctx, x, (weight,), 1) if weight.shape[0] > 1 else x.axes


def _module_embedding(ctx: Context, module: nn.Embedding, index: Value) -> list[AxisNode]:
    return embedding(ctx, index, ctx.parameter(module.weight), max_norm=module.max_norm)


def _module_same(ctx: Context, module: Any, x: Value) -> list[AxisNode]:
    return x.axes


def _module_pool(ctx: Context, module: Any, x: Value) -> list[AxisNode]:
    return pool(ctx, x, int(type(module).__name__[-2]))


def _module_reshape(ctx: Context, module: Any, x: Value) -> list[AxisNode]:
    return reshape(ctx, x)


_SAME = "Identity ReLU ReLU6 Tanh Sigmoid SiLU GELU LeakyReLU ELU SELU CELU Softplus Hardtanh Hardswish Hardsigmoid"
_SAME += " Mish Softsign Tanhshrink LogSigmoid Dropout Dropout1d Dropout2d Dropout3d AlphaDropout Softmax LogSoftmax"

MODULES: dict[type[nn.Module], Callable] = {
    **dict.fromkeys((getattr(nn, name) for name in _SAME.split()), _module_same),
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), _module_conv),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), _module_batch_norm),
    **dict.fromkeys((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), _module_batch_norm),
    **dict.fromkeys((nn.LayerNorm, nn.RMSNorm), _module_layer_norm),
    **dict.fromkeys((nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d), _module_pool),
    **dict.fromkeys((nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d), _module_pool),
    **dict.fromkeys((nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d), _module_pool),
    **dict.fromkeys((nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d), _module_pool),
    **dict.fromkeys((nn.Flatten, nn.Unflatten), _module_reshape),
    nn.Linear: _module_linear,
    nn.GroupNorm: _module_group_norm,
    nn.PReLU: _module_prelu,
    nn.Embedding: _module_embedding,
}
