"""Folders and sharded checkpoints: which file is read, and indexes that lie."""

import json
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch

from sane_hf.checkpoints import CheckpointError, load_checkpoint, save_checkpoint

from .checkpoint_files import entry, small_network, torch_file
from .checkpoint_files import safetensors as raw
from .test_checkpoint_reading import same

SHARDS = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def folder(tmp_path):
    """A checkpoint in two shards; the second holds the dense layers."""
    network = small_network()
    parts = [{name: t for name, t in network.items() if name.startswith("fc") == bool(i)} for i in range(2)]
    for name, part in zip(SHARDS, parts, strict=True):
        safetensors.torch.save_file(part, tmp_path / name)
    write_index(tmp_path, {name: SHARDS[i] for i in range(2) for name in parts[i]})
    return tmp_path


def write_index(folder: Path, weight_map, name="model.safetensors.index.json"):
    size = sum(tensor.nbytes for tensor in small_network().values())
    (folder / name).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}))


def index_of(folder: Path) -> dict:
    return json.loads((folder / "model.safetensors.index.json").read_text())


def change_index(folder: Path, **changes) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({**index_of(folder), **changes}))


def refused(path, code: str, **options) -> CheckpointError:
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(path, **options)
    assert error.value.code == code, str(error.value)
    assert str(error.value).isprintable()
    return error.value


def test_shards_are_merged_in_natural_order(folder):
    natural = ["conv1.bias", "conv1.weight", "fc2.bias", "fc2.weight", "fc10.bias", "fc10.weight"]
    for path in (folder, str(folder), folder / "model.safetensors.index.json"):
        loaded = load_checkpoint(path)
        assert same(loaded, small_network())
        assert list(loaded) == natural


def test_an_index_without_metadata_is_fine(folder):
    index = index_of(folder)
    del index["metadata"]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert same(load_checkpoint(folder), small_network())


def test_prefixes_count_over_all_shards(folder):
    for i, name in enumerate(SHARDS):
        part = safetensors.torch.load_file(folder / name)
        safetensors.torch.save_file({("module." if i else "") + k: v for k, v in part.items()}, folder / name)
    names = {("module." if n.startswith("fc") else "") + n: s for n, s in index_of(folder)["weight_map"].items()}
    change_index(folder, weight_map=names)
    assert set(load_checkpoint(folder)) == set(names)


@pytest.mark.parametrize(
    "shard",
    [
        *("../secret.safetensors", "/etc/secret.safetensors", "C:secret.safetensors", "C:\\secret.safetensors"),
        *("..\\secret.safetensors", "sub/../../secret.safetensors", "\\\\host\\share\\secret.safetensors"),
        *(
            "a\0b.safetensors",
            "",
            ".",
            "..",
            "model.bin",
            "model.safetensors.bin",
            "model.SAFETENSORS.pt",
            "\ud800.safetensors",
        ),
    ],
)
def test_no_shard_outside_the_folder_is_opened(shard, folder, monkeypatch):
    (folder.parent / "secret.safetensors").write_bytes(b"canary")
    weight_map = index_of(folder)["weight_map"]
    change_index(folder, weight_map={**weight_map, "secret": shard})
    opened = []
    genuine = Path.open

    def watched(self, *args, **keywords):
        opened.append(self.name)
        return genuine(self, *args, **keywords)

    monkeypatch.setattr(Path, "open", watched)
    for allow_pickle in (False, True):
        error = refused(folder, "E_SHARD_PATH", allow_pickle=allow_pickle)
        assert repr(shard)[1:-1] in error.found
        assert error.path == str(folder / "model.safetensors.index.json")
    assert set(opened) == {"model.safetensors.index.json"}


def test_a_link_that_leads_out_is_refused_but_the_cache_of_the_hub_works(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (folder / SHARDS[0]).rename(elsewhere / "shard")
    (folder / SHARDS[0]).symlink_to(elsewhere / "shard")
    refused(folder, "E_SHARD_PATH")
    repository = tmp_path_factory.mktemp("models--someone--something")
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for name in (*SHARDS, "model.safetensors.index.json"):
        (repository / "blobs" / name[::-1]).write_bytes((folder / name).read_bytes())
        (snapshot / name).symlink_to(Path("..") / ".." / "blobs" / name[::-1])
    assert same(load_checkpoint(snapshot), small_network())


def test_all_missing_shards_are_listed_at_once(folder):
    for name in SHARDS:
        os.unlink(folder / name)
    error = refused(folder, "E_SHARD_MISSING")
    for name in SHARDS:
        assert name in error.found


def test_names_that_no_file_can_have_are_missing_shards(folder):
    (folder / "loop.safetensors").symlink_to("loop.safetensors")
    for shard in ("x" * 5000 + ".safetensors", "sub/x.safetensors", "loop.safetensors"):
        change_index(folder, weight_map={**index_of(folder)["weight_map"], "w": shard})
        refused(folder, "E_SHARD_MISSING")
    refused(folder / ("x" * 5000), "E_UNREADABLE")


def test_keys_on_which_index_and_shards_disagree_are_named(folder):
    weight_map = index_of(folder)["weight_map"]
    change_index(folder, weight_map={**weight_map, "ghost": SHARDS[0]})
    error = refused(folder, "E_SHARD_KEYS")
    assert error.tensor == "ghost"
    assert SHARDS[0] in error.found
    change_index(folder, weight_map={name: shard for name, shard in weight_map.items() if name != "fc2.bias"})
    error = refused(folder, "E_SHARD_KEYS")
    assert error.tensor == "fc2.bias"
    assert SHARDS[1] in error.found
    change_index(folder, weight_map={**weight_map, "fc2.bias": SHARDS[0]})
    assert refused(folder, "E_SHARD_KEYS").tensor == "fc2.bias"
    change_index(folder, weight_map=weight_map)
    first = safetensors.torch.load_file(folder / SHARDS[0])
    safetensors.torch.save_file({**first, "fc2.bias": torch.ones(4)}, folder / SHARDS[0])
    error = refused(folder, "E_SHARD_KEYS")
    assert error.tensor == "fc2.bias"
    for name in SHARDS:
        assert name in error.found


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ('{"weight_map": {"w"', "E_INDEX"),
        ('{"weight_map": {}}', "E_INDEX"),
        ('{"weight_map": []}', "E_INDEX"),
        ('{"error": "not found"}', "E_INDEX"),
        ('["weight_map"]', "E_INDEX"),
        ('{"weight_map": {"w": 1}}', "E_INDEX"),
        ('{"weight_map": {"w": "a.safetensors"}, "metadata": {"total_size": "x"}}', "E_INDEX"),
        ('{"weight_map": {"w": "a.safetensors", "w": "b.safetensors"}}', "E_DUPLICATE_KEY"),
        ('{"weight_map": {"w": "a.safetensors"}, "weight_map": {}}', "E_DUPLICATE_KEY"),
        ('{"weight_map": ' + '{"a":' * 100_000, "E_INDEX"),
        ('{"weight_map": {"w": "' + "a" * (10 << 20) + '"}}', "E_INDEX"),
    ],
    ids=range(11),
)
def test_damaged_indexes_are_refused(text, code, folder):
    (folder / "model.safetensors.index.json").write_text(text)
    refused(folder, code)


def test_a_total_size_that_is_not_that_of_the_shards_is_refused(folder):
    change_index(folder, metadata={"total_size": 7})
    error = refused(folder, "E_SHARD_SIZE")
    assert "7" in error.expected
    assert "total_size" in error.fix


def test_damaged_shards_are_named(folder):
    content = (folder / SHARDS[1]).read_bytes()
    (folder / SHARDS[1]).write_bytes(content[:-1])
    assert SHARDS[1] in refused(folder, "E_TRUNCATED").path
    torch_file(folder / SHARDS[1], small_network())
    assert SHARDS[1] in refused(folder, "E_PICKLE", allow_pickle=True).path  # an index of safetensors names no pickle
    (folder / SHARDS[1]).write_text('{"weight_map": {"w": "model.safetensors"}}')
    refused(folder, "E_NOT_A_CHECKPOINT")


def test_sharded_pickles_are_read_on_request(tmp_path):
    network = small_network()
    names = list(network)
    weight_map = {}
    for i, part in enumerate((names[:3], names[3:])):
        torch_file(tmp_path / f"pytorch_model-{i}.bin", {name: network[name] for name in part})
        weight_map |= dict.fromkeys(part, f"pytorch_model-{i}.bin")
    write_index(tmp_path, weight_map, "pytorch_model.bin.index.json")
    assert same(load_checkpoint(tmp_path, allow_pickle=True), network)
    refused(tmp_path, "E_SHARD_PATH")
    write_index(tmp_path, {**weight_map, "ghost": "pytorch_model-0.bin"}, "pytorch_model.bin.index.json")
    assert refused(tmp_path, "E_SHARD_KEYS", allow_pickle=True).tensor == "ghost"


def test_the_one_checkpoint_of_a_folder_is_found(tmp_path):
    refused(tmp_path, "E_NOT_FOUND")
    torch_file(tmp_path / "state.pt", small_network(3))
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path, "E_PICKLE")
    assert same(load_checkpoint(tmp_path, allow_pickle=True), small_network(3))
    torch_file(tmp_path / "pytorch_model.bin", small_network(2))
    assert same(load_checkpoint(tmp_path, allow_pickle=True), small_network(2))
    save_checkpoint(small_network(1), tmp_path / "adapter.safetensors")
    assert same(load_checkpoint(tmp_path), small_network(1))
    save_checkpoint(small_network(4), tmp_path / "other.safetensors")
    error = refused(tmp_path, "E_AMBIGUOUS")
    assert "adapter.safetensors" in error.found
    assert "other.safetensors" in error.found
    save_checkpoint(small_network(0), tmp_path / "model.safetensors")
    assert same(load_checkpoint(tmp_path), small_network())
    (tmp_path / "model.safetensors").write_bytes(b"broken, and no reason to read the pickle instead")
    refused(tmp_path, "E_NOT_A_CHECKPOINT", allow_pickle=True)


def test_a_configuration_that_says_quantised_is_believed(tmp_path):
    save_checkpoint(small_network(), tmp_path / "model.safetensors")
    for text in ('{"quantization_config": null}', '{"hidden_size": 3}', "broken"):
        (tmp_path / "config.json").write_text(text)
        assert same(load_checkpoint(tmp_path), small_network())
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    assert "gptq" in refused(tmp_path, "E_QUANTISED").found


def test_limits_apply_to_shards_too(folder):
    from sane_hf.checkpoints import HeaderLimits

    refused(folder, "E_TOO_MANY_TENSORS", limits=HeaderLimits(tensors=2))
    (folder / SHARDS[0]).write_bytes(raw({"w" * 5000: entry("U8", [1], 0, 1)}, b"\0"))
    refused(folder, "E_NAME")
