"""PyTorch's own files: nothing in them runs, damage is found, and refusals say what to do."""

import argparse
import collections
import io
import os
import pathlib
import pickle
import struct
import subprocess
import zipfile

import numpy as np
import pytest
import torch

from sane_hf.checkpoints import CheckpointError, load_checkpoint
from sane_hf.checkpoints.pickle_scan import scan_pickle

from .checkpoint_files import edit_zip, pickle_in_legacy, pickle_in_zip, small_network, torch_file
from .test_checkpoint_reading import same


def refused(path, code: str, **options) -> CheckpointError:
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(path, **{"allow_pickle": True, **options})
    assert error.value.code == code, str(error.value)
    assert str(error.value).startswith(str(path))
    assert str(error.value).isprintable()
    assert "weights_only=False" not in str(error.value)
    assert error.value.__cause__ is None  # torch's own text recommends what we must not
    assert error.value.__suppress_context__ or error.value.__context__ is None
    return error.value


class Call:
    """Pickles as a call of anything."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("legacy", [False, True])
def test_pickles_are_read_only_on_request(legacy, tmp_path):
    path = torch_file(tmp_path / "model.bin", small_network(), legacy)
    assert "allow_pickle=True" in refused(path, "E_PICKLE", allow_pickle=False).fix
    loaded = load_checkpoint(path, allow_pickle=True)
    assert same(loaded, small_network())
    assert list(loaded) == list(small_network())


def test_content_decides_and_never_the_suffix(tmp_path):
    from sane_hf.checkpoints import save_checkpoint

    for suffix in (".safetensors", ".pt", ".bin", ".ckpt", ""):
        save_checkpoint(small_network(), tmp_path / f"good{suffix}")
        assert same(load_checkpoint(tmp_path / f"good{suffix}"), small_network())
        for legacy in (False, True):
            path = torch_file(tmp_path / f"torch{suffix}", small_network(), legacy)
            refused(path, "E_PICKLE", allow_pickle=False)
            assert same(load_checkpoint(path, allow_pickle=True), small_network())
        path.write_bytes(pickle.dumps({"w": 1.0}))
        refused(path, "E_PICKLE", allow_pickle=False)
        refused(path, "E_PICKLE_CONTENT")


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize(
    "attack",
    [
        lambda canary: Call(os.system, f"touch {canary}"),
        lambda canary: Call(exec, f"open({canary!r}, 'w')"),
        lambda canary: Call(getattr(subprocess, "Popen"), ["touch", canary]),  # noqa: B009
        lambda canary: Call(np.save, canary, [1]),
        lambda canary: Call(torch.save, 1, canary),
    ],
)
def test_nothing_in_a_pickle_runs(attack, protocol, tmp_path):
    canary = tmp_path / "canary"
    content = {"w": 1.0, "x": attack(str(canary))}
    paths = [tmp_path / "raw.pt", pickle_in_zip(tmp_path / "zip.pt", content, protocol)]
    paths[0].write_bytes(pickle.dumps(content, protocol=protocol))
    if protocol == 2:
        paths.append(pickle_in_legacy(tmp_path / "legacy.pt", content))
    for path in paths:
        error = refused(path, "E_UNSAFE_PICKLE")
        assert "nothing was run" in error.found
        assert any(name in error.found for name in ("system", "exec", "Popen", "numpy", "torch.serialization.save"))
        refused(path, "E_PICKLE", allow_pickle=False)
    assert not canary.exists()


@pytest.mark.parametrize(
    "pickled",
    [
        b"(cos\nsystem\nS'touch canary'\no.",  # OBJ
        b"(S'touch canary'\nios\nsystem\n.",  # INST
        b"\x80\x02\x82\x01.",  # an extension of copyreg
        b"\x80\x04\x8c\x02os\x94\x8c\x06system\x94\x93\x8c\x05touch\x85R.",  # STACK_GLOBAL
        b"\x80\x04\x8c\x02os\x94\x8c\x06system\x94\x93\x94h\x02\x8c\x05touch\x85R.",  # called from the memo
        b"\x80\x04)]\x93.",  # a name that is no text
        b"\x80\x02cbuiltins\ngetattr\n(cbuiltins\ndict\nX\x03\x00\x00\x00gettR.",
    ],
)
def test_the_scan_sees_every_way_to_import(pickled):
    assert scan_pickle(io.BytesIO(pickled)).unsafe()


class Config:
    rate = 0.1


BENIGN = {
    "namespace": argparse.Namespace(lr=0.1),
    "path": pathlib.PurePosixPath("/tmp/run"),
    "numpy_scalar": np.float64(0.5),
    "numpy_array": np.zeros(3),
    "defaultdict": collections.defaultdict(list),
    "object": Config(),
    "module": torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh()),
    "optimiser": torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1),
}


@pytest.mark.parametrize("name", BENIGN)
@pytest.mark.parametrize("kind", ["zip", "legacy", "raw"])
def test_harmless_content_is_refused_as_such_with_the_way_out(name, kind, tmp_path):
    content = BENIGN[name] if name == "module" else {"model": small_network(), "args": BENIGN[name]}
    path = tmp_path / "model.pt"
    if kind == "raw":
        path.write_bytes(pickle.dumps(content, protocol=4))
    else:
        torch_file(path, content, legacy=kind == "legacy")
    error = refused(path, "E_PICKLE_CONTENT")
    assert "state_dict()" in error.fix
    if kind == "zip" and name == "namespace":
        assert "argparse.Namespace" in error.found


def test_a_flipped_bit_is_found_by_the_checksum(tmp_path):
    path = torch_file(tmp_path / "model.pt", small_network())
    content = bytearray(path.read_bytes())
    weight = small_network()["fc2.weight"].numpy().tobytes()
    content[content.index(weight) + 17] ^= 1
    path.write_bytes(content)
    torch.load(path, weights_only=True)  # torch does not notice
    assert "data/2" in refused(path, "E_CRC").found


def test_an_archive_cut_at_any_byte_is_refused(tmp_path):
    content = torch_file(tmp_path / "whole.pt", {"w": torch.ones(3)}).read_bytes()
    path = tmp_path / "model.pt"
    for cut in [*range(0, len(content), 37), *range(len(content) - 120, len(content))]:
        path.write_bytes(content[:cut])
        with pytest.raises(CheckpointError) as error:
            load_checkpoint(path, allow_pickle=True)
        assert error.value.code in ("E_TRUNCATED", "E_EMPTY", "E_NOT_A_CHECKPOINT"), cut
    path.write_bytes(content[:-10])
    refused(path, "E_TRUNCATED", allow_pickle=False)


def test_a_legacy_file_cut_at_any_byte_is_refused(tmp_path):
    content = torch_file(tmp_path / "whole.pt", {"w": torch.ones(30), "v": torch.ones(2)}, legacy=True).read_bytes()
    path = tmp_path / "model.pt"
    for cut in range(30, len(content), 5):
        path.write_bytes(content[:cut])
        refused(path, "E_TRUNCATED")


def test_archives_that_two_readers_could_read_differently_are_refused(tmp_path):
    one = torch_file(tmp_path / "one.pt", {"w": torch.zeros(3)})
    two = torch_file(tmp_path / "two.pt", {"w": torch.ones(3)})
    path = tmp_path / "model.pt"
    for content in (one.read_bytes() + two.read_bytes(), one.read_bytes() + b"tail", one.read_bytes() + bytes(100)):
        path.write_bytes(content)
        refused(path, "E_ZIP")
    content = bytearray(one.read_bytes())
    directory = content.index(b"PK\x01\x02")
    name = content.index(b"data.pkl")
    content[name : name + 8] = b"evil.pkl"  # the member's own header only
    path.write_bytes(content)
    refused(path, "E_ZIP")
    content = bytearray(one.read_bytes())
    content[directory + 8] |= 1  # encrypted, says the directory
    path.write_bytes(content)
    refused(path, "E_ZIP")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", pickle.dumps({}))
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("a/data.pkl", pickle.dumps({}))
    refused(path, "E_ZIP")


def test_compressed_archives_are_refused(tmp_path):
    source = torch_file(tmp_path / "one.pt", {"w": torch.zeros(1000)})
    path = edit_zip(source, tmp_path / "model.pt", compression=zipfile.ZIP_DEFLATED)
    refused(path, "E_COMPRESSED")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_programs_and_other_archives_are_called_by_their_name(tmp_path):
    path = tmp_path / "model.pt"
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), str(path))
    refused(path, "E_TORCHSCRIPT")
    refused(path, "E_TORCHSCRIPT", allow_pickle=False)
    np.savez(tmp_path / "a.npz", w=np.zeros(2))
    refused(tmp_path / "a.npz", "E_FORMAT")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/archive_format", "pt2")
        archive.writestr("model/models/model.json", "{}")
    refused(path, "E_FORMAT")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    refused(path, "E_FORMAT")
    path.write_bytes(b"model.th" + bytes(249) + b"ustar\0" + bytes(300))
    assert "tar" in refused(path, "E_FORMAT").found


def test_storages_that_are_not_as_the_pickle_says_are_refused(tmp_path):
    source = torch_file(tmp_path / "one.pt", {"w": torch.arange(16.0)})
    path = tmp_path / "model.pt"
    for numel in (17, 10**6, 2**40, 2**61, -5):
        forged = b"\x8a\x08" + struct.pack("<q", numel)
        edit_zip(source, path, lambda n, d, f=forged: d.replace(b"K\x10", f) if n.endswith("data.pkl") else d)
        refused(path, "E_STORAGE")
    edit_zip(source, path, lambda name, data: None if name.endswith("data/0") else data)
    assert "'0'" in refused(path, "E_STORAGE").found


def test_small_files_cannot_present_huge_tensors(tmp_path):
    path = torch_file(tmp_path / "model.pt", {"w": torch.zeros(1).expand(2**40)})
    assert path.stat().st_size < 3000
    assert refused(path, "E_EXPANDED").tensor == "w"


def test_views_become_tensors_of_their_own_size(tmp_path):
    large = torch.arange(1_000_000.0)
    content = {
        "slice": large[10:20],
        "transposed": large[:6].reshape(2, 3).T,
        "expanded": large[3].expand(4),
        "parameter": torch.nn.Parameter(large[:2]),
    }
    loaded = load_checkpoint(torch_file(tmp_path / "model.pt", content), allow_pickle=True)
    assert same(loaded, content)
    for tensor in loaded.values():
        assert tensor.is_contiguous()
        assert not tensor.requires_grad
        assert type(tensor) is torch.Tensor
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tensors_that_are_no_weights_are_refused_by_name(tmp_path):
    path = tmp_path / "model.pt"
    invalid = torch.sparse_coo_tensor(torch.tensor([[9]]), torch.ones(1), (3,), check_invariants=False)
    cases = {
        "E_META": torch.zeros(2, device="meta"),
        "E_QUANTISED": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
        "E_SPARSE": invalid,
        "E_SHAPE": torch.zeros([1] * 40),
    }
    for code, tensor in cases.items():
        assert refused(torch_file(path, {"good": torch.ones(1), "bad": tensor}), code).tensor == "bad"


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr", "to_sparse_csc"])
def test_valid_sparse_tensors_become_dense(layout, tmp_path):
    dense = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    path = torch_file(tmp_path / "model.pt", {"w": getattr(dense, layout)()})
    assert same(load_checkpoint(path, allow_pickle=True), {"w": dense})


@pytest.mark.parametrize("entry", ["state_dict", "model_state_dict", "model", "net", "ema", "anything"])
def test_the_one_state_dict_of_a_nest_is_found(entry, tmp_path):
    moments = {"state": {0: {"exp_avg": torch.ones(3), "step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1}]}
    content = {"epoch": 3, "loss": 0.5, entry: small_network(), "optimizer": moments, "lr_scheduler": {"last": 1}}
    content["rng_state"] = torch.get_rng_state()
    path = torch_file(tmp_path / "model.pt", content)
    assert same(load_checkpoint(path, allow_pickle=True), small_network())
    assert same(load_checkpoint(path, allow_pickle=True, entry=entry), small_network())
    nested = torch_file(tmp_path / "nested.pt", {"model": {"state_dict": small_network()}, "version": "1"})
    assert same(load_checkpoint(nested, allow_pickle=True), small_network())


def test_usual_names_go_before_others(tmp_path):
    content = {"hyperparameters": {"mean": torch.zeros(3)}, "model": small_network()}
    assert same(load_checkpoint(torch_file(tmp_path / "model.pt", content), allow_pickle=True), small_network())


@pytest.mark.parametrize(
    ("content", "both"),
    [
        ({"state_dict": small_network(1), "ema": small_network(2)}, ("state_dict", "ema")),
        ({"generator": small_network(1), "discriminator": small_network(2)}, ("generator", "discriminator")),
        ({"model": {"a": small_network(1), "b": small_network(2)}}, ("a", "b")),
        ({**small_network(), "ema": small_network(2)}, ("ema", "6 tensors")),
    ],
)
def test_two_state_dicts_are_ambiguous_until_one_is_named(content, both, tmp_path):
    path = torch_file(tmp_path / "model.pt", content)
    error = refused(path, "E_AMBIGUOUS")
    for name in both:
        assert name in error.found
    entry = error.fix.split("'")[1]  # the fix can be used as it stands
    assert load_checkpoint(path, allow_pickle=True, entry=entry).keys() == small_network().keys()


def test_the_outermost_dict_can_be_named(tmp_path):
    path = torch_file(tmp_path / "model.pt", {**small_network(), "ema": small_network(2)})
    assert same(load_checkpoint(path, allow_pickle=True, entry=""), small_network())
    assert same(load_checkpoint(path, allow_pickle=True, entry="ema"), small_network(2))
    assert "'ema'" in refused(path, "E_STRUCTURE", entry="emma").found


def deep(levels):
    content = {"w": torch.ones(1)}
    for _ in range(levels):
        content = {"model": content}
    return content


def cycle():
    content = {"w": torch.ones(1)}
    content["self"] = content
    return content


def shared_without_cycle():
    part = []
    for _ in range(25):
        part = [part, part]  # 2^25 paths, 25 lists
    return {"w": torch.ones(1), "shared": part}


@pytest.mark.parametrize(
    "content",
    [
        *(cycle(), deep(40), deep(300), {}, {"epoch": 1}, {"a": {}}, [torch.ones(1)], torch.ones(1)),
        *({0: torch.ones(1)}, {"model": {1: torch.ones(1)}}, {"optimizer": {"state": torch.ones(1)}}, 7, None),
    ],
    ids=str,
)
def test_what_holds_no_state_dict_is_refused(content, tmp_path):
    refused(torch_file(tmp_path / "model.pt", content), "E_STRUCTURE")


def test_shared_parts_are_no_cycle_and_looked_at_once(tmp_path):
    path = torch_file(tmp_path / "model.pt", shared_without_cycle())
    assert same(load_checkpoint(path, allow_pickle=True), {"w": torch.ones(1)})


def test_names_of_pickles_are_checked_too(tmp_path):
    assert refused(torch_file(tmp_path / "a.pt", {"x" * 5000: torch.ones(1)}), "E_NAME").tensor == "x" * 5000
    hostile = {"../../a\0\n": torch.ones(1)}
    assert same(load_checkpoint(torch_file(tmp_path / "b.pt", hostile), allow_pickle=True), hostile)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_pickles_of_newer_protocols_say_what_to_do(tmp_path):
    path = tmp_path / "model.pt"
    torch.save(small_network(), path, pickle_protocol=4)
    assert "state_dict()" in refused(path, "E_PICKLE_CONTENT").fix


def test_the_environment_cannot_switch_safe_loading_off(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    canary = tmp_path / "canary"
    refused(pickle_in_zip(tmp_path / "model.pt", Call(os.system, f"touch {canary}")), "E_UNSAFE_PICKLE")
    refused(torch_file(tmp_path / "args.pt", {"args": BENIGN["namespace"], **small_network()}), "E_PICKLE_CONTENT")
    assert not canary.exists()


def test_torch_itself_refuses_what_the_scan_would_let_pass(tmp_path, monkeypatch):
    """Two gates: with the first one open, the second one stands."""
    from sane_hf.checkpoints.pickle_scan import PickleScan

    monkeypatch.setattr(PickleScan, "unsafe", lambda self: [])
    canary = tmp_path / "canary"
    refused(pickle_in_zip(tmp_path / "model.pt", Call(os.system, f"touch {canary}")), "E_PICKLE_CONTENT")
    assert not canary.exists()
