"""Repeats the digits run over three seeds and five splits by model: `make results`. Hours; resumes where it stopped.

Every (seed, split) has a folder under runs/results/ and is trained and reported by a process of its own on one thread,
as many at a time as there are cores. Finished ones are not repeated. Mean and spread go to docs/results.md and .json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
SEEDS = (0, 1, 2)
SPLITS = (0, 1, 2, 3, 4)
RECIPE = "recipes/sane-digits.yaml"
FINISHED = "metrics.json"  # the last file that a report writes

PROBES = {
    "probe": "Ridge, all epochs",
    "probe_trained": "Ridge, trained epochs",
    "probe_trees": "Boosted trees, all epochs",
    "probe_trees_trained": "Boosted trees, trained epochs",
}
Metrics = Mapping[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default=RECIPE)
    parser.add_argument("--runs", type=Path, default=Path("runs/results"))
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--splits", type=int, nargs="+", default=SPLITS)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="runs at a time")
    parser.add_argument("--one", type=int, nargs=2, metavar=("SEED", "SPLIT"), help="do one run, in this process")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    if arguments.one:
        run_one(arguments.recipe, arguments.runs, *arguments.one)
        return
    subprocess.run([sys.executable, "datasets_scripts/digits_cnn.py"], check=True)
    seeds = arguments.seeds
    # in this order the first runs already cover every split and every seed
    pairs = [
        (seeds[(n + turn) % len(seeds)], split)
        for turn in range(len(seeds))
        for n, split in enumerate(arguments.splits)
    ]
    failed = run_all(arguments.recipe, arguments.runs, pairs, arguments.workers)
    metrics = {
        (seed, split): json.loads((folder_of(arguments.runs, seed, split) / FINISHED).read_text())
        for seed, split in pairs
        if (folder_of(arguments.runs, seed, split) / FINISHED).exists()
    }
    if metrics:
        write_results(metrics, ROOT / "docs")
        print(f"{len(metrics)} of {len(pairs)} runs: docs/results.md, docs/results.json")
    if failed:
        raise SystemExit("\n".join(f"failed: see {folder}.log" for folder in failed))


def folder_of(runs: Path, seed: int, split: int) -> Path:
    return runs / f"seed-{seed}-split-{split}"


def run_one(recipe: str, runs: Path, seed: int, split: int) -> None:
    """Train and report; both resume by themselves."""
    from sane_hf.reporting import report
    from sane_hf.training import train

    folder = folder_of(runs, seed, split)
    train(recipe, {"seed": seed, "split_seed": split, "output_dir": folder.as_posix()})
    report(folder, seed=seed)


def run_all(recipe: str, runs: Path, pairs: Sequence[tuple[int, int]], workers: int) -> list[Path]:
    """Do what is not finished, each in a process on one thread, and return the folders of the runs that failed."""
    todo = [pair for pair in pairs if not (folder_of(runs, *pair) / FINISHED).exists()]
    runs.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def start(pair: tuple[int, int]) -> Path | None:
        folder = folder_of(runs, *pair)
        command = [sys.executable, __file__, "--recipe", recipe, "--runs", str(runs), "--one", *map(str, pair)]
        with folder.with_name(folder.name + ".log").open("a") as log:
            done = subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)
        return None if done.returncode == 0 else folder

    with (
        ThreadPoolExecutor(workers) as pool,
        tqdm(total=len(pairs), initial=len(pairs) - len(todo), unit="run") as bar,
    ):
        failed = []
        for future in as_completed([pool.submit(start, pair) for pair in todo]):
            bar.update()
            failed += [future.result()] if future.result() else []
    return failed


def leaves(metrics: Metrics, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], float]]:
    """Every number of metrics.json with its path; points of a list go by sampler and bandwidth."""
    for key, value in metrics.items():
        if isinstance(value, Mapping):
            yield from leaves(value, (*path, key))
        elif isinstance(value, list):
            for point in value:
                yield from leaves(point, (*path, key, f"{point['sampler']} {point['bandwidth']:g}"))
        elif isinstance(value, int | float):
            yield (*path, key), float(value)


def aggregate(runs: Mapping[tuple[int, int], Metrics]) -> dict[tuple[str, ...], dict[str, float]]:
    """Mean and spreads of every number over runs.

    Args:
        runs: (seed, split) -> content of metrics.json.

    Returns:
        path -> `mean`; `std` over all runs; `std_over_splits` of the means over seeds; `std_over_seeds` of the means
        over splits; `runs`. A spread of fewer than two values is 0.
    """
    collected: dict[tuple[str, ...], dict[tuple[int, int], float]] = {}
    for pair, metrics in runs.items():
        for path, value in leaves(metrics):
            collected.setdefault(path, {})[pair] = value
    return {
        path: {
            "mean": mean(values.values()),
            "std": _std(values.values()),
            "std_over_splits": _std(_means(values, 1)),
            "std_over_seeds": _std(_means(values, 0)),
            "runs": len(values),
        }
        for path, values in collected.items()
    }


def differences(
    runs: Mapping[tuple[int, int], Metrics], probe: str, target: str, first: str, second: str
) -> list[float]:
    """R² of one feature set minus that of another, paired by run."""
    return [metrics[probe][target][first]["r2"] - metrics[probe][target][second]["r2"] for metrics in runs.values()]


def write_results(runs: Mapping[tuple[int, int], Metrics], docs: Path) -> None:
    """Write docs/results.md and docs/results.json."""
    found = aggregate(runs)
    docs.mkdir(exist_ok=True)
    data = {"runs": sorted(runs), "figures": {"/".join(path): values for path, values in found.items()}}
    (docs / "results.json").write_text(json.dumps(data, indent=1) + "\n")
    (docs / "results.md").write_text(page(runs, found))


def page(runs: Mapping[tuple[int, int], Metrics], found: Mapping[tuple[str, ...], Mapping[str, float]]) -> str:
    """docs/results.md."""
    from sane_hf.reporting.tables import FEATURE_NAMES, TARGET_NAMES, markdown_table

    def cell(*path: str, percent: bool = False) -> str:
        figure, factor, digits = found[path], 100 if percent else 1, 1 if percent else 3
        return f"{figure['mean'] * factor:.{digits}f} ± {figure['std'] * factor:.{digits}f}"

    seeds, splits = (sorted({pair[index] for pair in runs}) for index in (0, 1))
    parts = [
        "# Results on digits-cnn",
        f"Mean ± standard deviation over {len(runs)} runs: {len(seeds)} seeds and {len(splits)} splits by model. "
        "Every run trains anew. Probes and R² are measured on models that it has not seen; anchors are models of the "
        "train split, and all accuracies are on the 497 test images. Written by `make results`; all "
        "figures, with the spread over splits and over seeds by themselves, are in [results.json](results.json).",
        "## What the embedding tells",
        "R² on the test split, and Kendall's τ.",
    ]
    for probe, title in PROBES.items():
        features = [name for name in FEATURE_NAMES if (probe, "epoch", name, "r2") in found]
        header = ["features", *(f"{name}, {score}" for name in TARGET_NAMES.values() for score in ("R²", "τ"))]
        rows = [
            [
                FEATURE_NAMES[name],
                *(cell(probe, target, name, score) for target in TARGET_NAMES for score in ("r2", "tau")),
            ]
            for name in features
        ]
        parts += [f"**{title}**", markdown_table(header, rows)]
    parts += ["Paired over runs, R² of the first minus R² of the second (in brackets in how many runs it is above 0):"]
    contrasts = (
        ("latents", "weight_statistics"),
        ("latents", "log_weight_statistics"),
        ("latents_and_log_statistics", "log_weight_statistics"),
    )
    rows = []
    for probe, title in PROBES.items():
        for first, second in contrasts:
            gains = {target: differences(runs, probe, target, first, second) for target in TARGET_NAMES}
            name = f"{title}: {FEATURE_NAMES[first].strip('*')} − {FEATURE_NAMES[second]}"
            rows.append([name, *(_gain(values) for values in gains.values())])
    parts += [markdown_table(["", *TARGET_NAMES.values()], rows), "## Weights and new networks"]
    single = {
        "R² of reconstructed weights": ("reconstruction", "r2", False),
        "latents per weight": ("reconstruction", "latents_per_weight", False),
        "anchors, test accuracy (%)": ("reconstruction", "anchor_accuracy", True),
        "anchors, decoded (%)": ("reconstruction", "decoded_accuracy", True),
        "anchors with noise of equal error (%)": ("reconstruction", "noise_accuracy_at_same_error", True),
        "networks of the test split, epochs ≥ 5 (%)": ("reconstruction", "test_accuracy", True),
        "networks of the test split, decoded (%)": ("reconstruction", "test_decoded_accuracy", True),
        "from scratch, epoch 0 (%)": ("scratch", "accuracy_epoch_0", True),
        "from scratch, epoch 1 (%)": ("scratch", "accuracy_epoch_1", True),
    }
    parts.append(
        markdown_table(["", "mean ± std"], [[name, cell(*path, percent=p)] for name, (*path, p) in single.items()])
    )
    kinds = ("generation", "generation_other_samplers")
    points = [
        (kind, point)
        for kind in kinds
        for point in sorted({path[1] for path in found if path[0] == kind}, key=lambda name: float(name.split()[-1]))
    ]
    columns = {
        "epoch 0 (%)": "accuracy_epoch_0",
        "epoch 1 (%)": "accuracy_epoch_1",
        "best noise (%)": "noise_accuracy",
        "averaging (%)": "average_accuracy",
        "tolerant noise (%)": "tolerant_noise_accuracy",
        "to nearest decoded": "distance_to_decoded",
        "to nearest train network": "distance_to_train",
    }
    rows = [
        [point, *(cell(kind, point, key, percent="accuracy" in key) for key in columns.values())]
        for kind, point in points
    ]
    parts += [
        "Samples, and what noise and averaging give at the same distance. Tolerant noise is shaped by what behaviour "
        "tolerates of each weight: the knowledge that `kde_tolerant` has of latents, without latents."
    ]
    parts += [markdown_table(["sampler, bandwidth", *columns], rows)]
    return "\n\n".join(parts) + "\n"


def _gain(values: Sequence[float]) -> str:
    return f"{mean(values):+.3f} ± {_std(values):.3f} ({sum(value > 0 for value in values)} of {len(values)})"


def _means(values: Mapping[tuple[int, int], float], index: int) -> list[float]:
    """Means over the runs that share a seed (index 0) or a split (1)."""
    groups: dict[int, list[float]] = {}
    for pair, value in values.items():
        groups.setdefault(pair[index], []).append(value)
    return [mean(group) for group in groups.values()]


def _std(values: Iterable[float]) -> float:
    values = list(values)
    return stdev(values) if len(values) > 1 else 0.0


if __name__ == "__main__":
    main()
