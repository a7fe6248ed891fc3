"""A model that loses nothing must measure as one that loses nothing; figures follow from their definitions."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from sane_hf.generation import nearest_distance
from sane_hf.modeling import SaneModel
from sane_hf.reporting.generating import generation
from sane_hf.reporting.looking import embedding_map, layer_moves
from sane_hf.reporting.probing import TRAINED, embedding, feature_sets
from sane_hf.reporting.reconstructing import latents_per_weight, reconstruction, with_noise_of_equal_error
from sane_hf.reporting.subject import decode_latents, load_subject


class Lossless(SaneModel):
    """Latents are the tokens."""

    def encode(self, tokens, mask=None, positions=None, attention_mask=None):
        return tokens

    def decode(self, latents, positions=None, attention_mask=None):
        return latents


@pytest.fixture(scope="module")
def lossless(subject):
    model = Lossless(subject.model.config).eval()
    return dataclasses.replace(subject, model=model)


def test_anchors_are_the_best_of_the_train_split_with_one_activation(subject):
    columns, anchors = subject.zoo.columns, subject.anchors
    assert set(subject.split[anchors]) == {"train"}
    assert set(subject.epochs[anchors]) == {6}
    assert len(set(subject.model_ids[anchors])) == len(anchors) <= 20
    assert len(set(columns["activation"][anchors])) == 1
    accuracy = columns["validation_accuracy"]
    assert (np.diff(accuracy[anchors]) <= 0).all()
    assert accuracy[anchors[0]] == accuracy[(subject.split == "train") & (subject.epochs == 6)].max()


def test_accuracy_is_the_zoos(subject):
    rows = subject.rows("test")
    measured = subject.accuracy(subject.flat[torch.from_numpy(rows)], subject.configs(rows))
    np.testing.assert_allclose(measured, subject.zoo.columns["test_accuracy"][rows], atol=1e-6)


def test_lossless_model_reconstructs_everything_and_noise_of_no_length_does_nothing(lossless):
    full = reconstruction(lossless, seed=0)["full"]
    assert full["r2"] == pytest.approx(1, abs=1e-5)
    assert full["decoded_accuracy"] == pytest.approx(full["anchor_accuracy"], abs=2e-3)
    assert full["noise_accuracy_at_same_error"] == pytest.approx(full["anchor_accuracy"], abs=2e-3)
    assert full["test_decoded_accuracy"] == pytest.approx(full["test_accuracy"], abs=2e-3)


def test_fewer_latents_keep_less(lossless):
    result = reconstruction(lossless, seed=0)
    ratios, scores = (np.array([point[key] for point in result["curve"]]) for key in ("latents_per_weight", "r2"))
    assert (np.diff(ratios) > 0).all()
    assert (np.diff(scores) > 0).all()
    assert ratios[-1] == latents_per_weight(lossless) == 1.0
    assert ratios[0] == pytest.approx(0.25, abs=0.05)
    trained = lossless.rows("test", from_epoch=TRAINED)
    expected = lossless.zoo.columns["test_accuracy"][trained].mean()
    assert result["full"]["test_accuracy"] == pytest.approx(expected, abs=1e-6)
    assert set(result["epochs"]) == {"0", "1", "2", "5", "6"}


def test_noise_has_the_length_of_the_error(subject):
    flat = subject.flat[:4]
    decoded = flat + 0.1 * torch.randn_like(flat)
    noised = with_noise_of_equal_error(subject, flat, decoded, torch.Generator().manual_seed(0))
    errors, lengths = ((subject.normalize(other) - subject.normalize(flat)).norm(dim=1) for other in (decoded, noised))
    torch.testing.assert_close(errors, lengths, rtol=1e-4, atol=0)


def test_decoding_is_that_of_model_and_tokenizer(subject):
    network = subject.layout.unflatten(subject.flat[0])
    tokens = subject.tokenizer(network)
    with torch.no_grad():
        latents = subject.model.encode(**tokens)
        decoded = subject.tokenizer.decode(subject.model.decode(latents, tokens["positions"]), reference=network)
    flat = decode_latents(subject, latents)[0]
    torch.testing.assert_close(flat, subject.layout.flatten(decoded), atol=1e-6, rtol=1e-5)


def test_samples_of_a_lossless_model(lossless):
    result = generation(lossless, seed=0, quick=True)
    for point in result["points"]:
        # decoded training networks are the training networks themselves
        assert point["distance_to_decoded"] == pytest.approx(point["distance_to_train"], abs=1e-5)
        assert point["noise_accuracy"] == max(point["isotropic_noise_accuracy"], point["shaped_noise_accuracy"])
        assert 0 <= point["accuracy_epoch_0"] <= 1
        assert point["average_distance"] <= point["distance_to_decoded"] * 1.5
    near, far = result["points"]
    assert near["distance_to_decoded"] < far["distance_to_decoded"]
    assert {point["sampler"] for point in result["others"]} == {
        "kde_shared_anchor",
        "kde_independent",
        "interpolation",
    }
    assert 0 < result["scratch"]["accuracy_epoch_0"] < 0.5
    networks = lossless.normalize(lossless.flat[torch.from_numpy(lossless.last_rows("train"))])
    distances = torch.cdist(networks, networks)
    count = len(networks)
    assert result["independent_distance"] == pytest.approx(float(distances.sum()) / count / (count - 1), rel=1e-4)
    assert nearest_distance(networks[:1], networks)[0].item() == 0


def test_metadata_never_contains_its_target(subject):
    layer_embeddings = embedding(subject)["layers"]
    features = feature_sets(subject, layer_embeddings)
    assert {len(values) for name, values in features.items() if name != "metadata"} == {len(subject.flat)}
    metadata = features["metadata"]
    # every epoch of a model has the same row: nothing in it tells them apart
    for model in np.unique(subject.model_ids)[:3]:
        rows = subject.model_ids == model
        assert len(np.unique(metadata["epoch"][rows], axis=0)) == 1
        assert len(np.unique(metadata["test_accuracy"][rows], axis=0)) == rows.sum()


def test_maps_and_layers(subject):
    layer_embeddings = embedding(subject)["layers"]
    assert layer_embeddings.shape == (len(subject.flat), 5, 2 * subject.model.config.latent_size)
    points, shares = embedding_map(subject, layer_embeddings.reshape(len(layer_embeddings), -1))
    assert points.shape == (len(subject.rows("test")), 2)
    assert 1 >= shares.sum() > 0
    assert shares[0] >= shares[1]
    moves = layer_moves(subject, layer_embeddings)
    assert moves.layers == ["conv1", "conv2", "conv3", "fc1", "fc2"]
    assert moves.distances.shape == (3, 5, 5)
    np.testing.assert_array_equal(moves.distances[:, 0], 0)
    assert (moves.distances[1, -1] > 0).all()


@pytest.mark.parametrize("name", ["training.json", "tokenizer_config.json"])
def test_a_folder_without_a_finished_run_is_refused(finished_run, tmp_path, name):
    for file in finished_run.iterdir():
        if file.is_file() and file.name != name:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match=f"{name} is missing"):
        load_subject(tmp_path)
