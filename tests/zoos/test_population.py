"""A population: split by model, measured rightly, the same every time, and never built twice."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

from sane_hf.architectures import build
from sane_hf.zoos import hyperparameters, load_images, load_zoo, population, zoo_info
from sane_hf.zoos.population import Population, train_population

SMALL = Population("tiny", networks=8, epochs=3)


def build_zoo(path, what=SMALL, **options):
    return train_population(path, what, workers=1, progress=False, **options)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    path = tmp_path_factory.mktemp("zoos") / "tiny"
    assert build_zoo(path)
    return path


def test_digits_are_split_and_standardised():
    digits = load_images("digits")
    assert [len(split) for _, split in digits.items()] == [1000, 300, 497]
    assert digits.train.images.mean().abs() < 1e-6
    assert digits.train.images.std() == pytest.approx(1, abs=1e-6)
    everything = torch.cat([split.images for _, split in digits.items()]).flatten(1)
    assert len(everything.unique(dim=0)) == len(everything)  # no image in two splits
    assert all(len(split.labels.unique()) == 10 for _, split in digits.items())
    with pytest.raises(ValueError, match="'mnits' is unknown"):
        load_images("mnits")


def test_splits_are_by_model_and_epochs_are_whole(zoo):
    found = load_zoo(zoo)
    models = {split: sorted(set(part["model_id"])) for split, part in found.items()}
    assert [len(models[split]) for split in ("train", "validation", "test")] == [6, 1, 1]
    assert sorted(sum(models.values(), [])) == [f"tiny-{index:04d}" for index in range(8)]
    for part in found.values():
        assert part["epoch"] == [0, 1, 2, 3] * (len(part) // 4)


def test_recorded_metrics_are_those_of_the_weights(zoo):
    digits = load_images("digits")
    for part in load_zoo(zoo).values():
        for example in part:
            network = build(example["architecture"], example["architecture_config"]).eval()
            network.load_state_dict(example["weights"])
            assert json.loads(example["architecture_config"])["activation"] == example["activation"]
            for split, images in digits.items():
                logits = network(images.images)
                accuracy = (logits.argmax(1) == images.labels).float().mean().item()
                assert example[f"{split}_accuracy"] == pytest.approx(accuracy, abs=1.1 / len(images))
                loss = nn.functional.cross_entropy(logits, images.labels).item()
                assert example[f"{split}_loss"] == pytest.approx(loss, abs=1e-5)
            gap = example["train_accuracy"] - example["test_accuracy"]
            assert example["generalization_gap"] == pytest.approx(gap, abs=1e-6)


def test_networks_learn_and_differ(zoo):
    train = load_zoo(zoo, "train").with_format("pandas")[:]
    losses = train.pivot(index="model_id", columns="epoch", values="train_loss")
    assert (losses[3] < losses[0]).all()
    assert train["learning_rate"].nunique() == 6
    assert train["activation"].nunique() == 2


def test_the_same_settings_give_the_same_zoo_and_another_seed_another(zoo, tmp_path):
    first = zoo_info(zoo)
    build_zoo(tmp_path / "again")
    again = zoo_info(tmp_path / "again")
    assert again["content_hash"] == first["content_hash"]
    build_zoo(tmp_path / "other", Population("tiny", networks=8, epochs=3, seed=1))
    assert zoo_info(tmp_path / "other")["content_hash"] != first["content_hash"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "other"]  # nothing left beside


def test_a_finished_zoo_is_left_alone(zoo, monkeypatch):
    def fail(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr(population, "_train_chunk", fail)
    before = (zoo / "zoo.json").stat().st_mtime_ns
    assert build_zoo(zoo) is False
    assert (zoo / "zoo.json").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="built with networks = 8, asked for is 9"):
        build_zoo(zoo, Population("tiny", networks=9, epochs=3))
    (zoo.parent / "else").mkdir()
    with pytest.raises(ValueError, match="is not a zoo"):
        build_zoo(zoo.parent / "else")


def test_an_interrupted_build_goes_on_by_chunks(zoo, tmp_path, monkeypatch):
    whole, trained = population._train_chunk, []

    def stop_in_second(task, indices, path):
        if trained:
            raise KeyboardInterrupt
        trained.append(indices)
        return whole(task, indices, path)

    monkeypatch.setattr(population, "_train_chunk", stop_in_second)
    with pytest.raises(KeyboardInterrupt):
        build_zoo(tmp_path / "zoo")
    assert not (tmp_path / "zoo").exists()
    with pytest.raises(ValueError, match="with epochs = 3, asked for is 4"):
        build_zoo(tmp_path / "zoo", Population("tiny", networks=8, epochs=4))

    def note(task, indices, path):
        trained.append(indices)
        return whole(task, indices, path)

    monkeypatch.setattr(population, "_train_chunk", note)
    build_zoo(tmp_path / "zoo")
    assert sorted(sum(trained, [])) == list(range(8))  # every network once
    assert zoo_info(tmp_path / "zoo")["content_hash"] == zoo_info(zoo)["content_hash"]
    assert [path.name for path in tmp_path.iterdir()] == ["zoo"]


def test_fixed_varies_the_seed_only(tmp_path):
    drawn = Population("seeds", networks=20, fixed=True).draw()
    assert len({network.seed for network in drawn}) == 20
    assert len({(network.activation, network.initialization, network.learning_rate) for network in drawn}) == 1
    varied = Population("varied", networks=200).draw()
    for name, count in (("activation", 2), ("initialization", 6), ("dropout", 4), ("weight_decay", 4)):
        assert len({getattr(network, name) for network in varied}) == count
    assert varied[:100] == Population("varied", networks=100).draw()


def test_a_diverged_network_is_left_out_and_named(tmp_path, monkeypatch, caplog):
    draw = hyperparameters.draw_hyperparameters

    def diverge(index, seed, fixed):
        drawn = draw(index, seed, fixed)
        return dataclasses.replace(drawn, learning_rate=1e38, activation="relu") if index == 2 else drawn

    monkeypatch.setattr(hyperparameters, "draw_hyperparameters", diverge)
    build_zoo(tmp_path / "zoo", Population("tiny", networks=6, epochs=1))
    info = zoo_info(tmp_path / "zoo")
    assert info["build"]["left_out"] == ["tiny-0002"]
    assert sum(split["models"] for split in info["splits"].values()) == 5
    assert "tiny-0002 diverged" in caplog.text


def test_initialisations_have_their_scale():
    for name, low, high in (("uniform", 0.09, 0.11), ("normal", 0.09, 0.11), ("kaiming_normal", 0.2, 0.27)):
        state_dict = hyperparameters.initialize("cnn_small", {"activation": "relu"}, name, seed=3)
        assert low < state_dict["fc1.weight"].std() < high
    before = torch.get_rng_state()
    one, same, other = (hyperparameters.initialize("cnn_small", {}, "xavier_normal", seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(one["fc1.weight"], same["fc1.weight"])
    assert not torch.equal(one["fc1.bias"], other["fc1.bias"])
    with pytest.raises(ValueError, match="initialization 'zeros' is unknown"):
        hyperparameters.initialize("cnn_small", {}, "zeros", seed=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"networks": 2}, "networks must be at least 3"), ({"epochs": 0}, "epochs"), ({"architecture": "x"}, "'x'")],
)
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Population("tiny", **change)


def test_no_worker_is_refused(tmp_path):
    with pytest.raises(ValueError, match="workers must be at least 1, found 0"):
        train_population(tmp_path / "zoo", SMALL, workers=0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_kill_9_and_resume_end_in_the_same_zoo(root, tmp_path):
    command = [sys.executable, str(root / "datasets_scripts" / "digits_cnn.py"), "--networks", "200", "--epochs", "5"]
    environment = os.environ | {"PYTHONPATH": str(root)}

    def run(name, workers):
        return [*command, "--out", str(tmp_path / name / "zoo"), "--workers", str(workers)]

    subprocess.run(run("whole", 1), check=True, env=environment, cwd=tmp_path)
    building = tmp_path / "killed" / ".zoo.building"
    for kept in (1, 3):
        process = subprocess.Popen(run("killed", 2), env=environment, cwd=tmp_path)
        while len(list(building.glob("chunk-*.safetensors"))) < kept and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert building.is_dir()
    subprocess.run(run("killed", 2), check=True, env=environment, cwd=tmp_path)
    assert not building.exists()
    whole, killed = (zoo_info(tmp_path / name / "zoo") for name in ("whole", "killed"))
    assert whole["content_hash"] == killed["content_hash"]
    assert whole["splits"] == killed["splits"]
