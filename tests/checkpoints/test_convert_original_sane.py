"""A converted checkpoint computes what the original computed, except where the original is defective.

`shared/fixtures` holds the state dict of an original autoencoder and what it computed; the folder that the original's
`save_model` writes is built from it.
"""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from sane_hf.checkpoints import CheckpointError
from sane_hf.checkpoints.convert_original_sane import convert_original_sane, main
from sane_hf.modeling.losses_sane import nt_xent
from sane_hf.modeling.modeling_sane import SaneForPreTraining


@pytest.fixture(scope="module")
def fixtures(shared):
    """Tensors in and out of the original, its losses by settings, its parameters."""
    folder = shared / "fixtures"
    about = json.loads((folder / "ae_io.json").read_text())
    return load_file(folder / "ae_io.safetensors"), about["losses"], about["config"]


@pytest.fixture(scope="module")
def state_dict(shared):
    return load_file(shared / "fixtures" / "ae_state_dict.safetensors")


def write(folder, state_dict, parameters, **loss):
    """What the original's AEModule.save_model and ray leave behind."""
    folder.mkdir(exist_ok=True)
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.ones(2)
    optimizer = torch.optim.AdamW([parameter])
    optimizer.step()
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=9)
    state = {"model": state_dict, "optimizer": optimizer.state_dict(), "scheduler": schedule.state_dict()}
    torch.save(state, folder / "state.pt")
    other = {"seed": 32, "training::batchsize": 4, "device": "cuda", "resources": {"gpu": 1}, "callbacks": None}
    (folder / "params.json").write_text(json.dumps({**parameters, **other, **loss}))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory, state_dict, fixtures):
    return convert_original_sane(write(tmp_path_factory.mktemp("original"), state_dict, fixtures[2]))


def close(found, expected):
    torch.testing.assert_close(found, torch.as_tensor(expected), atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("view", ["i", "j"])
def test_latents_reconstruction_projection(model, fixtures, view):
    tensors, positions = fixtures[0], fixtures[0]["p"].long()
    output = model(tensors[f"x_{view}"], tensors["mask"], positions)
    close(output.latents, tensors[f"z_{view}"])
    close(output.reconstruction, tensors[f"y_{view}"])
    close(output.projection, tensors[f"zp_{view}"])
    close(model.sane.encode(tensors[f"x_{view}"], positions=positions), tensors[f"z_{view}"])
    close(model.sane.decode(tensors[f"z_{view}"], positions), tensors[f"y_{view}"])


@torch.no_grad()
def test_the_embedding_is_the_mean_over_tokens(model, fixtures):
    tensors = fixtures[0]
    close(model.sane(tensors["x_i"], positions=tensors["p"].long()).pooler_output, tensors["embedding_i"])


@torch.no_grad()
def test_latents_with_an_attention_mask(model, fixtures):
    """The fixture's mask (B, 1, T, T) hides the last four tokens from all: in our terms, they are padding.

    What differs is by intent: the original gives latents to padded tokens, too; ours are zero.
    """
    tensors = fixtures[0]
    pairs = tensors["attn_mask"]
    seen = pairs[:, 0, 0]
    assert torch.equal(pairs, seen[:, None, None, :].expand_as(pairs))
    assert 0 < seen.sum() < seen.numel()
    latents = model.sane.encode(tensors["x_i"], tensors["mask"], tensors["p"].long(), attention_mask=seen)
    close(latents[seen], tensors["z_i_with_attn_mask"][seen])
    assert (latents[~seen] == 0).all()
    assert (latents[seen] - tensors["z_i"][seen]).abs().max() > 1e-4, "the mask matters"


@torch.no_grad()
@pytest.mark.parametrize("gamma", ["0", "0.05", "0.5", "1"])
def test_losses(tmp_path, state_dict, fixtures, gamma):
    """All components. What is to be reconstructed is the noised views, there as here when there are no labels."""
    tensors, losses, parameters = fixtures
    loss = {"training::gamma": float(gamma), "training::temperature": 0.1}
    model = convert_original_sane(write(tmp_path, state_dict, parameters, **loss))
    output = model(tensors["x_i"], tensors["mask"], tensors["p"].long(), second_tokens=tensors["x_j"])
    expected = losses[f"gamma{gamma}"]
    close(output.loss, expected["loss/loss"])
    if gamma == "0":
        assert output.loss_contrast is None, "the original reports 0 for what it does not compute"
    else:
        close(output.loss_contrast, expected["loss/loss_contrast"])
    if gamma != "1":  # where the original reports 0
        close(output.loss_reconstruction, expected["loss/loss_recon"])
    labels = torch.cat([tensors["x_i"], tensors["x_j"]])
    assert model(**inputs(tensors), labels=labels).loss == output.loss


def inputs(tensors):
    return {
        **{"tokens": tensors["x_i"], "mask": tensors["mask"], "positions": tensors["p"].long()},
        "second_tokens": tensors["x_j"],
    }


@torch.no_grad()
def test_where_the_original_counts_padding_our_r2_does_not(model, fixtures):
    """Its rsq averages the explained variance of all entries (token, column) over the batch; constant ones score 1.

    So it scores the share of padding where it knows nothing, as here. The fixture's figure is recomputed; ours leaves
    padding out, and is 0 for a predictor of the mean.
    """
    tensors, losses, _ = fixtures
    output = model(**inputs(tensors))
    target, mask = (torch.cat([tensors[a], tensors[b]]) for a, b in (("x_i", "x_j"), ("mask", "mask")))
    entries = target.var(dim=0, correction=0)
    unexplained = (target - output.reconstruction * mask).var(dim=0, correction=0)
    rsq = torch.where(entries > 0, 1 - unexplained / entries, 1.0).mean()
    close(rsq, losses["gamma0.5"]["loss/rsq"])
    weights, decoded = target[mask], output.reconstruction[mask]
    close(output.r2, 1 - (weights - decoded).square().sum() / (weights - weights.mean()).square().sum())
    assert output.r2 < 0 < rsq, "this autoencoder was never trained: it explains nothing"


@torch.no_grad()
def test_where_the_originals_positive_contrast_pushes_views_apart_ours_pulls(tmp_path, state_dict, fixtures, caplog):
    """It minimises the square of the cosine between views: 100 / 2N for equal views, 0 for orthogonal ones."""
    tensors, losses, parameters = fixtures
    cosine = torch.cosine_similarity(tensors["zp_i"], tensors["zp_j"], dim=1) / 0.1
    close(cosine.square().mean() / 8, losses["positive_gamma0.5"]["loss/loss_contrast"])
    equal, apart = torch.eye(8)[:4], torch.eye(8)[4:]
    assert nt_xent(equal, equal, 0.1) < nt_xent(equal, apart, 0.1)
    folder = write(tmp_path, state_dict, parameters, **{"training::contrast": "positive", "training::gamma": 0.5})
    with caplog.at_level(logging.WARNING):
        model = convert_original_sane(folder)
    assert "training::contrast='positive' is not carried over" in caplog.text
    close(model(**inputs(tensors)).loss_contrast, losses["gamma0.5"]["loss/loss_contrast"])


def test_the_penalties_on_projections_are_not_carried_over(tmp_path, state_dict, fixtures, caplog):
    """They are absent here: the loss is what it is without them."""
    tensors, losses, parameters = fixtures
    loss = {"training::gamma": 0.05, "training::z_var_penalty": 0.1, "training::z_norm_penalty": 0.01}
    with caplog.at_level(logging.WARNING), torch.no_grad():
        model = convert_original_sane(write(tmp_path, state_dict, parameters, **loss))
        close(model(**inputs(tensors)).loss, losses["gamma0.05"]["loss/loss"])
    penalised, plain = (losses[name] for name in ("gamma0.05_zvar0.1_znorm0.01", "gamma0.05"))
    added = 0.1 * plain["debug/z_var"] + 0.01 * plain["debug/z_norm"]
    close(torch.tensor(penalised["loss/loss"] - plain["loss/loss"]), added)
    assert "z_var_penalty" in caplog.text
    assert "z_norm_penalty" in caplog.text


def test_the_head_is_bound_to_its_window_but_the_latents_are_not(model, fixtures):
    tensors = {name: value[:, :9] for name, value in inputs(fixtures[0]).items()}
    with pytest.raises(ValueError, match="window_size=16"):
        model(**tensors)
    assert model.sane.encode(tensors["tokens"], positions=tensors["positions"]).shape == (4, 9, 8)


def test_what_is_saved_is_what_was_converted(tmp_path, state_dict, fixtures, model):
    """By the command line, from ray's folders: params.json lies above the checkpoint; torch.compile left a prefix."""
    trial = write(tmp_path / "trial", state_dict, fixtures[2])
    compiled = {f"_orig_mod.{name}": value for name, value in state_dict.items()}
    write(trial / "checkpoint_000050", compiled, {})
    (trial / "checkpoint_000050" / "params.json").unlink()
    main([str(trial / "checkpoint_000050"), str(tmp_path / "new" / "sane")])
    loaded = SaneForPreTraining.from_pretrained(tmp_path / "new" / "sane")
    assert loaded.config.original_parity
    assert loaded.config.window_size == 16
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
    assert sum(value.numel() for value in state_dict.values()) == loaded.num_parameters()
    base = AutoModel.from_pretrained(tmp_path / "new" / "sane")
    assert torch.equal(base.token_embed.weight, state_dict["tokenizer.weight"])


def test_nothing_that_is_there_is_overwritten(tmp_path, state_dict, fixtures):
    folder = write(tmp_path / "original", state_dict, fixtures[2])
    with pytest.raises(SystemExit, match="something is there already"):
        main([str(folder), str(folder)])
    assert sorted(path.name for path in folder.iterdir()) == ["params.json", "state.pt"]
    (tmp_path / "empty").mkdir()
    convert_original_sane(folder, tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").is_file()


# name of the case: (change of params.json, change of the state dict, code, words)
BAD = {
    "batch attention": ({"ae:transformer_type": "pytorch"}, {}, "E_DEFECTIVE", "train anew with 'gpt2'"),
    "by default": ({"ae:transformer_type": None}, {}, "E_DEFECTIVE", "transformer_type 'pytorch' "),
    "unknown setting": ({"ae:rotary": True}, {}, "E_PARAMETER", "'ae:rotary'"),
    "impossible setting": ({"ae:nhead": 5}, {}, "E_PARAMETER", "num_attention_heads=5"),
    "setting of another type": ({"ae:lat_dim": "8"}, {}, "E_PARAMETER", "latent_size"),
    "unknown tensor": ({}, {"pe.pe4.weight": torch.zeros(2, 16)}, "E_NAME", "'pe.pe4.weight'"),
    "missing tensor": ({}, {"detokenizer.bias": None}, "E_NAME", "'detokenizer.bias'"),
    "too few layers": ({"ae:num_layers": 1}, {}, "E_NAME", "'transformer_decoder.transformer.1.attn.c_attn.weight'"),
    "too many layers": ({"ae:num_layers": 3}, {}, "E_NAME", "'transformer_encoder.transformer.2.ln_1.weight'"),
    "other sizes": ({"ae:i_dim": 18}, {}, "E_SHAPE", "expected [32, 18]"),
    "other window": ({"training::windowsize": 8}, {}, "E_SHAPE", "'projection_head.head.0.weight'"),
    "not finite": ({}, {"detokenizer.bias": torch.full((17,), float("nan"))}, "E_NONFINITE", "'detokenizer.bias'"),
}


@pytest.mark.parametrize(("settings", "tensors", "code", "words"), BAD.values(), ids=BAD)
def test_bad_input_is_named(tmp_path, state_dict, fixtures, settings, tensors, code, words):
    def changed(old, changes):
        return {name: value for name, value in {**old, **changes}.items() if value is not None}

    folder = write(tmp_path / "original", changed(state_dict, tensors), changed(fixtures[2], settings))
    with pytest.raises(CheckpointError) as caught:
        convert_original_sane(folder, tmp_path / "out")
    assert caught.value.code == code
    assert words in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_files_that_are_missing_or_broken(tmp_path, state_dict, fixtures):
    with pytest.raises(CheckpointError, match="no params.json in it or in the folder above.*E_MISSING"):
        convert_original_sane(tmp_path / "nowhere")
    folder = write(tmp_path / "original", state_dict, fixtures[2])
    (folder / "params.json").write_text("{")
    with pytest.raises(CheckpointError, match="E_JSON"):
        convert_original_sane(folder)
    (folder / "params.json").write_text(json.dumps(fixtures[2]))
    (folder / "state.pt").unlink()
    with pytest.raises(CheckpointError, match="no state.pt in it.*E_MISSING"):
        convert_original_sane(folder)
