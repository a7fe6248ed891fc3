"""Time the training of a population against the same networks one at a time, on digits.

    python benchmarks/population.py

Both run in two processes of one thread each, in turns, on the same images with the same hyperparameters; only the
steps of training are timed. Both processes are set up as a population's are. "One at a time" is a plain loop over
`torch.optim.Adam(fused=True)`, its fastest form on a CPU.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor

import torch
from torch import nn

from sane_hf.architectures import build
from sane_hf.members import stack, train
from sane_hf.zoos import load_images
from sane_hf.zoos.hyperparameters import Hyperparameters, draw_hyperparameters, initialize
from sane_hf.zoos.population import start_worker

ARCHITECTURE, BATCH = "cnn_small", 32


def at_once(networks: list[Hyperparameters], epochs: int) -> float:
    """Return the seconds that `sane_hf.members.train` takes for these networks."""
    images = load_images("digits").train
    configs = [network.config() for network in networks]
    start = [initialize(ARCHITECTURE, network.config(), network.initialization, network.seed) for network in networks]
    weights = stack(start)
    rates = torch.tensor([network.learning_rate for network in networks])
    decays = torch.tensor([network.weight_decay for network in networks])
    seeds = [network.seed for network in networks]
    started = time.perf_counter()
    train(
        ARCHITECTURE,
        configs,
        weights,
        images.images,
        images.labels,
        epochs,
        rates,
        weight_decay=decays,
        batch_size=BATCH,
        seeds=seeds,
    )
    return time.perf_counter() - started


def one_at_a_time(networks: list[Hyperparameters], epochs: int) -> float:
    """Return the seconds that a plain loop takes for these networks."""
    images = load_images("digits").train
    seconds = 0.0
    for network in networks:
        module = build(ARCHITECTURE, network.config())
        module.load_state_dict(initialize(ARCHITECTURE, network.config(), network.initialization, network.seed))
        optimizer = torch.optim.Adam(
            module.parameters(), lr=network.learning_rate, weight_decay=network.weight_decay, fused=True
        )
        started = time.perf_counter()
        for _ in range(epochs):
            for index in torch.randperm(len(images)).split(BATCH):
                optimizer.zero_grad()
                nn.functional.cross_entropy(module(images.images[index]), images.labels[index]).backward()
                optimizer.step()
        seconds += time.perf_counter() - started
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=int, default=128, help="trained at once, in both processes together (128)")
    parser.add_argument("--peers", type=int, default=8, help="of them trained one at a time (8)")
    parser.add_argument("--epochs", type=int, default=2, help="of training (2)")
    parser.add_argument("--repeats", type=int, default=6, help="of both, in turns; the best counts (6)")
    arguments = parser.parse_args()

    drawn = [draw_hyperparameters(index, seed=0) for index in range(arguments.networks)]
    # chunks of a population share their activation; so does each process here
    drawn.sort(key=lambda network: network.activation)
    images = len(load_images("digits").train)
    steps = arguments.epochs * -(-images // BATCH)
    rates: dict[str, float] = {"at once": 0.0, "one at a time": 0.0}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, context, initializer=start_worker) as pool:
        for repeat in range(arguments.repeats + 1):
            for name, run, networks in (
                ("at once", at_once, drawn),
                ("one at a time", one_at_a_time, drawn[:: len(drawn) // arguments.peers][: arguments.peers]),
            ):
                halves = networks[: len(networks) // 2], networks[len(networks) // 2 :]
                seconds = pool.map(run, halves, [arguments.epochs] * 2)
                rate = sum(len(half) * steps / taken for half, taken in zip(halves, seconds, strict=True))
                if repeat > 0:  # the first round warms up
                    rates[name] = max(rates[name], rate)

    print(f"{ARCHITECTURE}, batch {BATCH}, two processes of one thread")
    for name, rate in rates.items():
        per_minute = 60 * rate / (25 * steps / arguments.epochs)
        print(f"{name:14s} {rate:10,.0f} network-steps/s {per_minute:8,.0f} networks/min of 25 epochs")
    print(f"{'ratio':14s} {rates['at once'] / rates['one at a time']:10.1f}   (wanted: at least 5)")


if __name__ == "__main__":
    main()
