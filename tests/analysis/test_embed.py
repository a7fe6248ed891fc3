"""Embeddings are those of the model, whatever the batch, the order of tensors, the units' order, or the windows."""

from __future__ import annotations

import pytest
import torch

from sane_hf import SaneConfig
from sane_hf.analysis import READOUTS, embed, embed_flat
from sane_hf.architectures import build
from sane_hf.checkpoints import save_checkpoint
from sane_hf.modeling import SaneForPreTraining, SaneModel, WeightTokenizer, permute
from sane_hf.symmetry import find_permutation_groups


@pytest.fixture(scope="module")
def networks():
    torch.manual_seed(0)
    return [build("cnn_small").state_dict() for _ in range(5)]


@pytest.fixture(scope="module")
def tokenizer(networks):
    tokenizer = WeightTokenizer(token_size=37, rows="equal", normalization="standardize").fit(networks)
    groups = find_permutation_groups(build("cnn_small").eval(), torch.randn(4, 1, 8, 8))
    tokenizer.set_groups(networks[0], groups)
    tokenizer.set_reference(networks[0])
    return tokenizer


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = SaneConfig(
        token_size=37, latent_size=6, hidden_size=16, num_attention_heads=2, intermediate_size=16, num_hidden_layers=2
    )
    return SaneModel(config).eval()


def test_layer_mean_is_the_mean_of_the_latents_of_each_layer(networks, tokenizer, model):
    batch = tokenizer(networks)
    with torch.no_grad():
        latents = model.encode(**batch)
    layers = batch["positions"][0, :, 1]
    expected = torch.cat([latents[:, layers == layer].mean(dim=1) for layer in range(5)], dim=1)
    found = embed(networks, model, tokenizer, readout="layer_mean", align=False)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    mean = embed(networks, model, tokenizer, readout="mean", align=False)
    torch.testing.assert_close(mean, latents.mean(dim=1), atol=1e-6, rtol=1e-5)
    deviations = embed(networks, model, tokenizer, align=False)[:, 30:].view(5, 5, 6)
    expected = torch.stack([latents[:, layers == layer].std(dim=1, correction=0) for layer in range(5)], dim=1)
    torch.testing.assert_close(deviations, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("readout", list(READOUTS))
def test_does_not_depend_on_the_batch(networks, tokenizer, model, readout):
    whole = embed(networks, model, tokenizer, readout=readout)
    for size in (1, 2):
        torch.testing.assert_close(
            embed(networks, model, tokenizer, readout=readout, batch_size=size), whole, atol=1e-6, rtol=1e-6
        )
    torch.testing.assert_close(
        embed(networks[3], model, tokenizer, readout=readout)[0], whole[3], atol=1e-6, rtol=1e-6
    )


def test_permuted_copies_embed_alike_once_aligned(networks, tokenizer, model):
    groups = tokenizer.groups[tokenizer.layout(networks[0]).fingerprint]
    copy = permute(networks[1], groups, torch.Generator().manual_seed(1))
    pair = [networks[1], copy]
    aligned, plain = (embed(pair, model, tokenizer, align=align) for align in (True, False))
    torch.testing.assert_close(aligned[0], aligned[1], atol=1e-5, rtol=1e-5)
    assert (plain[0] - plain[1]).abs().max() > 1e-3


def test_reads_files_and_folders_and_any_order_of_tensors(networks, tokenizer, model, tmp_path):
    save_checkpoint(networks[0], tmp_path / "network.safetensors")
    shuffled = dict(sorted(networks[1].items(), reverse=True))
    SaneForPreTraining(SaneConfig(**model.config.to_dict())).save_pretrained(tmp_path / "model")
    whole = embed(networks[:2], model, tokenizer)
    torch.testing.assert_close(embed([tmp_path / "network.safetensors", shuffled], model, tokenizer), whole)
    tokenizer.save_pretrained(tmp_path / "model")
    assert embed(tmp_path / "network.safetensors", tmp_path / "model").shape == (1, 60)


def test_windows_of_any_length_cover_every_token(networks, tokenizer, model):
    """With a halo as long as the network, every window sees all of it: the result is that of one pass."""
    layout = tokenizer.layout(networks[0])
    flat = layout.flatten_many(networks)
    whole = embed_flat(flat, layout, model, tokenizer)
    for window in (1, 7, 53, 54):
        parts = embed_flat(flat, layout, model, tokenizer, window=window, halo=layout.num_tokens)
        torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-5)
    near = embed_flat(flat, layout, model, tokenizer, window=16, halo=0)
    assert near.shape == whole.shape
    assert near.isfinite().all()


def test_several_architectures_share_the_mean_readout(networks, model):
    tokenizer = WeightTokenizer(token_size=37)
    other = torch.nn.Linear(4, 3).state_dict()
    embedded = embed([networks[0], other, networks[1]], model, tokenizer, readout="mean", align=False)
    torch.testing.assert_close(embedded[1:2], embed(other, model, tokenizer, readout="mean", align=False))
    torch.testing.assert_close(embedded[2:], embed(networks[1], model, tokenizer, readout="mean", align=False))
    with pytest.raises(ValueError, match="one architecture at a time"):
        embed([networks[0], other], model, tokenizer, align=False)


def test_leaves_a_training_model_in_training(networks, tokenizer, model):
    training = SaneForPreTraining(SaneConfig(**{**model.config.to_dict(), "dropout": 0.5})).train()
    first, second = (embed(networks[0], training, tokenizer) for _ in range(2))
    torch.testing.assert_close(first, second)  # no dropout while embedding
    assert training.training
    assert training.sane.training


def test_bad_input(networks, tokenizer, model):
    with pytest.raises(ValueError, match="layer_mean"):
        embed(networks[0], model, tokenizer, readout="median")
    with pytest.raises(ValueError, match="empty"):
        embed([], model, tokenizer)
    with pytest.raises(ValueError, match="tokenizer"):
        embed(networks[0], model)
    broken = {**networks[1], "fc1.bias": torch.full((20,), float("nan"))}
    with pytest.raises(ValueError, match=r"network 1: tensor 'fc1.bias'.*20"):
        embed([networks[0], broken], model, tokenizer)


def test_weights_without_groups_are_taken_as_they_are_and_that_is_said(networks, model, caplog):
    tokenizer = WeightTokenizer(token_size=37)
    embed(networks[0], model, tokenizer)
    assert "no permutation groups" in caplog.text
