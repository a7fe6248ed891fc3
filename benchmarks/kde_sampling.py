"""Time of sampling latents: all tokens at once against one scikit-learn kernel density estimate per token.

    python benchmarks/kde_sampling.py [--tokens 50000] [--dimensions 128] [--anchors 10] [--samples 10]

The peer fits and samples one `KernelDensity` per token, as the original SANE does. It is timed on a part of the tokens
in the same run and extrapolated to all; its time per token is constant.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from sklearn.neighbors import KernelDensity

from sane_hf.generation import SAMPLERS


def seconds(function: Callable[[], object], repeats: int) -> float:
    function()  # the first call pays for memory and thread start-up
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def one_estimate_per_token(anchors: torch.Tensor, samples: int, bandwidth: float) -> list:
    points = anchors.transpose(0, 1).double().numpy()
    return [KernelDensity(bandwidth=bandwidth).fit(token).sample(samples, random_state=0) for token in points]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=50_000)
    parser.add_argument("--dimensions", type=int, default=128)
    parser.add_argument("--anchors", type=int, default=10)
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--part", type=int, default=1000, help="tokens on which the peer is timed")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(0)
    anchors = torch.randn(options.anchors, options.tokens, options.dimensions, generator=generator)
    part = anchors[:, : options.part]
    peer = seconds(lambda: one_estimate_per_token(part, options.samples, 0.2), 1)
    peer *= options.tokens / part.shape[1]
    shape = f"{options.samples} networks of {options.tokens} tokens x {options.dimensions}, {options.anchors} anchors"
    print(f"{shape}, {options.threads} thread(s)")
    print(f"{'':32}{'seconds':>10}{'ratio':>10}")
    print(f"{'scikit-learn, one KDE per token':32}{peer:10.3f}{1:10.1f}   extrapolated from {part.shape[1]} tokens")
    for name, sample in SAMPLERS.items():
        ours = seconds(lambda sample=sample: sample(anchors, options.samples, 0.2, generator), options.repeats)
        print(f"{name:32}{ours:10.3f}{peer / ours:10.1f}")


if __name__ == "__main__":
    main()
