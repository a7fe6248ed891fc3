"""What the model promises: the same numbers whatever the attention, the padding, the precision or the road to them."""

import logging

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForPreTraining, Trainer, TrainingArguments

from sane_hf.modeling.blocks_sane import LayerPath, layer_means
from sane_hf.modeling.configuration_sane import SaneConfig
from sane_hf.modeling.losses_sane import explained_variance, masked_mse, nt_xent
from sane_hf.modeling.modeling_sane import SaneForPreTraining, SaneModel

SIZES = {
    **{"token_size": 8, "latent_size": 6, "hidden_size": 16, "intermediate_size": 32, "projection_size": 10},
    **{"num_attention_heads": 2, "num_hidden_layers": 2, "num_decoder_layers": 2, "max_positions": [32, 4, 16]},
}
EVERYTHING = {
    **{"layer_path": True, "token_statistics": True, "latents_per_weight": 0.5, "statistics_weight": 0.1},
    **{"statistics_size": 3, "behavior_size": 2, "gamma": 0.3},
}


def tiny(model_class=SaneForPreTraining, spread=0.2, **changes):
    """A tiny model in evaluation mode, its weights spread so that every part of it matters."""
    torch.manual_seed(0)
    model = model_class(SaneConfig(**{**SIZES, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * spread)
    return model


def networks(count=3, tokens=9):
    """A batch as the tokenizer makes it: rows of random length, three tokens in each layer."""
    mask = torch.arange(8) < torch.randint(1, 9, (count, tokens, 1))
    index = torch.arange(tokens)
    positions = torch.stack([index, index // 3, index % 3], dim=-1).expand(count, -1, -1)
    return {
        "tokens": torch.randn(count, tokens, 8) * mask,
        "mask": mask,
        "positions": positions,
        "attention_mask": torch.ones(count, tokens, dtype=torch.bool),
    }


def targets(count=3):
    """What the losses need beside a batch; the last layer has no statistics."""
    statistics = torch.randn(count, 4, 3)
    statistics[:, 3] = float("nan")
    return {"statistics": statistics, "behavior": torch.randn(count, 2)}


def assert_same(first, second, tolerance):
    assert {name for name in first if first[name] is not None} == {name for name in second if second[name] is not None}
    for name, value in first.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(value, second[name], atol=tolerance, rtol=0, msg=lambda text, n=name: n + text)


@pytest.mark.parametrize("changes", [{}, EVERYTHING], ids=["plain", "everything"])
@torch.no_grad()
def test_both_attentions_agree(changes):
    model, batch = tiny(**changes), networks()
    batch["attention_mask"][1, 5:] = False
    fused = model(**batch)
    model.set_attn_implementation("eager")
    assert_same(fused, model(**batch), 1e-5)


@pytest.mark.parametrize("masked", [True, False], ids=["mask", "no mask"])
@pytest.mark.parametrize("changes", [{}, EVERYTHING], ids=["plain", "everything"])
@torch.no_grad()
def test_padding_changes_nothing(changes, masked):
    """Not the latents, not the reconstruction, not the losses, whatever stands in the padding."""
    model, batch, extra = tiny(spread=0.05, **changes), networks(), targets() if changes else {}
    batch["second_tokens"] = batch["tokens"] * 1.1
    if not masked:
        del batch["mask"]
    padded = {
        name: torch.cat([value, torch.zeros(3, 4, *value.shape[2:], dtype=value.dtype)], dim=1)
        for name, value in batch.items()
    }
    for name in ("tokens", "second_tokens"):
        padded[name][:, 9:] = 5 * torch.randn(3, 4, 8)
    padded["positions"][:, 9:] = torch.tensor([31, 1, 15])  # also of a layer that is there
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-12)):
        alone, together = (
            model.to(dtype)(**{name: value.to(dtype) if value.is_floating_point() else value for name, value in given})
            for given in ([*batch.items(), *extra.items()], [*padded.items(), *extra.items()])
        )
        assert (together.latents[:, 9:] == 0).all()
        for name in ("latents", "reconstruction"):
            together[name] = together[name][:, :9]
        assert_same(alone, together, tolerance)
    del padded["second_tokens"]
    pooled = model.sane(**{**padded, "tokens": padded["tokens"].double()}).pooler_output
    torch.testing.assert_close(pooled, alone.latents[:3].mean(dim=1), atol=1e-12, rtol=0)


@torch.no_grad()
def test_a_network_does_not_see_the_others_of_its_batch():
    """The original's "pytorch" type attends over the batch."""
    model, batch = tiny(**EVERYTHING), networks()
    together = model(**batch).latents
    for row in range(3):
        alone = model(**{name: value[row : row + 1] for name, value in batch.items()}).latents
        torch.testing.assert_close(alone[0], together[row], atol=1e-6, rtol=0)


@torch.no_grad()
def test_outputs_as_tuple_and_with_what_is_asked_for():
    model, batch = tiny(**EVERYTHING), networks()
    model.set_attn_implementation("eager")
    output = model(**batch, output_hidden_states=True, output_attentions=True)
    assert [tuple(state.shape) for state in output.hidden_states] == [(3, 9, 16)] * 3  # embedding and two layers
    assert [tuple(weights.shape) for weights in output.attentions] == [(3, 2, 9, 9)] * 2
    torch.testing.assert_close(output.attentions[0].sum(dim=-1), torch.ones(3, 2, 9))
    as_tuple = model(**batch, output_hidden_states=True, output_attentions=True, return_dict=False)
    assert all(a is b or torch.equal(a, b) for a, b in zip(output.to_tuple()[:3], as_tuple[:3], strict=True))
    encoded = model.sane(**batch, return_dict=False)
    assert [tuple(part.shape) for part in encoded] == [(3, 9, 6), (3, 6), (3, 9, 16)]
    assert model(**batch).hidden_states is None


def test_gradient_checkpointing_gives_the_same_gradients():
    batch = {**networks(), **targets(), "second_tokens": torch.randn(3, 9, 8)}
    gradients = []
    for checkpointing in (False, True):
        model = tiny(**EVERYTHING).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        model(**batch).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(gradient is not None for gradient in gradients[0].values())
    assert_same(*gradients, 1e-7)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_without_graph_breaks(backend):
    model = tiny(**EVERYTHING, nested_latents=[0.5])
    batch = networks()
    views = {**batch, **targets(), "second_tokens": torch.randn(3, 9, 8)}
    torch._dynamo.reset()
    with torch.no_grad():
        assert_same(model.sane(**batch), torch.compile(model.sane, fullgraph=True, backend=backend)(**batch), 1e-5)
    model.train()
    eager, compiled = model(**views), torch.compile(model, fullgraph=True, backend=backend)(**views)
    for name in ("latents", "projection", "loss_contrast", "loss_statistics"):  # nested budgets are drawn by chance
        torch.testing.assert_close(compiled[name], eager[name], atol=1e-5, rtol=0)
    compiled.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@torch.no_grad()
def test_saved_and_loaded_is_the_same(tmp_path, caplog, monkeypatch):
    model, batch = tiny(**EVERYTHING), networks()
    model.save_pretrained(tmp_path)
    expected = model(**batch)
    base_of = {"tokens": batch["tokens"], "mask": batch["mask"], "positions": batch["positions"]}
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    for auto_class, model_class in ((AutoModelForPreTraining, SaneForPreTraining), (AutoModel, SaneModel)):
        for loader in (auto_class, model_class):
            loaded = loader.from_pretrained(tmp_path)
            assert type(loaded) is model_class
            assert torch.equal(loaded(**base_of).latents, expected.latents)
            kept = loaded.state_dict()
            saved = model.state_dict() if model_class is SaneForPreTraining else model.sane.state_dict()
            assert kept.keys() == saved.keys()
            assert all(torch.equal(kept[name], saved[name]) for name in kept)
    assert not caplog.records, "loading the base without its heads is no reason for a warning"
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is SaneConfig
    assert config.to_diff_dict() == model.config.to_diff_dict()


@pytest.mark.parametrize("saved", [SaneModel, SaneForPreTraining])
def test_a_base_gets_fresh_heads(saved, tmp_path):
    model = tiny(saved)
    model.save_pretrained(tmp_path)
    loaded = SaneForPreTraining.from_pretrained(tmp_path)
    base = getattr(model, "sane", model).state_dict()
    assert all(torch.equal(value, base[name]) for name, value in loaded.sane.state_dict().items())


@torch.no_grad()
def test_the_latent_budget_is_kept():
    model, batch = tiny(**EVERYTHING), networks()
    latents = model.sane.encode(batch["tokens"], batch["mask"], batch["positions"])
    weights = batch["mask"].sum(dim=-1)
    assert torch.equal((latents != 0).sum(dim=-1), (0.5 * weights).ceil().long())  # 1 to 4 of the 6
    assert (latents != 0).sum() <= 0.5 * weights.sum() + 27  # rounded up for each of the 27 tokens
    everything = torch.ones(3, 9, 8, dtype=torch.bool)
    unmasked = model.sane.encode(batch["tokens"], positions=batch["positions"])
    assert torch.equal(unmasked, model.sane.encode(batch["tokens"], everything, batch["positions"]))
    assert (unmasked[..., 4:] == 0).all()


def test_nested_budgets_are_for_training_only():
    batch = networks(count=64)
    for nested in ([], [0.25]):
        model = tiny(latents_per_weight=0.7, nested_latents=nested)
        torch.manual_seed(0)
        first, second = model(**batch).reconstruction, model(**batch).reconstruction
        assert torch.equal(first, second)
        trained = model.train()(**batch).reconstruction
        changed = (trained != first).flatten(1).any(dim=1).float().mean()
        assert 0.05 < changed < 0.5 if nested else changed == 0  # a quarter of the batch is cut
        assert torch.equal(model(**batch).latents, model.eval()(**batch).latents), "the latents given out are whole"


def test_what_stands_in_padding_does_not_reach_the_loss():
    mask = torch.rand(2, 4, 8) < 0.6
    prediction, target = torch.randn(2, 2, 4, 8)
    prediction.requires_grad_()
    for garbage in (7.0, float("inf"), float("nan")):
        spoiled = target.masked_fill(~mask, garbage)
        torch.testing.assert_close(masked_mse(prediction, spoiled, mask), (prediction - target)[mask].square().mean())
        assert explained_variance(prediction, spoiled, mask) == explained_variance(prediction, target, mask)
        (gradient,) = torch.autograd.grad(masked_mse(prediction, spoiled, mask), prediction)
        assert (gradient[~mask] == 0).all()
        assert gradient[mask].abs().min() > 0


def test_r2_is_zero_for_the_mean_and_one_for_the_truth():
    """The original reports .746 for a predictor of zeros on tokens that are three quarters padding."""
    target, mask = torch.randn(4, 5, 8) + 3, torch.rand(4, 5, 8) < 0.25
    assert explained_variance(target, target, mask) == 1
    mean = torch.full_like(target, target[mask].mean().item())
    assert abs(explained_variance(mean, target, mask)) < 1e-5
    assert explained_variance(torch.zeros_like(target), target, mask) < -1


def slow_nt_xent(first, second, temperature):
    """Eq. 3 of the paper, one pair at a time."""
    views = list(first) + list(second)
    losses = []
    for i, view in enumerate(views):
        similarities = [torch.cosine_similarity(view, other, dim=0) / temperature for other in views]
        positive = (i + len(first)) % len(views)
        rest = torch.stack([similarity for j, similarity in enumerate(similarities) if j != i])
        losses.append(rest.logsumexp(dim=0) - similarities[positive])
    return torch.stack(losses).mean()


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_nt_xent_is_what_its_definition_says(temperature):
    first, second = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True)
    loss = nt_xent(first, second, temperature)
    expected = slow_nt_xent(first, second, temperature)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, first) for value in (loss, expected)))


def test_nt_xent_at_its_edges():
    views = torch.randn(6, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = nt_xent(views, views + 0.1, 0.1)
    assert mixed == nt_xent(views, views + 0.1, 0.1), "mixed precision must not reach the similarities"
    dead = torch.zeros(6, 7, requires_grad=True)  # all ReLUs of the projection head off
    loss = nt_xent(dead, dead, 0.1)
    loss.backward()
    assert dead.grad.isfinite().all()
    assert abs(loss - torch.tensor(11.0).log()) < 1e-6
    with pytest.raises(ValueError, match="gamma=0"):
        nt_xent(views[:1], views[:1], 0.1)


@torch.no_grad()
def test_losses_add_up():
    model, batch = tiny(**EVERYTHING), {**networks(), **targets(), "second_tokens": torch.randn(3, 9, 8)}
    output = model(**batch, labels=torch.randn(6, 9, 8))
    parts = 0.3 * output.loss_contrast + 0.7 * output.loss_reconstruction + 0.1 * output.loss_statistics
    torch.testing.assert_close(output.loss, parts)
    assert model(**batch, return_loss=False).loss is None
    single = model(**networks())
    assert single.loss == single.loss_reconstruction
    assert single.loss_contrast is None
    with pytest.raises(ValueError, match="second_tokens"):
        tiny(gamma=1.0)(**networks())


def test_the_statistics_head_learns_only_what_is_known():
    """Layers without a target, and layers that the window does not reach, have no part in the loss."""
    model, batch, extra = tiny(**{**EVERYTHING, "behavior_size": 0}), networks(tokens=6), targets()
    loss = model(**batch, statistics=extra["statistics"]).loss_statistics
    spoiled = extra["statistics"].clone()
    spoiled[:, 2] = 1e6  # six tokens reach the layers 0 and 1
    assert model(**batch, statistics=spoiled).loss_statistics == loss
    spoiled[:, 0, 0] = float("nan")
    assert model(**batch, statistics=spoiled).loss_statistics != loss
    model(**batch, statistics=spoiled).loss_statistics.backward()
    assert model.sane.token_embed.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())


def test_layer_means():
    latents, weight = torch.randn(2, 4, 3), torch.tensor([[1.0, 1, 1, 0], [1, 1, 1, 1]])
    layers = torch.tensor([[0, 2, 2, 1], [1, 1, 0, 1]])
    means, count = layer_means(latents, layers, weight, 4)
    assert count.tolist() == [[1, 0, 2, 0], [1, 3, 0, 0]]
    torch.testing.assert_close(means[0, 2], latents[0, 1:3].mean(dim=0))
    assert (means[0, [1, 3]] == 0).all()


def test_a_layer_path_is_one_linear_map_for_each_layer():
    path = LayerPath(4, 5, 3, identity=True)
    torch.nn.init.normal_(path.weight)
    torch.nn.init.normal_(path.bias)
    inputs, layers = torch.randn(2, 6, 5), torch.randint(0, 4, (2, 6))
    expected = torch.einsum("bti,btio->bto", inputs, path.weight[layers]) + path.bias[layers]
    torch.testing.assert_close(path(inputs, layers), expected)
    fresh = SaneModel(SaneConfig(**SIZES, layer_path=True))
    identity = torch.eye(8, 6).expand_as(fresh.encoder_path.weight)
    assert (fresh.encoder_path.weight - identity).abs().max() < 6 * fresh.config.initializer_range


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("hidden_size", {"hidden_size": 15}),
        ("hidden_size", {"hidden_size": 0}),
        ("hidden_size", {"hidden_size": 3, "num_attention_heads": 3}),
        ("num_attention_heads", {"num_attention_heads": 0}),
        ("intermediate_size", {"intermediate_size": 0}),
        ("token_size", {"token_size": 0}),
        ("latent_size", {"latent_size": 2.5}),
        ("statistics_size", {"statistics_size": -1}),
        ("max_positions", {"max_positions": [8]}),
        ("max_positions", {"max_positions": [8, 0]}),
        ("hidden_act", {"hidden_act": "gelo"}),
        ("dropout", {"dropout": 1}),
        ("gamma", {"gamma": 1.5}),
        ("gamma", {"gamma": float("nan")}),
        ("gamma", {"gamma": "0.5"}),
        ("temperature", {"temperature": 0}),
        ("latents_per_weight", {"latents_per_weight": 0}),
        ("nested_latents", {"nested_latents": [0.5]}),
        ("nested_latents", {"nested_latents": [1.5], "latents_per_weight": 1}),
        ("statistics_weight", {"statistics_weight": 1}),
        ("window_size", {"original_parity": True}),
        ("window_size", {"window_size": 0}),
    ],
)
def test_wrong_settings_name_their_field(field, changes):
    with pytest.raises(Exception, match=f"{field}") as caught:
        SaneConfig(**{**SIZES, **changes})
    assert "Validation" in type(caught.value).__name__, "caught by the configuration, not by accident"


def test_whole_numbers_are_numbers():
    assert SaneConfig(**SIZES, temperature=1, dropout=0, gamma=1, latents_per_weight=1).temperature == 1


@torch.no_grad()
def test_positions_of_two_parts():
    model, batch = tiny(max_positions=[32, 4]), networks()
    whole = model(**batch).latents
    other = batch["positions"].clone()
    other[..., 2] = 0
    assert torch.equal(model(**{**batch, "positions": other}).latents, whole), "the row is not known"
    for part in (0, 1):
        other = batch["positions"].clone()
        other[..., part] = (other[..., part] + 1) % 4
        assert not torch.allclose(model(**{**batch, "positions": other}).latents, whole)
    implied = batch["positions"].clone()
    implied[..., 1] = 0
    without = {name: value for name, value in batch.items() if name != "positions"}
    assert torch.equal(model(**without).latents, model(**{**batch, "positions": implied}).latents)


@torch.no_grad()
def test_precisions():
    model, batch, extra = tiny(**EVERYTHING), networks(), targets()
    batch["second_tokens"] = torch.randn(3, 9, 8)
    single = model(**batch, **extra)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model(**batch, **extra)
    assert abs(mixed.loss - single.loss) < 0.05 * single.loss
    for dtype, tolerance in ((torch.float64, 1e-5), (torch.bfloat16, 0.05)):
        cast = {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()}
        other = {name: value.to(dtype) for name, value in extra.items()}
        output = model.to(dtype)(**cast, **other)
        assert output.latents.dtype == dtype
        assert output.loss.isfinite()
        assert (output.latents.float() - single.latents).norm() < tolerance * single.latents.norm()


def test_a_toy_is_learned():
    batch = networks(count=6)
    model = SaneForPreTraining(SaneConfig(**{**SIZES, "gamma": 0.05, "layer_path": True})).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        output = model(**batch, second_tokens=batch["tokens"] * (1 + 0.05 * torch.randn(6, 9, 8)))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append((output.loss_reconstruction.item(), output.loss_contrast.item()))
    assert losses[-1][0] < 0.5 * losses[0][0]
    assert losses[-1][1] < 0.5 * losses[0][1]
    assert output.r2 > 0.6


def test_the_trainer_divides_by_its_accumulation_steps(tmp_path):
    """It would not for a forward that takes keyword arguments, and gradients would grow with the steps."""
    trainer = Trainer(tiny(), TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))
    assert not trainer.model_accepts_loss_kwargs
    assert trainer.can_return_loss, "eval_loss is missing otherwise"
