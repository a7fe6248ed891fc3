"""Speed of the weight tokenizer against copying the same tensors, on one thread.

    python benchmarks/tokenization.py

Every figure is the median processor time of interleaved repetitions in this run, which other work on the machine
disturbs least. The copy is at its cheapest here: its tensors are small enough for the allocator to keep their memory.
The tokens are one block of 62 MB, which the system hands out and clears each time.

The target: a float32 network of ResNet-18 shape at 288 weights a token within 4 times a copy of its tensors.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from sane_hf.modeling import WeightTokenizer, flat_from_tokens, tokens_from_flat


def resnet18(classes: int = 10) -> dict[str, torch.Tensor]:
    """Random weights of the shapes of a ResNet-18 for 32x32 images: 11,173,962 parameters, 122 tensors."""
    shapes: dict[str, tuple[int, ...]] = {}

    def convolution(name: str, out: int, into: int, kernel: int) -> None:
        shapes[f"{name}.weight"] = (out, into, kernel, kernel)

    def norm(name: str, size: int) -> None:
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.{leaf}"] = (size,)
        shapes[f"{name}.num_batches_tracked"] = ()

    convolution("conv1", 64, 3, 3)
    norm("bn1", 64)
    into = 64
    for stage, width in enumerate((64, 128, 256, 512), start=1):
        for block in range(2):
            name = f"layer{stage}.{block}"
            convolution(f"{name}.conv1", width, into, 3)
            norm(f"{name}.bn1", width)
            convolution(f"{name}.conv2", width, width, 3)
            norm(f"{name}.bn2", width)
            if into != width:
                convolution(f"{name}.downsample.0", width, into, 1)
                norm(f"{name}.downsample.1", width)
            into = width
    shapes["fc.weight"], shapes["fc.bias"] = (classes, 512), (classes,)
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.tensor(1) if name.endswith("tracked") else torch.randn(shape, generator=generator)
        for name, shape in shapes.items()
    }


def small_cnn(generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Random weights of the shapes of the small CNN of the digits zoo: 1,568 parameters, 10 tensors."""
    shapes = {"conv1": (8, 1, 3, 3), "conv2": (6, 8, 3, 3), "conv3": (4, 6, 2, 2), "fc1": (20, 36), "fc2": (10, 20)}
    weights = {}
    for name, shape in shapes.items():
        weights[f"{name}.weight"] = torch.randn(shape, generator=generator)
        weights[f"{name}.bias"] = torch.randn(shape[0], generator=generator)
    return weights


def medians(repeats: int, **calls: Callable[[], object]) -> dict[str, float]:
    """Median processor seconds of each call, taken in turn after one round of warming up."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            start = time.thread_time()
            call()
            if repeat:
                seconds[name].append(time.thread_time() - start)
    return {name: statistics.median(found) for name, found in seconds.items()}


def report(title: str, seconds: dict[str, float], peer: str) -> None:
    print(f"\n{title}\n{'':42s}{'ms':>10s}{f'x {peer}':>12s}")
    for name, value in seconds.items():
        print(f"{name.replace('_', ' '):42s}{value * 1e3:10.3f}{value / seconds[peer]:12.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=21, help="repetitions of each figure")
    parser.add_argument("--batch", type=int, default=512, help="small CNNs in a batch")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for dtype in (torch.float32, torch.bfloat16):
        network = {name: t.to(dtype) if t.is_floating_point() else t for name, t in resnet18().items()}
        tokenizer, normalizing = WeightTokenizer(288), WeightTokenizer(288, normalization="standardize").fit(network)
        tokens = tokenizer(network)["tokens"]
        seconds = medians(
            arguments.repeats,
            clone=lambda network=network: {name: tensor.clone() for name, tensor in network.items()},
            tokenise=lambda network=network, tokenizer=tokenizer: tokenizer(network),
            tokenise_standardized=lambda network=network, normalizing=normalizing: normalizing(network),
            tokenise_a_window_of_256=lambda network=network, tokenizer=tokenizer: tokenizer(network, 20_000, 256),
            decode=lambda network=network, tokenizer=tokenizer, tokens=tokens: tokenizer.decode(tokens, network),
        )
        report(f"ResNet-18, {dtype}, {tokens.shape[1]} tokens of 288", seconds, "clone")
        if dtype == torch.float32:  # tokens are float32: from half the bytes, the ratio says less
            verdict = "within" if seconds["tokenise"] <= 4 * seconds["clone"] else "ABOVE"
            print(f"tokenising is {verdict} 4 times the copy")

    generator = torch.Generator().manual_seed(0)
    networks = [small_cnn(generator) for _ in range(arguments.batch)]
    tokenizer = WeightTokenizer(64, normalization="standardize", rows="equal").fit(networks)
    layout = tokenizer.layout(networks[0])
    tokens = tokenizer(networks)["tokens"]
    flat = layout.flatten_many(networks)
    seconds = medians(
        arguments.repeats,
        clone=lambda: [{name: tensor.clone() for name, tensor in network.items()} for network in networks],
        tokenise=lambda: tokenizer(networks),
        tokenise_one_by_one=lambda: [tokenizer(network) for network in networks],
        flatten=lambda: layout.flatten_many(networks),
        tokens_from_flat=lambda: tokens_from_flat(flat, layout),
        flat_from_tokens=lambda: flat_from_tokens(tokens, layout),
        decode=lambda: tokenizer.decode(tokens, networks[0]),
        fit=lambda: WeightTokenizer(64, normalization="standardize", rows="equal").fit(networks),
    )
    report(f"{arguments.batch} small CNNs, {layout.num_tokens} tokens of 64, standardized", seconds, "clone")
    for name, value in seconds.items():
        print(f"{name.replace('_', ' '):42s}{arguments.batch / value:10,.0f} networks/s")


if __name__ == "__main__":
    main()
