"""`make results`: finished runs are not repeated, and the page says what the runs say."""

from __future__ import annotations

import importlib.util
import json

import pytest


@pytest.fixture(scope="module")
def results(root):
    spec = importlib.util.spec_from_file_location("results", root / "benchmarks" / "results.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def metrics(latents: float) -> dict:
    features = {"latents": latents, "weight_statistics": 0.5, "log_weight_statistics": 0.6}
    features["latents_and_log_statistics"] = 0.65
    probe = {
        target: {name: {"r2": value, "tau": value / 2} for name, value in features.items()}
        for target in ("test_accuracy", "epoch", "generalization_gap")
    }
    measured = ("noise_accuracy", "average_accuracy", "tolerant_noise_accuracy")
    point = dict.fromkeys(("distance_to_decoded", "distance_to_train", *measured), 0.3)
    point |= {"sampler": "kde", "bandwidth": 0.1, "accuracy_epoch_0": 0.9, "accuracy_epoch_1": 0.95}
    names = ("r2", "latents_per_weight", "anchor_accuracy", "decoded_accuracy", "noise_accuracy_at_same_error")
    names += ("test_accuracy", "test_decoded_accuracy")
    return {
        **dict.fromkeys(("probe", "probe_trained", "probe_trees", "probe_trees_trained"), probe),
        "reconstruction": dict.fromkeys(names, 0.9),
        "generation": [point],
        "generation_other_samplers": [point | {"sampler": "other"}],
        "scratch": {"accuracy_epoch_0": 0.1, "accuracy_epoch_1": 0.4},
        "seconds": {"training": 300.0},
        "peak_memory_bytes": 10,
    }


@pytest.fixture
def runs():
    return {(seed, split): metrics(0.5 + 0.1 * split + 0.01 * seed) for seed in range(3) for split in range(2)}


def test_spreads_over_splits_and_over_seeds_are_told_apart(results, runs):
    found = results.aggregate(runs)["probe", "epoch", "latents", "r2"]
    assert found["mean"] == pytest.approx(0.56)
    assert found["std_over_splits"] == pytest.approx(0.1 / 2**0.5)
    assert found["std_over_seeds"] == pytest.approx(0.01)
    assert found["runs"] == 6
    assert results.aggregate({(0, 0): metrics(0.5)})["probe", "epoch", "latents", "r2"]["std"] == 0


def test_page_and_data(results, runs, tmp_path):
    results.write_results(runs, tmp_path)
    page = (tmp_path / "results.md").read_text()
    assert "6 runs: 3 seeds and 2 splits" in page
    assert "| **latents** | 0.560 ± 0.055 | 0.280 ± 0.028 |" in page
    assert "+0.060 ± 0.055 (5 of 6)" in page  # the first run ties: not counted
    assert "| kde 0.1 | 90.0 ± 0.0 | 95.0 ± 0.0 |" in page
    data = json.loads((tmp_path / "results.json").read_text())
    assert data["figures"]["scratch/accuracy_epoch_1"]["mean"] == pytest.approx(0.4)


def test_finished_runs_are_not_started(results, tmp_path, monkeypatch):
    started = []

    def run(command, **_):
        started.append(command[-2:])
        return type("Done", (), {"returncode": int(command[-1] == "1")})

    monkeypatch.setattr(results.subprocess, "run", run)
    finished = results.folder_of(tmp_path, 0, 0)
    finished.mkdir()
    (finished / results.FINISHED).write_text("{}")
    failed = results.run_all("recipe.yaml", tmp_path, [(0, 0), (1, 0), (0, 1)], workers=2)
    assert sorted(started) == [["0", "1"], ["1", "0"]]
    assert failed == [results.folder_of(tmp_path, 0, 1)]
