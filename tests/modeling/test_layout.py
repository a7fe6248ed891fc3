"""Token layout, windows and halo: against the original's fixtures, and by their properties."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sane_hf.modeling import (
    TokenLayout,
    flat_from_tokens,
    merge_windows,
    plan_windows,
    split_windows,
    tokens_from_flat,
)


def original_state_dict(shared: Path, net: str) -> dict[str, Tensor]:
    folder = shared / "fixtures"
    keys = json.loads((folder / f"tok_{net}_state_dict.json").read_text())["keys"]
    tensors = load_file(folder / f"tok_{net}_state_dict.safetensors")
    return {key: tensors[key] for key in keys}


def network() -> dict[str, Tensor]:
    """Every kind of tensor that a state dict has."""
    return {
        "embed.weight": torch.randn(5, 4),
        "cls": torch.randn(1, 1, 6),
        "conv.weight": torch.randn(3, 2, 3, 3),
        "conv.bias": torch.randn(3),
        "bn.weight": torch.randn(3),
        "bn.bias": torch.randn(3),
        "bn.running_mean": torch.randn(3),
        "bn.running_var": torch.rand(3),
        "bn.num_batches_tracked": torch.tensor(7),
        "lstm.weight_ih_l0": torch.randn(8, 5),
        "lstm.bias_ih_l0": torch.randn(8),
        "scale": torch.tensor(2.0),
        "empty.weight": torch.empty(0, 4),
        "narrow.weight": torch.empty(3, 0),
        "narrow.bias": torch.randn(3),
        "odd_bias": torch.randn(2),
        "mask": torch.tensor([True, False]),
    }


@pytest.mark.parametrize(
    ("net", "size", "name"),
    [
        ("cnn", 0, "cnn_ts0_ignorebnFalse"),
        ("cnn", 0, "cnn_ts0_ignorebnTrue"),
        ("cnn", 17, "cnn_ts17_ignorebnFalse"),
        ("cnn", 17, "cnn_ts17_ignorebnTrue"),
        # The original, asked for the widest row, skips rows without a bias and takes the 7 of the classifier, where a
        # convolution has rows of 54. Its tokens at 7 are right.
        ("resnet", 7, "resnet_ts0_ignorebnFalse"),
        ("resnet", 7, "resnet_ts0_ignorebnTrue"),
        ("resnet", 17, "resnet_ts17_ignorebnTrue"),
    ],
)
def test_layout_equals_the_original(shared: Path, net: str, size: int, name: str) -> None:
    state_dict = original_state_dict(shared, net)
    expected = load_file(shared / "fixtures" / f"tok_{name}.safetensors")
    layout = TokenLayout.plan(state_dict, size, ignore_norm=name.endswith("True"))
    flat = layout.flatten(state_dict)
    tokens = tokens_from_flat(flat[None], layout)
    assert torch.equal(tokens[0], expected["tokens"])
    assert torch.equal(layout.mask(), expected["mask"])
    assert torch.equal(layout.positions(), expected["pos"].long())
    blank = {key: torch.zeros_like(tensor) for key, tensor in state_dict.items()}  # the reference of the fixtures
    back = layout.unflatten(flat_from_tokens(tokens, layout)[0], reference=blank)
    assert list(back) == list(state_dict)
    for key in state_dict:
        assert torch.equal(back[key], expected[f"inverse.{key}"])


def test_widest_row_counts_rows_without_bias(shared: Path) -> None:
    assert TokenLayout.plan(original_state_dict(shared, "resnet"), 0).token_size == 54
    assert TokenLayout.plan({"a.weight": (2, 3), "b.weight": (4, 5)}, 0).token_size == 5  # the original divides by 0


def test_norm_layers_are_told_by_structure_not_by_name() -> None:
    shapes = {
        "subnet.weight": (2, 3),  # the original skips it: its name contains "bn"
        "norm.weight": (2,),  # and keeps this one
        "norm.bias": (2,),
        "instance.running_mean": (2,),
        "instance.running_var": (2,),
    }
    layout = TokenLayout.plan(shapes, 4, ignore_norm=True)
    assert layout.keys == ("subnet.weight",)
    assert layout.copied == ("norm.weight", "norm.bias", "instance.running_mean", "instance.running_var")


@pytest.mark.parametrize("rows", ["cut", "equal"])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 19, 64])
def test_windows_of_tokens_equal_the_gathered_flat_vector(rows: str, size: int) -> None:
    state_dict = network()
    layout = TokenLayout.plan(state_dict, size, rows)
    flat = layout.flatten_many([state_dict, {key: value * 2 for key, value in state_dict.items()}])
    index = layout.gather_index()
    assert index[layout.mask()].sort().values.tolist() == list(range(layout.num_weights))
    assert (index[~layout.mask()] == layout.num_weights).all()
    expected = torch.cat([flat, flat.new_zeros(2, 1)], 1)[:, index]
    assert torch.equal(tokens_from_flat(flat, layout), expected)
    assert torch.equal(flat_from_tokens(expected, layout), flat)
    fresh = TokenLayout.from_dict(layout.to_dict())
    for start in range(0, layout.num_tokens, 3):
        for length in (1, 4, 50):
            stop = start + length
            assert torch.equal(tokens_from_flat(flat, layout, start, length), expected[:, start:stop])
            assert torch.equal(layout.read_tokens([state_dict], start, length)[0][0], expected[0, start:stop])
            fresh.tables.clear()  # built for the window alone
            assert torch.equal(fresh.gather_index(start, length), index[start:stop])
            assert torch.equal(fresh.mask(start, length), layout.mask()[start:stop])
            assert torch.equal(fresh.positions(start, length), layout.positions()[start:stop])


def test_large_tables_are_built_for_the_window_only() -> None:
    layout = TokenLayout.plan({"a.weight": (70_000, 1_000), "a.bias": (70_000,), "b.weight": (10, 1_001)}, 1_000)
    small = TokenLayout.plan({"a.weight": (70, 1_000), "a.bias": (70,), "b.weight": (10, 1_001)}, 1_000)
    shift = layout.layers[0].token_stop - small.layers[0].token_stop
    assert torch.equal(layout.mask(shift + 100, 30), small.mask(100, 30))
    assert torch.equal(layout.positions(139_999, 2), torch.tensor([[139_999, 0, 69_999], [140_000, 1, 0]]))
    assert not {"mask", "gather_index"} & set(layout.tables)


def test_equal_chunks_differ_by_at_most_one() -> None:
    for width in range(1, 40):
        for size in range(1, 20):
            layout = TokenLayout.plan({"a.weight": (2, width)}, size, rows="equal")
            counts = layout.mask().sum(1)
            assert layout.num_tokens == 2 * -(-width // size)
            assert counts.max() - counts.min() <= 1
            assert counts.sum() == 2 * width


def test_flat_vectors_and_tokens_are_differentiable() -> None:
    layout = TokenLayout.plan(network(), 5, rows="equal")
    flat = torch.randn(2, layout.num_weights, requires_grad=True)
    tokens_from_flat(flat, layout).square().sum().backward()
    assert torch.allclose(flat.grad, 2 * flat.detach())
    tokens = torch.randn(1, layout.num_tokens, 5, requires_grad=True)
    weights = layout.unflatten(flat_from_tokens(tokens, layout)[0])
    sum(tensor.sum() for tensor in weights.values()).backward()
    assert torch.equal(tokens.grad[0] != 0, layout.mask())


def test_json_pickle_order_and_fingerprint() -> None:
    state_dict = network()
    layout = TokenLayout.plan(state_dict, 5, "equal", ignore_norm=True)
    assert TokenLayout.from_dict(json.loads(json.dumps(layout.to_dict()))) == layout
    assert pickle.loads(pickle.dumps(layout)) == layout
    mixed = dict(sorted(state_dict.items()))
    assert TokenLayout.plan(mixed, 5).fingerprint == layout.fingerprint
    assert TokenLayout.plan(mixed, 5).keys != TokenLayout.plan(state_dict, 5).keys
    assert TokenLayout.plan(mixed, 5, order=list(state_dict)) == TokenLayout.plan(state_dict, 5)
    assert TokenLayout.plan({**state_dict, "cls": torch.randn(1, 2, 3)}, 5).fingerprint != layout.fingerprint
    assert TokenLayout.plan({**state_dict, "cls": torch.zeros(1, 1, 6).long()}, 5).fingerprint != layout.fingerprint
    half = {key: value.half() if value.is_floating_point() else value for key, value in state_dict.items()}
    assert TokenLayout.plan(half, 5).fingerprint == layout.fingerprint


def test_layout_of_tensors_without_memory() -> None:
    with torch.device("meta"):
        state_dict = torch.nn.Linear(4096, 4096).state_dict()
    layout = TokenLayout.plan(state_dict, 512)
    assert layout.num_tokens == 4096 * 9
    with pytest.raises(ValueError, match="'weight' lies on the meta device"):
        layout.flatten(state_dict)


def test_bad_input_is_named() -> None:
    good = {"a.weight": torch.randn(2, 3)}
    layout = TokenLayout.plan(good, 2)
    for bad, message in (
        ({"a": torch.zeros(2, dtype=torch.complex64)}, "'a' has dtype torch.complex64"),
        ({"a": torch.zeros(2).to(torch.float8_e4m3fn)}, "'a' has dtype torch.float8_e4m3fn"),
        ({"a": "text"}, "'a' is str, not a tensor"),
        ({"a": torch.tensor(1)}, "none of the 1 tensors is floating"),
        ({}, "none of the 0 tensors"),
    ):
        with pytest.raises(ValueError, match=message):
            TokenLayout.plan(bad, 2)
    for arguments, message in (
        ({"token_size": -1}, "token_size"),
        ({"token_size": 2.0}, "token_size"),
        ({"token_size": 2, "rows": "dense"}, "rows must be one of 'cut', 'equal', not 'dense'"),
        ({"token_size": 2, "order": ["b"]}, "differs at 'a.weight'"),
        ({"token_size": 2, "order": ["a.weight", "a.weight"]}, "differs at 'a.weight'"),
    ):
        with pytest.raises(ValueError, match=message):
            TokenLayout.plan(good, **arguments)
    for bad, message in (
        ({}, "'a.weight' is missing"),
        ({"a.weight": torch.randn(3, 2)}, r"'a.weight' is floating of shape \(3, 2\)"),
        ({"a.weight": torch.ones(2, 3).long()}, "'a.weight' is integer"),
        ({**good, "b": torch.randn(1)}, "'b' of shape .* is unexpected"),
        ({"a.weight": torch.eye(2, 3).to_sparse()}, "'a.weight' is sparse"),
    ):
        with pytest.raises(ValueError, match=message):
            layout.flatten(bad)
    with pytest.raises(ValueError, match=r"needs \(B, N\) with N 6"):
        tokens_from_flat(torch.zeros(1, 5), layout)
    with pytest.raises(ValueError, match=r"needs \(B, 4, 2\)"):
        flat_from_tokens(torch.zeros(1, 4, 3), layout)
    with pytest.raises(ValueError, match="has 4 tokens: use 0 to 3"):
        layout.mask(4)
    with pytest.raises(ValueError, match="length is 0"):
        layout.mask(0, 0)
    with pytest.raises(ValueError, match="version 2"):
        TokenLayout.from_dict({**layout.to_dict(), "version": 2})


def test_halo_equals_the_original(shared: Path) -> None:
    fixture = load_file(shared / "fixtures" / "halo.safetensors")
    plan = plan_windows(112, window=16, halo=8)
    for name in ("w", "pos"):
        assert torch.equal(split_windows(fixture[name], plan), fixture[f"{name}_halo"])
        assert torch.equal(merge_windows(fixture[f"{name}_halo"], plan), fixture[f"{name}_back"])


@pytest.mark.parametrize(("window", "halo"), [(16, 8), (16, 0), (5, 7), (1, 1)])
def test_windows_with_halo_work_for_every_length(window: int, halo: int) -> None:
    # The original asserts for 176 of the lengths 17 to 399 at 16/8; where it runs, its windows are these.
    for length in range(1, 400):
        plan = plan_windows(length, window, halo)
        assert [index for _, _, start, stop in plan for index in range(start, stop)] == list(range(length))
        for start, stop, keep_start, keep_stop in plan:
            assert 0 <= start <= keep_start < keep_stop <= stop <= length
            assert stop - start == min(length, window + 2 * halo)
            assert keep_stop - keep_start <= window
            assert keep_start - start >= min(halo, keep_start)  # context wherever there is some
            assert stop - keep_stop >= min(halo, length - keep_stop)
        sequence = torch.arange(2 * length).view(1, length, 2)
        assert torch.equal(merge_windows(split_windows(sequence, plan), plan), sequence)


def test_bad_windows_are_named() -> None:
    for arguments, message in (((0, 4, 1), "num_tokens is 0"), ((4, 0, 1), "window is 0"), ((4, 4, -1), "halo is -1")):
        with pytest.raises(ValueError, match=message):
            plan_windows(*arguments)
    with pytest.raises(ValueError, match=r"the plan needs \(B, 3, 6, ...\)"):
        merge_windows(torch.zeros(1, 2, 6, 4), plan_windows(10, 4, 1))


def test_tables_first_used_in_inference_mode_serve_training_afterwards():
    layout = TokenLayout.plan({"a.weight": (3, 4), "a.bias": (3,)}, token_size=5)
    with torch.inference_mode():
        layout.mask()
    weights = torch.randn(3, 5, requires_grad=True)
    torch.where(layout.mask(), weights, 0).sum().backward()
    assert torch.equal(weights.grad, layout.mask().float())
