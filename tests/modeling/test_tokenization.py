"""The weight tokenizer: exact round trips, parity with the original, statistics, windows, files, bad input."""

from __future__ import annotations

import copy
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer

from sane_hf.modeling import PermutationGroups, WeightTokenizer
from sane_hf.modeling.statistics_sane import LayerStatistics

BITS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}


def same_bits(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    if one.dtype in BITS:
        one, other = one.contiguous().view(BITS[one.dtype]), other.contiguous().view(BITS[other.dtype])
    return torch.equal(one, other)


def small_network(seed: int = 0, scale: float = 1.0, classes: int = 3) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, classes))
    return {key: value * scale if value.is_floating_point() else value for key, value in module.state_dict().items()}


@st.composite
def state_dicts(draw) -> dict[str, Tensor]:
    """Anything that a state dict may hold: names that pair up or not, any shape, dtype and strides."""
    names = draw(
        st.lists(
            st.tuples(
                st.sampled_from(["", "a.", "a.b.", "weight."]),
                st.sampled_from(["weight", "bias", "weight_ih", "bias_ih", "running_mean", "scale", "count"]),
            ),
            min_size=1,
            max_size=8,
            unique=True,
        )
    )
    tensors = {}
    rows = draw(st.integers(0, 5))
    for prefix, leaf in names:
        shape = draw(st.lists(st.integers(0, 5), max_size=4))
        if shape and draw(st.booleans()):
            shape[0] = rows  # so that weights and biases find each other
            shape = shape[:1] if "bias" in leaf else shape
        dtype = draw(st.sampled_from([*BITS, torch.int64, torch.bool]))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
        if dtype not in BITS:
            tensors[prefix + leaf] = torch.randint(0, 2, shape, generator=generator).to(dtype)
            continue
        bits = torch.randint(-(2**62), 2**62, shape, generator=generator).to(BITS[dtype]).view(dtype)
        tensor = torch.where(torch.isfinite(bits), bits, torch.full_like(bits, -0.0))  # subnormals and -0 among them
        strides = draw(st.sampled_from(["contiguous", "transposed", "strided", "channels_last"]))
        if strides == "transposed":
            tensor = tensor.transpose(0, -1).contiguous().transpose(0, -1) if tensor.ndim else tensor
        elif strides == "strided" and tensor.ndim:
            tensor = torch.stack([tensor, tensor], -1)[..., 0]
        elif strides == "channels_last" and tensor.ndim == 4:
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        tensors[prefix + leaf] = tensor
    return tensors


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(weights=state_dicts(), size=st.integers(0, 9), rows=st.sampled_from(["cut", "equal"]), seed=st.integers(0, 9))
def test_round_trip_is_bit_exact(weights: dict[str, Tensor], size: int, rows: str, seed: int) -> None:
    tokenizer = WeightTokenizer(size, rows=rows)
    if not any(tensor.is_floating_point() for tensor in weights.values()):
        with pytest.raises(ValueError, match="Nothing to tokenise"):
            tokenizer(weights)
        return
    before = {name: tensor.clone() for name, tensor in weights.items()}
    batch = tokenizer(weights)
    double = any(tensor.dtype == torch.float64 for tensor in weights.values())
    assert batch["tokens"].dtype == (torch.float64 if double else torch.float32)
    assert batch["mask"].sum() == sum(tensor.numel() for tensor in weights.values() if tensor.is_floating_point())
    assert (batch["tokens"][~batch["mask"]] == 0).all()
    assert batch["attention_mask"].all()
    back = tokenizer.decode(batch["tokens"], reference=weights)
    batch["tokens"].zero_()  # what was decoded, and the caller's weights, share no memory with the tokens
    assert list(back) == list(weights)
    for name, tensor in weights.items():
        assert same_bits(back[name], tensor), name
        assert same_bits(before[name], tensor), name
        back[name].zero_()
        assert same_bits(before[name], tensor), name
    fitted = WeightTokenizer(size, rows=rows).fit(weights)
    mixed = list(weights)
    random.Random(seed).shuffle(mixed)
    mixed = {name: before[name] for name in mixed}
    assert torch.equal(fitted(mixed)["tokens"], tokenizer(weights)["tokens"])
    assert list(fitted.decode(fitted(mixed)["tokens"], reference=mixed)) == list(mixed)


@pytest.mark.parametrize(("name", "ignore_norm"), [("std_cnn", False), ("std_resnet_ignorebn", True)])
def test_standardize_equals_the_original(shared: Path, name: str, ignore_norm: bool) -> None:
    tensors = load_file(shared / "fixtures" / f"{name}.safetensors")
    meta = json.loads((shared / "fixtures" / f"{name}.json").read_text())
    given, expected, back = (
        [
            {key: tensors[f"{part}.{n}.{key}"] for key in meta["keys"] if f"{part}.{n}.{key}" in tensors}
            for n in range(3)
        ]
        for part in ("in", "out", "back")
    )
    tokenizer = WeightTokenizer(17, "standardize", ignore_norm=ignore_norm).fit(given)
    layout = tokenizer.layout(given[0])
    assert [layer.name for layer in layout.layers] == list(meta["layers"])
    for layer, (shift, scale) in zip(layout.layers, tokenizer.statistics[layout.fingerprint].T, strict=True):
        assert shift.item() == pytest.approx(meta["layers"][layer.name]["mean"], abs=1e-7)
        assert scale.item() == pytest.approx(meta["layers"][layer.name]["std"], abs=1e-7)
    plain = WeightTokenizer(17, ignore_norm=ignore_norm)
    tokens = tokenizer(given)["tokens"]
    assert torch.allclose(tokens, plain(expected)["tokens"], rtol=0, atol=1e-6)
    for network, other in zip(tokenizer.decode(tokens, reference=given), back, strict=True):
        for key in other:
            assert torch.allclose(network[key], other[key], rtol=0, atol=1e-6)


def test_running_statistics_are_standardised_once() -> None:
    """The original does it twice for running_mean and running_var: mean -1.3 and deviation 6 instead of 0 and 1."""
    networks = [{"bn.running_mean": torch.randn(500) * 3 + 5, "bn.running_var": torch.rand(500) * 7} for _ in range(3)]
    tokens = WeightTokenizer(1, "standardize").fit(networks)(networks)["tokens"]
    for layer in (tokens[:, :500], tokens[:, 500:]):
        assert layer.mean().abs() < 1e-5
        assert layer.std() == pytest.approx(1, abs=2e-2)


@pytest.mark.parametrize("normalization", ["standardize", "minmax", "l2"])
@pytest.mark.parametrize("rows", ["cut", "equal"])
def test_normalization_is_masked_and_inverts(normalization: str, rows: str) -> None:
    networks = [small_network(seed, scale=1 + seed) for seed in range(5)]
    tokenizer = WeightTokenizer(5, normalization, rows=rows).fit(networks)
    layout = tokenizer.layout(networks[0])
    batch = tokenizer(networks)
    tokens, mask = batch["tokens"], batch["mask"]
    assert (tokens[~mask] == 0).all()
    plain = WeightTokenizer(5, rows=rows)(networks)["tokens"]
    for layer in layout.layers:
        part = tokens[:, layer.token_start : layer.token_stop]
        weights = part[mask[:, layer.token_start : layer.token_stop]].view(5, -1)
        if plain[:, layer.token_start : layer.token_stop].std() == 0:
            assert torch.isfinite(weights).all()
        elif normalization == "standardize":
            assert weights.mean().abs() < 1e-5
        elif normalization == "minmax":
            assert (weights.min().item(), weights.max().item()) == pytest.approx((-1, 1), abs=1e-5)
        else:
            assert weights.square().sum(1).mean().item() == pytest.approx(1, abs=1e-5)
    assert torch.allclose(tokenizer.normalize(plain, layout), tokens, atol=1e-6)
    assert torch.allclose(tokenizer.denormalize(tokens, layout), plain, atol=1e-5)
    assert torch.allclose(tokenizer.normalize(plain[:, 7:12], layout, start=7), tokens[:, 7:12], atol=1e-6)
    assert torch.allclose(tokenizer(networks, 7, 5)["tokens"], tokens[:, 7:12], atol=1e-6)
    shift, scale = tokenizer.flat_statistics(layout)
    flat = (layout.flatten_many(networks) - shift) / scale
    assert torch.allclose(flat[:, layout.gather_index()[layout.mask()]], tokens[:, layout.mask()], atol=1e-6)
    for network, original in zip(tokenizer.decode(tokens, reference=networks), networks, strict=True):
        for name in original:
            assert torch.allclose(network[name], original[name], atol=1e-5)


def test_constant_layers_are_shifted_and_never_divided_by_zero() -> None:
    networks = [{"bn.weight": torch.full((4,), 0.1), "scale": torch.tensor(value)} for value in (1.0, 3.0)]
    for normalization in ("standardize", "minmax", "l2"):
        zeros = [{name: torch.zeros_like(tensor) for name, tensor in networks[0].items()}]
        assert (WeightTokenizer(1, normalization).fit(zeros)(zeros)["tokens"] == 0).all()
    tokens = WeightTokenizer(1, "standardize").fit(networks)(networks)["tokens"][..., 0]
    assert torch.allclose(tokens[:, :4], torch.zeros(2, 4), atol=1e-6)
    # one weight has no spread within a network, so it takes that across networks
    assert tokens[:, 4].tolist() == pytest.approx([-(0.5**0.5), 0.5**0.5])


@settings(max_examples=8, deadline=None)
@given(cuts=st.lists(st.integers(0, 40), max_size=6), seed=st.integers(0, 99))
def test_statistics_do_not_depend_on_chunks(cuts: list[int], seed: int) -> None:
    networks = [small_network(seed + n, scale=10 ** (n / 10)) for n in range(40)]
    layout = WeightTokenizer(8).layout(networks[0])
    flat = layout.flatten_many(networks)
    whole = LayerStatistics(len(layout.layers)).update(flat, layout)
    parts = LayerStatistics(len(layout.layers))
    bounds = [0, *sorted(cuts), 40]
    for start, stop in zip(bounds, bounds[1:], strict=False):
        if start < stop:
            parts.merge(LayerStatistics(len(layout.layers)).update(flat[start:stop], layout))
    for normalization in ("standardize", "minmax", "l2"):
        expected = whole.shift_and_scale(normalization)
        assert torch.allclose(parts.shift_and_scale(normalization), expected, rtol=1e-12, atol=1e-15)


def test_fit_streams_and_replaces_what_was_learned() -> None:
    networks = [small_network(seed) for seed in range(6)]
    other = [{"w": torch.randn(3, 50)}]
    tokenizer = WeightTokenizer(0, "standardize").fit(network for network in [*networks, *other])
    assert tokenizer.token_size == 50  # the widest row comes last
    assert len(tokenizer.layouts) == 2
    again = WeightTokenizer(50, "standardize").fit(networks)
    for key, statistics in again.statistics.items():
        assert torch.allclose(tokenizer.statistics[key], statistics, rtol=1e-12)
    assert len(tokenizer.fit(other).layouts) == 1


def test_batches_of_several_architectures_are_padded() -> None:
    first, second = small_network(0), {"w": torch.randn(2, 30, dtype=torch.float64)}
    tokenizer = WeightTokenizer(6)
    batch = tokenizer([first, second, first])
    lengths = [tokenizer(network)["tokens"].shape[1] for network in (first, second, first)]
    assert batch["tokens"].dtype == torch.float64
    assert batch["attention_mask"].sum(1).tolist() == lengths
    for number, network in enumerate((first, second, first)):
        alone = tokenizer(network)
        for name, tensor in alone.items():
            assert torch.equal(batch[name][number, : lengths[number]].to(tensor.dtype), tensor[0]), name
            assert not batch[name][number, lengths[number] :].any()
    back = tokenizer.decode(batch["tokens"], reference=[first, second, first])
    for network, original in zip(back, (first, second, first), strict=True):
        assert all(same_bits(network[name], original[name]) for name in original)


def test_batch_equals_one_by_one_whatever_the_dtype() -> None:
    networks = [{key: value.to(dtype) for key, value in small_network(n).items()} for n, dtype in enumerate(BITS)]
    tokenizer = WeightTokenizer(8).fit(networks)
    batch = tokenizer(networks)["tokens"]
    for number, network in enumerate(networks):
        assert torch.equal(batch[number], tokenizer(network)["tokens"][0].double())
    assert isinstance(tokenizer.decode(batch[:1], reference=networks[0]), dict)
    assert isinstance(tokenizer.decode(batch[0], reference=networks[0]), dict)
    assert isinstance(tokenizer.decode(batch[:1], reference=networks[:1]), list)
    assert isinstance(tokenizer.decode(batch, reference=networks[0]), list)


class Untouchable(Tensor):
    """Raises when anything but its shape, dtype and the like is looked at."""

    ALLOWED = ("shape", "dtype", "layout", "device", "is_meta", "ndim")

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function not in {getattr(Tensor, name).__get__ for name in cls.ALLOWED}:
            raise AssertionError(f"touched: {function}")
        return super().__torch_function__(function, types, args, kwargs)


class Rows(Untouchable):
    """Lets itself be sliced, and remembers the slices."""

    seen: list[slice] = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is Tensor.__getitem__:
            cls.seen.append(args[1])
            return args[0].as_subclass(Tensor)[args[1]]
        if function is Tensor.as_subclass:
            return Tensor.__torch_function__.__func__(Tensor, function, (), args, kwargs or {})
        return super().__torch_function__(function, types, args, kwargs)


def test_windows_touch_only_what_they_cover() -> None:
    weights = {"a.weight": torch.randn(50, 20), "a.bias": torch.randn(50), "b.weight": torch.randn(100, 20)}
    weights |= {"b.bias": torch.randn(100), "c.weight": torch.randn(4, 4)}
    tokenizer = WeightTokenizer(6).fit(weights)
    tokens = tokenizer(weights)["tokens"]
    guarded = {name: tensor.as_subclass(Untouchable) for name, tensor in weights.items()}
    with pytest.raises(AssertionError, match="touched"):
        tokenizer(guarded, 0, 5)
    for name in ("b.weight", "b.bias"):
        guarded[name] = weights[name].as_subclass(Rows)
    start = 200 + 4 * 30 + 1  # inside of row 30 of layer b: four tokens a row
    Rows.seen.clear()
    assert torch.equal(tokenizer(guarded, start, 12)["tokens"], tokens[:, start : start + 12])
    assert {index for rows in Rows.seen for index in range(100)[rows]} == {30, 31, 32, 33}


def test_windows_end_where_the_network_ends() -> None:
    short, long = {"w": torch.randn(6, 3)}, {"w": torch.randn(20, 3)}
    tokenizer = WeightTokenizer(3)
    batch = tokenizer([short, long], start=4, length=10)
    assert batch["attention_mask"].sum(1).tolist() == [2, 10]
    assert batch["positions"][1, :, 0].tolist() == list(range(4, 14))
    assert batch["positions"][0, :, 2].tolist() == [4, 5] + [0] * 8
    for start, length in ((6, None), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="start is|length is"):
            tokenizer([short, long], start=start, length=length)


def test_decoding_without_a_reference_uses_the_canonical_one() -> None:
    network = {key: value.to(torch.float16) for key, value in small_network(0).items() if value.is_floating_point()}
    tokenizer = WeightTokenizer(8).fit(network)
    tokens = tokenizer(network)["tokens"]
    assert tokenizer.decode(tokens)["0.weight"].dtype == torch.float32
    tokenizer.set_reference(network)
    back = tokenizer.decode(tokens)
    assert all(same_bits(back[name], network[name]) for name in network)
    whole = WeightTokenizer(8).fit(small_network(0))
    tokens = whole(small_network(0))["tokens"]
    with pytest.raises(ValueError, match=r"'1.num_batches_tracked' \(1 in all\) is not among the tokens"):
        whole.decode(tokens)
    whole.set_reference(small_network(0))
    assert whole.decode(tokens)["1.num_batches_tracked"] == 0


def test_ignored_layers_come_from_the_reference() -> None:
    network, other = small_network(0), small_network(1)
    tokenizer = WeightTokenizer(8, ignore_norm=True)
    back = tokenizer.decode(tokenizer(network)["tokens"], reference={**other, "1.weight": torch.full((4,), 9.0)})
    assert same_bits(back["0.weight"], network["0.weight"])
    assert back["1.weight"].tolist() == [9.0] * 4


@pytest.fixture
def fitted() -> WeightTokenizer:
    networks = [small_network(seed) for seed in range(3)] + [{"w": torch.randn(2, 3)}]
    tokenizer = WeightTokenizer(8, "standardize", rows="equal").fit(networks)
    axes = {"0.weight": ("a", None, None, None), "0.bias": ("a",), "3.weight": (None, {"product": ["a", 4]})}
    tokenizer.set_groups(networks[0], PermutationGroups({"a": 4}, axes))
    tokenizer.set_reference(networks[0])
    return tokenizer


def assert_same_tokenizer(one: WeightTokenizer, other: WeightTokenizer) -> None:
    assert one.to_dict() == other.to_dict()
    for key, statistics in one.statistics.items():
        assert torch.equal(other.statistics[key], statistics)
    for key, reference in one.references.items():
        assert list(other.references[key]) == list(reference)
        assert all(same_bits(other.references[key][name], tensor) for name, tensor in reference.items())
    network = small_network(7)
    assert torch.equal(one(network)["tokens"], other(network)["tokens"])
    sorted_by_name = dict(sorted(network.items()))
    assert torch.equal(one(network)["tokens"], other(sorted_by_name)["tokens"])


def test_save_and_load_keep_everything(fitted: WeightTokenizer, tmp_path: Path) -> None:
    written = fitted.save_pretrained(tmp_path / "new" / "folder")
    assert all(Path(path).is_file() for path in written)
    assert_same_tokenizer(fitted, WeightTokenizer.from_pretrained(tmp_path / "new" / "folder"))
    assert_same_tokenizer(fitted, copy.deepcopy(fitted))
    names = {path.name for path in (tmp_path / "new" / "folder").iterdir()}
    assert {"tokenizer_config.json", "reference.safetensors", "tokenization_sane.py", "layout_sane.py"} <= names
    assert not [name for name in names if name.startswith(".")]
    config = json.loads((tmp_path / "new" / "folder" / "tokenizer_config.json").read_text())
    assert config["auto_map"] == {"AutoTokenizer": ["tokenization_sane.WeightTokenizer", None]}


def test_auto_tokenizer_loads_it_with_the_package(fitted: WeightTokenizer, tmp_path: Path) -> None:
    fitted.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded) is WeightTokenizer
    assert_same_tokenizer(fitted, loaded)


def test_auto_tokenizer_loads_it_without_the_package(fitted: WeightTokenizer, tmp_path: Path) -> None:
    fitted.save_pretrained(tmp_path / "saved")
    network = small_network(7)
    save_file(network, tmp_path / "network.safetensors")
    save_file({"tokens": fitted(network)["tokens"]}, tmp_path / "tokens.safetensors")
    code = """
import sys
sys.modules["sane_hf"] = None  # importing it fails
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("saved", trust_remote_code=True)
network, tokens = load_file("network.safetensors"), load_file("tokens.safetensors")["tokens"]
assert torch.equal(tokenizer(network)["tokens"], tokens)
back = tokenizer.decode(tokens, reference=network)
assert all(torch.allclose(back[name], network[name], atol=1e-6) for name in network)
tokenizer.save_pretrained("again")
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "again").iterdir()} == {
        path.name for path in (tmp_path / "saved").iterdir()
    }
    assert_same_tokenizer(fitted, WeightTokenizer.from_pretrained(tmp_path / "again"))


def test_a_failed_save_leaves_the_old_files(fitted: WeightTokenizer, tmp_path: Path, monkeypatch) -> None:
    fitted.save_pretrained(tmp_path)

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        WeightTokenizer(3).save_pretrained(tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert_same_tokenizer(fitted, WeightTokenizer.from_pretrained(tmp_path))


def test_bad_files_and_arguments_are_named(fitted: WeightTokenizer, tmp_path: Path) -> None:
    fitted.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    text = path.read_text()
    for bad, message in (
        (text[:100], "tokenizer_config.json is not the file of a weight tokenizer"),
        (json.dumps({"version": 1}), "tokenizer_config.json is not the file of a weight tokenizer"),
        (text.replace('"version": 1', '"version": 9', 1), "version 9"),
    ):
        path.write_text(bad)
        with pytest.raises(ValueError, match=message):
            WeightTokenizer.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="got 'token_size'"):
        WeightTokenizer.from_pretrained(tmp_path, token_size=3)
    for folder, message in ((tmp_path / "empty", "tokenizer_config.json"), (tmp_path / "nowhere", "nowhere")):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(OSError, match=message):
            WeightTokenizer.from_pretrained(folder)
    with pytest.raises(ValueError, match="is a file"):
        fitted.save_pretrained(path)


def test_bad_weights_are_named(fitted: WeightTokenizer) -> None:
    network = small_network(0)
    wrong = {**network, "3.weight": network["3.weight"].clone()}
    wrong["3.weight"][1, 2], wrong["3.weight"][2, 0] = torch.nan, torch.inf
    for call in (lambda: fitted([network, wrong]), lambda: fitted.fit([network, wrong])):
        message = r"'3.weight' of network 1 has 2 of 48 weights that are not finite, the first at \(1, 2\): nan"
        with pytest.raises(ValueError, match=message):
            call()
    assert torch.isfinite(fitted(wrong, 0, 4)["tokens"]).all()  # not in this window
    huge = {name: torch.full_like(tensor, 3e38) for name, tensor in network.items() if tensor.is_floating_point()}
    assert torch.isfinite(WeightTokenizer(8)(huge)["tokens"]).all()  # the sum overflows, the weights do not
    missing = {name: tensor for name, tensor in network.items() if name != "0.bias"}
    for bad, message in (
        (missing, "the closest of 2 fitted architectures. Tensor '0.bias' is missing"),
        ({**network, "extra": torch.randn(2)}, "'extra' of shape .* is unexpected"),
        (small_network(0, classes=4), r"'3.weight' is floating of shape \(4, 16\)"),
        ({**network, "0.bias": torch.zeros(4, dtype=torch.complex64)}, "'0.bias' has dtype torch.complex64"),
        ({**network, "0.bias": [1.0]}, "'0.bias'"),
        ([network, nn.Linear(2, 2)], "Network 1 is Linear, not a state dict"),
        ([], "the list is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            fitted(bad)
    with pytest.raises(ValueError, match="state_dicts is empty"):
        fitted.fit([])
    with pytest.raises(ValueError, match="fit has not been called"):
        WeightTokenizer(8, "minmax")(network)
    with pytest.raises(ValueError, match="fit has not seen it"):
        fitted.normalize(torch.zeros(1, 2, 2), WeightTokenizer(2).layout({"v": torch.zeros(2, 2)}))
    with pytest.raises(ValueError, match="statistics only fit learns"):
        fitted.add_architecture(missing)
    closed = WeightTokenizer(8).fit(network)
    with pytest.raises(ValueError, match="add_architecture"):
        closed(missing)
    closed.add_architecture(missing)
    assert closed(missing)["tokens"].shape[2] == 8


def test_bad_tokens_are_named(fitted: WeightTokenizer) -> None:
    network = small_network(0)
    tokens = fitted(network)["tokens"]
    for bad, message in (
        (tokens[:, :-1], "A window has to be merged into the whole sequence first"),
        (tokens[..., :-1], "tokens of 8 weights"),
        (tokens[0, 0], r"decode needs \(T, D\) or \(B, T, D\)"),
    ):
        with pytest.raises(ValueError, match=message):
            fitted.decode(bad, reference=network)
    with pytest.raises(ValueError, match="1 token sequences, but 2 references"):
        fitted.decode(tokens, reference=[network, network])
    with pytest.raises(ValueError, match="knows 2 architectures, so decode needs a reference"):
        fitted.decode(tokens)


def test_bad_settings_are_named() -> None:
    for arguments, message in (
        ({"normalization": "zscore"}, "normalization must be one of"),
        ({"rows": "dense"}, "rows must be one of"),
        ({"token_size": -3}, "token_size"),
    ):
        with pytest.raises(ValueError, match=message):
            WeightTokenizer(**arguments)
    with pytest.raises(ValueError, match="'0.weight' has shape .*describe 1 axes"):
        WeightTokenizer(8).set_groups(small_network(), PermutationGroups({"a": 4}, {"0.weight": ("a",)}))
