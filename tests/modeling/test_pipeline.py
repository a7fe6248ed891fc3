"""The embedding pipeline gives the embedding, whatever the form of the input, the batch, the window, the place."""

import logging

import pytest
import torch
from safetensors.torch import save_file
from transformers import pipeline

from sane_hf.modeling.configuration_sane import SaneConfig
from sane_hf.modeling.modeling_sane import SaneModel
from sane_hf.modeling.permutation_sane import PermutationGroups
from sane_hf.modeling.pipeline_sane import WeightFeatureExtractionPipeline
from sane_hf.modeling.tokenization_sane import WeightTokenizer


@pytest.fixture
def embed(checkpoint):
    return WeightFeatureExtractionPipeline(checkpoint.model, checkpoint.tokenizer, device="cpu")


@pytest.fixture
def mixed():
    """A tokenizer without statistics, a model in training mode with dropout, and networks of three architectures."""
    torch.manual_seed(0)
    sizes = {"token_size": 4, "latent_size": 3, "hidden_size": 8, "num_attention_heads": 2, "dropout": 0.5}
    model = SaneModel(SaneConfig(**sizes, latents_per_weight=1.0, token_statistics=True)).train()
    networks = [
        torch.nn.Sequential(torch.nn.Linear(3, width), torch.nn.Linear(width, 2)).state_dict() for width in (9, 2, 5)
    ]
    return WeightFeatureExtractionPipeline(model, WeightTokenizer(token_size=4), device="cpu"), networks


@torch.no_grad()
def expected(checkpoint, readout="mean"):
    """By hand: all networks at once, whole."""
    batch = checkpoint.tokenizer(checkpoint.networks)
    output = checkpoint.model.sane(**batch)
    if readout == "mean":
        return output.pooler_output
    layers = batch["positions"][0, :, 1]
    return torch.cat([output.latents[:, layers == layer].mean(dim=1) for layer in layers.unique()], dim=1)


@pytest.mark.parametrize("readout", ["mean", "layer_mean"])
def test_it_is_the_readout_of_the_latents(embed, checkpoint, readout):
    found = embed(checkpoint.networks, readout=readout)
    assert [row.shape for row in found] == [(3 if readout == "mean" else 6,)] * 5
    torch.testing.assert_close(torch.stack(found), expected(checkpoint, readout), atol=1e-6, rtol=0)


@pytest.mark.parametrize("windows", [{}, {"window": 3}, {"window": 4, "halo": 2}], ids=["whole", "cut", "halo"])
def test_it_does_not_depend_on_batch_and_form(embed, checkpoint, windows):
    single = torch.stack([embed(network, **windows) for network in checkpoint.networks])
    for batch_size in (2, 3, 64):
        rows = embed(checkpoint.networks, batch_size=batch_size, **windows)
        torch.testing.assert_close(torch.stack(rows), single, atol=1e-6, rtol=0)
    lazy = embed((network for network in checkpoint.networks), batch_size=2, **windows)
    torch.testing.assert_close(torch.stack(list(lazy)), single, atol=1e-6, rtol=0)
    for files in (checkpoint.files, [str(file) for file in checkpoint.files], tuple(checkpoint.files)):
        torch.testing.assert_close(torch.stack(embed(files, batch_size=4, **windows)), single, atol=1e-6, rtol=0)
    torch.testing.assert_close(embed(checkpoint.files[2], **windows), single[2], atol=1e-6, rtol=0)


@torch.no_grad()
def test_windows_with_halo_are_those_of_the_plan(embed, checkpoint):
    """Each window is encoded with its halo, and only what is kept of it counts."""
    network, parts = checkpoint.networks[0], []
    length = checkpoint.tokenizer.layout(network).num_tokens
    for keep in range(0, length, 4):
        start = min(max(keep - 2, 0), length - 8)
        latents = checkpoint.model.sane.encode(**without_padding(checkpoint.tokenizer(network, start, 8)))
        parts.append(latents[0, keep - start : min(keep + 4, length) - start])
    found = embed(network, window=4, halo=2)
    torch.testing.assert_close(found, torch.cat(parts).mean(dim=0), atol=1e-6, rtol=0)
    assert not torch.allclose(found, embed(network), atol=1e-4), "context matters to this model"


def without_padding(batch):
    return {name: batch[name] for name in ("tokens", "mask", "positions")}


def test_the_models_own_window_is_the_default(checkpoint, embed):
    changed = SaneModel(SaneConfig(**{**checkpoint.model.config.to_dict(), "window_size": 6})).eval()
    changed.load_state_dict(checkpoint.model.sane.state_dict())
    windowed = WeightFeatureExtractionPipeline(changed, checkpoint.tokenizer, device="cpu")
    network = checkpoint.networks[0]
    assert torch.equal(windowed(network), embed(network, window=6))
    assert torch.equal(windowed(network, halo=1), embed(network, window=4, halo=1))


def test_networks_of_several_architectures_in_one_batch(mixed):
    embed, networks = mixed
    single = [embed(network) for network in networks]
    for together, alone in zip(embed(networks, batch_size=3), single, strict=True):
        torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)
    assert embed.model.training, "dropout was off, and the model is given back as it came"
    halves = [{name: tensor.bfloat16() for name, tensor in network.items()} for network in networks]
    embed.model.to(torch.bfloat16)
    assert all(row.dtype == torch.float32 for row in embed(halves, batch_size=2))


def test_unknown_architectures_are_read_in_natural_order(mixed, tmp_path):
    """The names in a safetensors file are sorted; layer 10 does not come before layer 2."""
    embed, _ = mixed
    network = torch.nn.Sequential(*[torch.nn.Linear(3, 3) for _ in range(12)]).state_dict()
    save_file(network, tmp_path / "twelve.safetensors")
    as_in_torch = {name: network[name] for name in embed.read(tmp_path / "twelve.safetensors")}
    assert [name.partition(".")[0] for name in as_in_torch] == [str(i // 2) for i in range(24)]
    torch.testing.assert_close(embed(tmp_path / "twelve.safetensors"), embed(network), atol=1e-6, rtol=0)


@pytest.mark.parametrize("known", [False, True], ids=["nothing stored", "reference stored"])
def test_it_says_once_that_it_does_not_align(checkpoint, caplog, known):
    tokenizer = WeightTokenizer(token_size=4, normalization="standardize").fit(checkpoint.networks)
    if known:
        axes = {"0.weight": ("units", None), "0.bias": ("units",), "2.weight": (None, "units"), "2.bias": (None,)}
        tokenizer.set_groups(checkpoint.networks[0], PermutationGroups({"units": 7}, axes))
        tokenizer.set_reference(checkpoint.networks[0])
    embed = WeightFeatureExtractionPipeline(checkpoint.model, tokenizer, device="cpu")
    with caplog.at_level(logging.WARNING):
        embed(checkpoint.networks[0])
        embed(checkpoint.networks, batch_size=2)
    (record,) = [record for record in caplog.records if "without alignment" in record.getMessage()]
    assert ("sane_hf.embed" in record.getMessage()) == known


def test_bad_input_is_named(embed, mixed, checkpoint, tmp_path):
    network = checkpoint.networks[0]
    (tmp_path / "weights.pt").write_bytes(b"not safetensors")
    cases = [
        ([], {}, "the list is empty"),
        (3, {}, "int is no network"),
        (tmp_path / "nowhere.safetensors", {}, "nowhere.safetensors cannot be read"),
        (tmp_path / "weights.pt", {}, "weights.pt cannot be read as a safetensors file"),
        (tmp_path, {}, "cannot be read"),
        (network, {"readout": "median"}, "readout='median'.*'layer_mean'"),
        (network, {"windows": 3}, "'windows' is no argument"),
        (network, {"window": 0}, "window is 0"),
        (network, {"halo": -1}, "halo is -1"),
        ({**network, "2.bias": torch.tensor([1.0, float("nan"), 0])}, {}, "'2.bias'"),
        ({name: network[name] for name in list(network)[:3]}, {}, "'2.bias'"),
        ([network, {"w": torch.zeros(2, 3)}], {"batch_size": 2}, "another architecture"),
    ]
    for source, settings, words in cases:
        with pytest.raises(ValueError, match=words):
            embed(source, **settings)
    with pytest.raises(ValueError, match="300 tokens; this model knows positions for 256"):
        mixed[0]({"w": torch.zeros(300, 4)})
    with pytest.raises(ValueError, match="70 rows in a layer; this model knows positions for 64"):
        mixed[0]({"w": torch.zeros(70, 4)})
    other = WeightFeatureExtractionPipeline(checkpoint.model, WeightTokenizer(token_size=5), device="cpu")
    with pytest.raises(ValueError, match="tokens of 5 weights, the model reads 4"):
        other(network)


def test_with_the_package_it_needs_no_trust(checkpoint, embed):
    """The package registers the task, and its own class is used although the folder names another."""
    found = pipeline("weight-feature-extraction", model=str(checkpoint.folder), device="cpu")
    assert isinstance(found, WeightFeatureExtractionPipeline)
    assert torch.equal(found(checkpoint.networks[0]), embed(checkpoint.networks[0]))


def test_without_the_package_it_gives_the_same(remote, embed, checkpoint):
    assert remote.seen["pipeline"].startswith("transformers_modules.")
    mean = torch.stack(embed(checkpoint.networks))
    for name in ("mean", "paths", "again"):
        torch.testing.assert_close(remote.tensors[name], mean, atol=1e-6, rtol=0)
    windowed = torch.stack(embed(checkpoint.networks, readout="layer_mean", window=4, halo=2))
    torch.testing.assert_close(remote.tensors["layer_mean"], windowed, atol=1e-6, rtol=0)
    (warning,) = remote.seen["warnings"]
    assert "without alignment" in warning
