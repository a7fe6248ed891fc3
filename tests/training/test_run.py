"""Whole runs of a few steps: they learn from the right numbers, resume exactly, and refuse what cannot work."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from sane_hf.modeling import SaneModel, WeightTokenizer
from sane_hf.training import BehaviorLoss, load_recipe, train
from sane_hf.training.run import build_tokenizer, build_trainer
from sane_hf.zoos import load_images, load_matrix


def test_run_leaves_a_folder_that_loads_and_is_not_trained_twice(recipe, tiny_zoo):
    folder = train(recipe)
    weights = (folder / "model.safetensors").read_bytes()
    tokenizer, model = WeightTokenizer.from_pretrained(folder), SaneModel.from_pretrained(folder).eval()
    zoo = load_matrix(str(tiny_zoo))
    batch = tokenizer(zoo.layout.unflatten(zoo.flat[:2]))
    assert model.encode(**batch).shape == (2, 54, 37)
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    logged = {name for entry in history for name in entry}
    assert {"loss_reconstruction", "loss_statistics", "loss_behavior", "r2", "eval_r2"} <= logged
    assert train(recipe) == folder
    assert (folder / "model.safetensors").read_bytes() == weights


def test_resumed_run_equals_the_uninterrupted_one(recipe, tmp_path):
    steps = {"trainer.max_steps": 10, "trainer.save_steps": 6}
    whole = train(recipe, {**steps, "output_dir": str(tmp_path / "whole")})
    # stopped in the middle of the second epoch: twelve networks leave 16 training rows, that is 4 steps an epoch
    plan = load_recipe(recipe, {**steps, "output_dir": str(tmp_path / "parts")})
    zoo = load_matrix(plan.zoo)
    trainer = build_trainer(zoo, build_tokenizer(zoo, plan), plan)
    stop = type("Stop", (trainer.callback_handler.callbacks[0].__class__,), {})()
    stop.on_save = lambda args, state, control, **kwargs: setattr(control, "should_training_stop", True)
    trainer.add_callback(stop)
    trainer.train()
    assert trainer.state.global_step == 6
    (tmp_path / "parts" / "checkpoint-9").mkdir()  # cut short by a kill: the state, written last, is missing
    parts = train(recipe, {**steps, "output_dir": str(tmp_path / "parts")})
    first, second = load_file(whole / "model.safetensors"), load_file(parts / "model.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_another_recipe_in_the_same_folder_is_refused(recipe):
    train(recipe)
    with pytest.raises(ValueError, match="another recipe.*views"):
        train(recipe, ["--views.noise", "0.2"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"model.hiden_size": 16}, "model.hiden_size is not known"),
        ({"tokenizer.token_sise": 16}, "tokenizer: .*token_sise"),
        ({"views": 3}, "views is a section of settings, found 3"),
        ({"views.nois": 0.1}, "views.nois is not known; known are permuted"),
        ({"trainer.max_step": 5}, "trainer.*max_step"),
        ({"trainer.seed": 5}, "given at the top"),
        ({"model.gamma": 0.1}, "second_view"),
        ({"views.second_view": True}, "model.gamma"),
        ({"behavior.images": None}, "behavior.weight=0.3 needs behavior.images"),
        ({"views.window": 10}, "runs whole networks"),
        ({"views.permuted": 1.5}, "share between 0 and 1"),
    ],
)
def test_recipes_that_cannot_work_are_refused_before_any_work(recipe, override, message):
    with pytest.raises(ValueError, match=message):
        train(recipe, override)


def test_behavior_loss_is_zero_for_the_same_network_and_pulls_others(tiny_zoo, recipe):
    zoo = load_matrix(str(tiny_zoo))
    tokenizer = build_tokenizer(zoo, load_recipe(recipe))
    layout = tokenizer.layout(zoo.layout.unflatten(zoo.reference))
    images = load_images("digits").train.images
    loss = BehaviorLoss(zoo.architecture, zoo.configs, layout, tokenizer, images, queries=16, seed=0)
    tokens, rows = tokenizer(zoo.layout.unflatten(zoo.flat[:3]))["tokens"], torch.arange(3)
    assert loss(tokens, tokens, rows, step=0).abs() < 1e-6
    other = (tokens + 0.5 * torch.randn_like(tokens)).requires_grad_()
    divergence = loss(other, tokens, rows, step=0)
    divergence.backward()
    assert divergence > 0.01
    assert other.grad[layout.mask().expand_as(other)].abs().max() > 0
    with torch.no_grad():
        assert loss(other - 0.01 * other.grad / other.grad.norm(), tokens, rows, step=0) < divergence


def test_non_finite_loss_stops_and_names_the_checkpoints(recipe):
    plan = load_recipe(recipe)
    zoo = load_matrix(plan.zoo)
    trainer = build_trainer(zoo, build_tokenizer(zoo, plan), plan)
    trainer.train_dataset.normalized[:] = math.inf
    with pytest.raises(FloatingPointError, match="at step 0, checkpoints"):
        trainer.train()


def test_every_seed_starts_from_other_weights(recipe):
    weights = []
    for seed in (0, 1):
        plan = load_recipe(recipe, {"seed": seed})
        zoo = load_matrix(plan.zoo)
        weights.append(build_trainer(zoo, build_tokenizer(zoo, plan), plan).model.sane.token_embed.weight)
    assert not torch.equal(*weights)


def test_contrast_is_trained_and_evaluated_on_two_views(recipe):
    folder = train(recipe, {"model.gamma": 0.1, "views.second_view": True, "trainer.eval_strategy": "epoch"})
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    assert {"loss_contrast", "eval_loss_contrast"} <= {name for entry in history for name in entry}
