"""Train a population of networks on one image set and write it as a zoo.

The population is cut into chunks of 32 networks. A chunk is trained at once by one process on one thread, depends on
nothing but the settings, and is kept on disk when done: so the zoo is the same however many processes work on it, and
an interrupted build resumes where it was.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import json
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sane_hf.architectures import get_architecture
from sane_hf.checkpoints import load_checkpoint, save_checkpoint, write_json_atomic
from sane_hf.members import evaluate, stack, train

from . import hyperparameters as hyper
from .images import ImageSplits, load_images
from .info import describe_architecture
from .schema import SPLIT_SHARES, SPLITS
from .writing import ZooWriter

logger = logging.getLogger(__name__)

SAVED_EPOCHS = (0, 1, 2, 5, 10, 15, 20, 25)
CHUNK = 32  # networks trained at once; part of the result, since sums are rounded in another order in other sizes
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
METRICS = ("train_accuracy", "validation_accuracy", "test_accuracy", "train_loss", "validation_loss", "test_loss")


@dataclass(frozen=True)
class Population:
    """What determines a population, and with it every weight of its zoo.

    Attributes:
        name: of the zoo; model ids begin with it.
        architecture: name of the architecture of all networks.
        images: name of the image set.
        networks: how many, at least 3 (one for each split).
        epochs: of training; saved are those of 0, 1, 2, 5, 10, 15, 20, 25 that fall within, and the last.
        batch_size: images in a batch.
        seed: of everything that is drawn.
        fixed: vary only the networks' seeds.
    """

    name: str
    architecture: str = "cnn_small"
    images: str = "digits"
    networks: int = 1000
    epochs: int = 25
    batch_size: int = 32
    seed: int = 0
    fixed: bool = False

    def __post_init__(self) -> None:
        get_architecture(self.architecture)
        for name, least in (("networks", len(SPLITS)), ("epochs", 1), ("batch_size", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, found {getattr(self, name)}")

    def saved_epochs(self) -> tuple[int, ...]:
        """Return the epochs whose checkpoints are kept."""
        return tuple(sorted({epoch for epoch in SAVED_EPOCHS if epoch <= self.epochs} | {self.epochs}))

    def settings(self) -> dict[str, Any]:
        """Return all that determines the zoo, as JSON values: kept beside it to recognise what was built."""
        varied: dict[str, Any] = {"seed": "per network"}
        if not self.fixed:
            varied |= {
                "activation": list(hyper.ACTIVATIONS),
                "initialization": list(hyper.INITIALIZATIONS),
                "learning_rate": ["log-uniform", *hyper.LEARNING_RATES],
                "dropout": list(hyper.DROPOUTS),
                "weight_decay": list(hyper.WEIGHT_DECAYS),
            }
        return dataclasses.asdict(self) | {
            "saved_epochs": list(self.saved_epochs()),
            "optimizer": "adam, weight decay L2",
            "networks_at_once": CHUNK,
            "varied": varied,
        }

    def draw(self) -> list[hyper.Hyperparameters]:
        """Return the hyperparameters of every network."""
        return [hyper.draw_hyperparameters(index, self.seed, self.fixed) for index in range(self.networks)]

    def model_id(self, index: int) -> str:
        """Return the id of network `index`."""
        return f"{self.name}-{index:04d}"

    def split_of(self) -> list[str]:
        """Return the split of every network: 70/15/15 by model, drawn from the seed, none empty."""
        shares = [max(1, round(share * self.networks)) for share in SPLIT_SHARES[1:]]
        order = np.random.default_rng([self.seed, self.networks, 1]).permutation(self.networks)
        split = [SPLITS[0]] * self.networks
        for rank, index in enumerate(order[: sum(shares)]):
            split[index] = SPLITS[1] if rank < shares[0] else SPLITS[2]
        return split

    def chunks(self) -> list[list[int]]:
        """Return the networks of each chunk: those of equal activation together, in order."""
        drawn = self.draw()
        chunks = []
        for activation in sorted({network.activation for network in drawn}):
            same = [index for index, network in enumerate(drawn) if network.activation == activation]
            chunks += [same[start : start + CHUNK] for start in range(0, len(same), CHUNK)]
        return chunks


def train_population(
    out: str | os.PathLike[str], population: Population, workers: int | None = None, progress: bool = True
) -> bool:
    """Train a population and write its zoo.

    A finished zoo of the same settings is left as it is. An interrupted build keeps its finished chunks in a hidden
    folder beside `out`, and the same call goes on from there; the result is the same to the last bit on the same
    type of machine.

    Args:
        out: folder of the zoo.
        population: what to train.
        workers: processes of one thread each; None means one per core. It does not change the result.
        progress: show a progress bar.

    Returns:
        Whether anything was built: False if the finished zoo was there already.

    Raises:
        ValueError: `workers` below 1; `out` holds something else, or a zoo (finished or not) of other settings,
            naming the first that differs.
    """
    workers = _cores() if workers is None else workers
    if workers < 1:
        raise ValueError(f"workers must be at least 1, found {workers}")
    out = Path(out)
    building = out.parent / f".{out.name}.building"
    settings = population.settings()
    if out.exists():
        if not (out / "zoo.json").is_file():
            raise ValueError(f"{out} exists and is not a zoo (it has no zoo.json); name another folder or remove it")
        _same_settings(out, json.loads((out / "zoo.json").read_text(encoding="utf-8"))["build"], settings)
        shutil.rmtree(building, ignore_errors=True)
        logger.info("%s is finished and is not built again", out)
        return False
    if (building / "settings.json").is_file():
        _same_settings(building, json.loads((building / "settings.json").read_text(encoding="utf-8")), settings)
    else:
        building.mkdir(parents=True, exist_ok=True)
        write_json_atomic(building / "settings.json", settings)
    chunks = population.chunks()
    paths = [building / f"chunk-{number:05d}.safetensors" for number in range(len(chunks))]
    _train_chunks(population, chunks, paths, workers, progress)
    _assemble(out, population, settings, chunks, paths)
    shutil.rmtree(building)
    return True


def _same_settings(where: Path, found: dict[str, Any], asked: dict[str, Any]) -> None:
    for name, value in asked.items():
        if found.get(name) != value:
            raise ValueError(
                f"{where} holds a zoo built with {name} = {found.get(name)!r}, asked for is {value!r}; "
                "name another folder, or remove this one to build it anew"
            )


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _train_chunks(
    population: Population, chunks: list[list[int]], paths: list[Path], workers: int, progress: bool
) -> None:
    """Train the chunks that are not on disk yet."""
    missing = [number for number, path in enumerate(paths) if not path.exists()]
    done = population.networks - sum(len(chunks[number]) for number in missing)
    if done:
        logger.info("resuming: %d of %d networks are trained already", done, population.networks)
    started, accuracies = time.monotonic(), []
    bar = tqdm(total=population.networks, initial=done, desc=population.name, unit="network", disable=not progress)
    with bar:
        tasks = [(population, chunks[number], paths[number]) for number in missing]
        for accuracy in _run(tasks, min(workers, max(1, len(tasks)))):
            accuracies += accuracy.tolist()
            rate = len(accuracies) / (time.monotonic() - started) * 60
            low, middle, high = 100 * np.nanpercentile(accuracies, (5, 50, 95))
            bar.set_postfix_str(f"{rate:,.0f}/min, test accuracy {low:.0f}-{middle:.0f}-{high:.0f} %", refresh=False)
            bar.update(len(accuracy))


def _run(tasks: list[tuple[Population, list[int], Path]], workers: int) -> Iterator[Tensor]:
    """Yield the final test accuracies of each chunk as it is done."""
    if workers == 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            for task in tasks:
                yield _train_chunk(*task)
        finally:
            torch.set_num_threads(threads)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=start_worker) as pool:
        futures = [pool.submit(_train_chunk, *task) for task in tasks]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool as error:
            raise RuntimeError(
                "a training process was ended from outside, perhaps for lack of memory; finished networks are kept: "
                "run the same again, with fewer workers if need be"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def start_worker() -> None:
    """Prepare a process: one thread; an interrupt lets it finish its chunk; it never outlives its parent."""
    torch.set_num_threads(1)
    if sys.platform == "linux":
        # glibc gives large tensors back to the system after every step and fetches them anew, page by page: a third
        # of the time. Keep up to 1 GiB instead.
        allocator = ctypes.CDLL(None)
        if hasattr(allocator, "mallopt"):
            allocator.mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)
            allocator.mallopt(_M_TRIM_THRESHOLD, 2**30)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def leave_with_parent() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()


_images = functools.lru_cache(maxsize=1)(load_images)  # once per process


def _train_chunk(population: Population, indices: list[int], path: Path) -> Tensor:
    """Train the networks of one chunk, save their checkpoints and metrics, and return their last test accuracies."""
    images = _images(population.images)
    drawn = population.draw()
    networks = [drawn[index] for index in indices]
    configs = [network.config() for network in networks]
    weights = stack(
        [
            hyper.initialize(population.architecture, network.config(), network.initialization, network.seed)
            for network in networks
        ]
    )
    kept = [weights]

    def keep(epoch: int, _: Tensor, trained: dict[str, Tensor]) -> None:
        if epoch in population.saved_epochs():
            kept.append({name: tensor.clone() for name, tensor in trained.items()})

    train(
        population.architecture,
        configs,
        weights,
        images.train.images,
        images.train.labels,
        population.epochs,
        torch.tensor([network.learning_rate for network in networks]),
        weight_decay=torch.tensor([network.weight_decay for network in networks]),
        batch_size=population.batch_size,
        seeds=[network.seed for network in networks],
        members_at_once=CHUNK,
        on_epoch=keep,
    )
    metrics = torch.stack([_metrics(population.architecture, configs, weights, images) for weights in kept], dim=1)
    result = {f"weights/{name}": torch.stack([weights[name] for weights in kept], dim=1) for name in weights}
    save_checkpoint(result | {"metrics": metrics}, path)
    return metrics[:, -1, METRICS.index("test_accuracy")]


def _metrics(architecture: str, configs: list[Any], weights: dict[str, Tensor], images: ImageSplits) -> Tensor:
    """Measure (m, 6) in the order of METRICS."""
    measured = [evaluate(architecture, configs, weights, split.images, split.labels) for _, split in images.items()]
    return torch.stack([result[kind] for kind in ("accuracy", "loss") for result in measured], dim=1)


def _assemble(
    out: Path, population: Population, settings: dict[str, Any], chunks: list[list[int]], paths: list[Path]
) -> None:
    """Write the finished chunks as a zoo, model after model."""
    drawn, split_of = population.draw(), population.split_of()
    results = [load_checkpoint(path, allow_nonfinite=True) for path in paths]
    place = {index: (number, row) for number, chunk in enumerate(chunks) for row, index in enumerate(chunk)}
    everyone = range(population.networks)
    diverged = [index for index in everyone if not _finite(results[place[index][0]], place[index][1])]
    for index in diverged:
        logger.warning("%s diverged to non-finite weights and is left out of the zoo", population.model_id(index))
    declared = get_architecture(population.architecture)
    architectures = {declared.name: describe_architecture(declared.name, drawn[0].config())}
    build = settings | {"left_out": [population.model_id(index) for index in diverged]}
    with ZooWriter(out, population.name, architectures, build) as writer:
        for index in sorted(set(everyone) - set(diverged)):
            number, row = place[index]
            config = declared.config_json(drawn[index].config())
            common = {
                "model_id": population.model_id(index),
                "architecture": declared.name,
                "architecture_config": config,
            } | dataclasses.asdict(drawn[index])
            for step, epoch in enumerate(population.saved_epochs()):
                metrics = results[number]["metrics"][row, step].tolist()
                weights = {
                    name.removeprefix("weights/"): tensor[row, step]
                    for name, tensor in results[number].items()
                    if name != "metrics"
                }
                writer.add(
                    split_of[index],
                    common | {"epoch": epoch, "weights": weights} | dict(zip(METRICS, metrics, strict=True)),
                )


def _finite(result: dict[str, Tensor], row: int) -> bool:
    return all(bool(tensor[row].isfinite().all()) for name, tensor in result.items() if name != "metrics")
