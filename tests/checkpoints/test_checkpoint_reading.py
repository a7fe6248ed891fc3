"""What comes out of a good file: values, dtypes, order, names, tied weights; and the checks of the numbers."""

import os
import pickle
import struct

import pytest
import safetensors.torch
import torch

from sane_hf.checkpoints import CheckpointError, from_bytes, load_checkpoint, save_checkpoint, tied_groups, to_bytes

from .checkpoint_files import entry, small_network
from .checkpoint_files import safetensors as raw

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8),
    *(torch.bool, torch.complex64, torch.float4_e2m1fn_x2),
]


def same(one: dict, other: dict) -> bool:
    """Equal names, dtypes, shapes and bytes (so that NaN equals NaN)."""
    if one.keys() != other.keys():
        return False
    for name, tensor in one.items():
        there = other[name]
        if tensor.dtype != there.dtype or tensor.shape != there.shape:
            return False
        codes = [t.contiguous().reshape(-1).view(torch.uint8) for t in (tensor, there) if t.numel()]
        if codes and not torch.equal(*codes):
            return False
    return True


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_read_and_written_back_bit_for_bit(dtype, tmp_path):
    codes = torch.arange(24, dtype=torch.uint8) % 2
    tensor = (codes.bool() if dtype == torch.bool else codes.view(dtype)).reshape(3, -1)
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"w": tensor, "other": torch.ones(1)}, path)
    loaded = load_checkpoint(path)
    assert loaded["w"].dtype == dtype
    assert same(loaded, {"w": tensor, "other": torch.ones(1)})
    assert same(from_bytes(path.read_bytes()), loaded)
    again = to_bytes(loaded)
    assert same(from_bytes(again), loaded)
    again_path = tmp_path / "again.safetensors"
    again_path.write_bytes(again)
    assert same(safetensors.torch.load_file(again_path), loaded)


def test_the_tensors_are_views_of_the_mapped_file_and_never_written_through(tmp_path):
    path = tmp_path / "model.safetensors"
    save_checkpoint({"w": torch.zeros(1000, 1000)}, path)
    before = path.read_bytes()
    with open("/proc/self/statm") as statm:
        resident = int(statm.read().split()[1])
    loaded = load_checkpoint(path, allow_nonfinite=True)
    with open("/proc/self/statm") as statm:
        grown = int(statm.read().split()[1]) - resident
    assert grown * os.sysconf("SC_PAGE_SIZE") < 1_000_000
    loaded["w"].add_(1)
    assert path.read_bytes() == before


def test_from_bytes_gives_views_of_the_buffer():
    buffer = bytearray(to_bytes({"a": torch.zeros(3), "b": torch.zeros(2, 2)}))
    tensors = from_bytes(buffer)
    buffer[-4:] = struct.pack("<f", 7.0)
    assert tensors["b"][1, 1] == 7
    assert from_bytes(memoryview(buffer))["b"][1, 1] == 7


def test_from_bytes_reads_tensors_that_are_not_aligned():
    header = {"flag": entry("U8", [1], 0, 1), "w": entry("F64", [2], 1, 17), "h": entry("F16", [1], 17, 19)}
    content = raw(header, b"\x05" + struct.pack("<2d", 1.5, -2.0) + struct.pack("<e", 0.5))
    assert {name: tensor.tolist() for name, tensor in from_bytes(content).items()} == {
        "flag": [5],
        "h": [0.5],
        "w": [1.5, -2.0],
    }


def test_order_is_kept_and_natural_where_nobody_noted_it(tmp_path):
    network = small_network()
    path = tmp_path / "model.safetensors"
    save_checkpoint(network, path)
    assert list(load_checkpoint(path)) == list(network)
    assert list(from_bytes(to_bytes(network))) == list(network)
    safetensors.torch.save_file(network, path)
    natural = ["conv1.bias", "conv1.weight", "fc2.bias", "fc2.weight", "fc10.bias", "fc10.weight"]
    assert list(load_checkpoint(path)) == natural


@pytest.mark.parametrize("order", ['["conv1.weight"]', "[", "7", "[[1]]", "[" * 100_000])
def test_a_noted_order_that_does_not_fit_is_not_followed(order, tmp_path, caplog):
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(small_network(), path, metadata={"sane_hf.order": order})
    assert next(iter(load_checkpoint(path))) == "conv1.bias"
    assert "sane_hf.order" in caplog.text


def test_equal_state_dicts_give_equal_bytes():
    metadata = {str(i): str(i) for i in range(9)}
    assert len({to_bytes(small_network(), metadata) for _ in range(5)}) == 1
    assert to_bytes(small_network(1)) != to_bytes(small_network(2))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrappers_are_stripped_if_every_name_has_them(prefix, tmp_path):
    path = tmp_path / "model.safetensors"
    wrapped = {prefix + name: tensor for name, tensor in small_network().items()}
    safetensors.torch.save_file(wrapped, path)
    assert same(load_checkpoint(path), small_network())
    assert same(load_checkpoint(torch_save(wrapped, tmp_path), allow_pickle=True), small_network())
    wrapped["extra"] = torch.ones(1)
    safetensors.torch.save_file(wrapped, path)
    assert same(load_checkpoint(path), wrapped)
    assert same(load_checkpoint(torch_save(wrapped, tmp_path), allow_pickle=True), wrapped)


def torch_save(content, tmp_path):
    torch.save(content, tmp_path / "model.pt")
    return tmp_path / "model.pt"


def test_what_we_save_comes_back_under_its_own_names(tmp_path):
    path = tmp_path / "model.safetensors"
    state_dict = {"module.b": torch.ones(1), "module.a": torch.zeros(1)}
    for names in (state_dict, dict(sorted(state_dict.items()))):
        save_checkpoint(names, path)
        assert list(load_checkpoint(path)) == list(names)


def test_tied_weights_stay_one_tensor(tmp_path):
    shared = torch.randn(4, 3)
    state_dict = {"embed": shared, "body": torch.zeros(2), "head": shared}
    path = tmp_path / "model.safetensors"
    save_checkpoint(state_dict, path)
    assert path.stat().st_size < 48 + 8 + 400  # stored once
    for loaded in (load_checkpoint(path), from_bytes(bytearray(path.read_bytes()))):
        assert same(loaded, state_dict)
        assert list(loaded) == ["embed", "body", "head"]
        assert tied_groups(loaded) == [("embed", "head")]
        loaded["head"].add_(1)
        assert torch.equal(loaded["embed"], shared + 1)


def test_tied_weights_of_save_model_and_of_pickles_are_tied(tmp_path):
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(5, 3)
            self.head = torch.nn.Linear(3, 5, bias=False)
            self.head.weight = self.embed.weight

    model = Tied()
    safetensors.torch.save_model(model, str(tmp_path / "model.safetensors"))
    torch.save(model.state_dict(), tmp_path / "model.pt")
    for name in ("model.safetensors", "model.pt"):
        loaded = load_checkpoint(tmp_path / name, allow_pickle=True)
        assert same(loaded, dict(model.state_dict()))
        assert loaded["embed.weight"].data_ptr() == loaded["head.weight"].data_ptr()


def test_notes_of_ties_that_name_nothing_are_refused(tmp_path):
    for note in ('{"a": "missing"}', "[]", "{"):
        with pytest.raises(CheckpointError, match="E_METADATA"):
            from_bytes(safetensors.torch.save({"w": torch.ones(1)}, metadata={"sane_hf.tied": note}))


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d.is_floating_point or d.is_complex][:-1], ids=str)
def test_non_finite_weights_are_refused_with_count_and_first_index(dtype, tmp_path):
    special = torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e8m0fnu, torch.float8_e5m2fnuz  # no infinity
    wide = torch.ones(3, 4)
    wide[1, 2] = float("nan")
    wide[2, 0] = float("nan") if dtype in special else float("-inf")
    path = tmp_path / "model.safetensors"
    save_checkpoint({"good": torch.ones(2), "bad": wide.to(dtype)}, path)
    with pytest.raises(CheckpointError, match="E_NONFINITE") as error:
        load_checkpoint(path)
    assert error.value.tensor == "bad"
    assert "2 of 12" in error.value.found
    assert "[1, 2]" in error.value.found
    with pytest.raises(CheckpointError, match="E_NONFINITE"):
        from_bytes(path.read_bytes())
    assert same(load_checkpoint(path, allow_nonfinite=True), from_bytes(path.read_bytes(), allow_nonfinite=True))
    with pytest.raises(CheckpointError, match="E_NONFINITE"):
        load_checkpoint(torch_save({"bad": wide.to(dtype)}, tmp_path), allow_pickle=True)


def test_large_and_tiny_numbers_are_finite():
    tensors = {
        "large": torch.full((4,), 3e38),
        "tiny": torch.full((4,), 1e-45),
        "half": torch.full((4,), 65504.0).half(),
    }
    assert same(from_bytes(to_bytes(tensors)), tensors)
    with pytest.raises(CheckpointError, match=r"1 of 1 .* index \[\]"):
        from_bytes(to_bytes({"scalar": torch.tensor(float("inf"))}))


def test_bytes_other_than_0_and_1_in_booleans_are_read_as_true(tmp_path, caplog):
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw({"mask": entry("BOOL", [4], 0, 4)}, b"\0\1\2\xff"))
    for loaded in (load_checkpoint(path), from_bytes(path.read_bytes())):
        assert loaded["mask"].view(torch.uint8).tolist() == [0, 1, 1, 1]
    assert "'mask'" in caplog.text


def test_four_bit_numbers_are_reported_with_both_shapes(tmp_path, caplog):
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw({"w": entry("F4", [6, 8], 0, 24)}, bytes(24)))
    assert load_checkpoint(path)["w"].shape == (6, 4)
    assert "[6, 8]" in caplog.text
    assert "[6, 4]" in caplog.text


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    from sane_hf.checkpoints import views

    path = tmp_path / "model.safetensors"
    save_checkpoint(small_network(0), path)

    def replaced_meanwhile(*args, **keywords):
        save_checkpoint(small_network(1), path)
        return safetensors.safe_open(*args, **keywords)

    monkeypatch.setattr(views, "safe_open", replaced_meanwhile)
    with pytest.raises(CheckpointError, match="E_CHANGED"):
        load_checkpoint(path)


def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, code in (
        (tmp_path / "pipe", "E_NOT_A_FILE"),
        (tmp_path / "missing.safetensors", "E_NOT_FOUND"),
        (tmp_path / "pipe" / "below", "E_NOT_FOUND"),
        (str(tmp_path / "a\0b"), "E_UNREADABLE"),
        (tmp_path, "E_NOT_FOUND"),
    ):
        with pytest.raises(CheckpointError) as error:
            load_checkpoint(path)
        assert error.value.code == code


def test_errors_cross_processes_whole_and_hide_secrets():
    error = CheckpointError("E_X", "https://user:pa55@host/x?token=abc", "w\n", "hf_abcdefghijklmnop found", "y", "z")
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error)
    assert again.tensor == "w\n"
    assert (again.code, again.expected, again.fix) == ("E_X", "y", "z")
    for secret in ("pa55", "abcdefghijklmnop", "=abc"):
        assert secret not in str(error)


def test_the_checkpoints_of_others_are_read_as_the_library_reads_them(shared):
    paths = sorted((shared / "checkpoints").rglob("*.safetensors"))
    assert len(paths) >= 33
    for path in paths:
        assert same(load_checkpoint(path), safetensors.torch.load_file(path)), path


def test_ray_tune_checkpoints_are_read_as_torch_reads_them(shared):
    paths = sorted((shared / "data" / "modelzoos_sample").glob("*/checkpoint_*/checkpoints"))[::20]
    assert paths
    for path in paths:
        expected = torch.load(path, weights_only=True)
        loaded = load_checkpoint(path, allow_pickle=True)
        assert same(loaded, expected)
        assert list(loaded) == list(expected)
        with pytest.raises(CheckpointError, match="E_PICKLE"):
            load_checkpoint(path)
