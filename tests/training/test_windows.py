"""The data path: views keep the network's function, are reproducible, and never touch what they should not."""

import pytest
import torch

from sane_hf.members import forward, stack_flat
from sane_hf.modeling import WeightTokenizer, flat_from_tokens
from sane_hf.training import ViewArguments, ZooWindows
from sane_hf.training.targets import Standardizer, behavior_statistics, layer_statistics
from sane_hf.zoos import load_images, load_matrix


@pytest.fixture(scope="module")
def zoo(tiny_zoo):
    return load_matrix(str(tiny_zoo))


@pytest.fixture(scope="module")
def tokenizer(zoo):
    tokenizer = WeightTokenizer(token_size=37, rows="equal", normalization="standardize")
    return tokenizer.fit(zoo.layout.unflatten(zoo.flat))


@pytest.fixture(scope="module")
def layout(zoo, tokenizer):
    return tokenizer.layout(zoo.layout.unflatten(zoo.reference))


def windows(zoo, layout, tokenizer, **views):
    return ZooWindows(zoo.flat, layout, tokenizer, zoo.groups, ViewArguments(**views), seed=3)


def answers(zoo, layout, flat, configs):
    images = load_images("digits").test.images[:16]
    return forward(zoo.architecture, configs, stack_flat(flat, layout), images)


def test_permuted_views_are_other_weights_with_the_same_function(zoo, layout, tokenizer):
    batch = windows(zoo, layout, tokenizer, permuted=0.5, noise=0.0).__getitems__([0, 1, 2, 3])
    flat = flat_from_tokens(tokenizer.denormalize(batch["labels"], layout), layout)
    torch.testing.assert_close(flat[:2], zoo.flat[:2])
    assert not torch.allclose(flat[2:], zoo.flat[2:4])
    expected = answers(zoo, layout, zoo.flat[:4], zoo.configs[:4])
    torch.testing.assert_close(answers(zoo, layout, flat, zoo.configs[:4]), expected, rtol=1e-3, atol=1e-4)


def test_every_sample_draws_its_own_permutation(zoo, layout, tokenizer):
    batch = windows(zoo, layout, tokenizer, permuted=1.0, noise=0.0).__getitems__([5, 5, 5])
    assert not torch.equal(batch["labels"][0], batch["labels"][1])
    assert not torch.equal(batch["labels"][1], batch["labels"][2])


def test_draws_depend_on_epoch_and_indices_alone(zoo, layout, tokenizer):
    first, second = (windows(zoo, layout, tokenizer, permuted=0.5, noise=0.1, window=10) for _ in range(2))
    first.__getitems__([7, 8, 9])
    again = [data.__getitems__([0, 1, 2, 3]) for data in (first, second)]
    for name in again[0]:
        assert torch.equal(again[0][name], again[1][name]), name
    second.set_epoch(1)
    assert not torch.equal(again[0]["tokens"], second.__getitems__([0, 1, 2, 3])["tokens"])


def test_window_is_a_part_of_the_network(zoo, layout, tokenizer):
    batch = windows(zoo, layout, tokenizer, permuted=0.0, noise=0.0, window=10).__getitems__([0, 1, 2, 3])
    whole = windows(zoo, layout, tokenizer, permuted=0.0, noise=0.0).__getitems__([0, 1, 2, 3])
    starts = batch["positions"][:, 0, 0]
    assert len(set(starts.tolist())) > 1
    for row, start in enumerate(starts):
        for name in ("labels", "mask", "positions"):
            assert torch.equal(batch[name][row], whole[name][row, start : start + 10])


def test_noise_spares_labels_and_padding(zoo, layout, tokenizer):
    batch = windows(zoo, layout, tokenizer, permuted=0.0, noise=0.1).__getitems__([0, 1])
    assert (batch["tokens"][~batch["mask"]] == 0).all()
    assert not torch.equal(batch["tokens"], batch["labels"])
    relative = ((batch["tokens"] - batch["labels"]) / batch["labels"])[batch["mask"] & (batch["labels"].abs() > 1e-3)]
    assert abs(relative.std().item() - 0.1) < 0.01


def test_second_view_is_canonical_beside_permuted(zoo, layout, tokenizer):
    batch = windows(zoo, layout, tokenizer, second_view=True, noise=0.0).__getitems__([0, 1])
    canonical, permuted = batch["labels"].chunk(2)
    assert torch.equal(batch["tokens"], canonical)
    assert torch.equal(batch["second_tokens"], permuted)
    assert not torch.equal(canonical, permuted)


@pytest.mark.parametrize(
    ("views", "message"), [({"window": 999}, "54 tokens"), ({"permuted": 0.5}, "find_permutation")]
)
def test_impossible_views_are_refused(zoo, layout, tokenizer, views, message):
    with pytest.raises(ValueError, match=message):
        ZooWindows(zoo.flat, layout, tokenizer, None, ViewArguments(**{"permuted": 0.0, **views}))


def test_targets_do_not_see_permutations(zoo, layout):
    permutation = zoo.groups.random(torch.Generator().manual_seed(1), n=len(zoo))
    moved = zoo.flat.gather(1, zoo.groups.flat_index(layout, permutation))
    statistics = layer_statistics(zoo.flat, layout)
    assert statistics.isfinite().all()
    torch.testing.assert_close(layer_statistics(moved, layout), statistics, rtol=1e-4, atol=1e-4)
    behavior = [behavior_statistics(answers(zoo, layout, flat, zoo.configs)) for flat in (zoo.flat, moved)]
    torch.testing.assert_close(*behavior, rtol=1e-3, atol=1e-3)


def test_standardizer_keeps_gaps_and_constants():
    values = torch.tensor([[1.0, 5.0, float("nan")], [3.0, 5.0, 2.0], [5.0, 5.0, 4.0]])
    standardized = Standardizer.fit(values)(values)
    assert standardized[0, 2].isnan()
    assert standardized[:, 0].mean().abs() < 1e-6
    assert (standardized[:, 1] == 0).all()
