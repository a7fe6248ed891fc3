"""Speed of NT-Xent, forward and backward, against the broadcast form, on one thread.

    python benchmarks/nt_xent.py

The peer does as the original SANE code does: cosine similarities of all pairs of views from tensors of (2N, 1, C) and
(1, 2N, C), positives and negatives picked from them, and a cross-entropy over their concatenation. Both give the same
loss and gradient, which is checked first. Every figure is the median processor time of interleaved repetitions in this
run.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from sane_hf.modeling.losses_sane import nt_xent

Loss = Callable[[Tensor, Tensor, float], Tensor]


def broadcast_nt_xent(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """The same loss from a broadcast cosine, O(N² C) memory."""
    count = len(first)
    views = torch.cat([first, second])
    similarity = torch.cosine_similarity(views[:, None], views[None], dim=2) / temperature
    positive = torch.cat([similarity.diagonal(count), similarity.diagonal(-count)])[:, None]
    negative = ~torch.eye(count, dtype=torch.bool).repeat(2, 2)
    logits = torch.cat([positive, similarity[negative].view(2 * count, -1)], dim=1)
    labels = torch.zeros(2 * count, dtype=torch.long)
    return torch.nn.functional.cross_entropy(logits, labels)


def step(loss: Loss, views: Tensor) -> tuple[Tensor, Tensor]:
    """Forward and backward: the loss and its gradient."""
    views = views.detach().requires_grad_()
    value = loss(*views.unbind(0), 0.1)
    value.backward()
    return value.detach(), views.grad


def median_seconds(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median processor seconds of each call, taken in turn after one round of warming up."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            start = time.thread_time()
            call()
            if repeat:
                seconds[name].append(time.thread_time() - start)
    return {name: statistics.median(found) for name, found in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 128, 512], help="networks in a batch")
    parser.add_argument("--features", type=int, default=30, help="size of the projection (30: the original's)")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"{'networks':>8}  {'broadcast':>11}  {'product':>11}  faster")
    for count in options.batches:
        views = torch.randn(2, count, options.features).relu()  # the projection head ends in a ReLU
        for ours, theirs in zip(step(nt_xent, views), step(broadcast_nt_xent, views), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)
        calls = {
            "broadcast": lambda views=views: step(broadcast_nt_xent, views),
            "product": lambda views=views: step(nt_xent, views),
        }
        seconds = median_seconds(calls, options.repeats)
        times = "".join(f"{seconds[name] * 1e3:8.2f} ms  " for name in calls)
        print(f"{count:8}  {times}{seconds['broadcast'] / seconds['product']:5.1f}x")


if __name__ == "__main__":
    main()
