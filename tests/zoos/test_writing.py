"""What is written is what plain `datasets` reads; what cannot be a zoo is refused and leaves nothing behind."""

import hashlib
import json
import shutil
import zlib

import datasets
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load
from torch import Tensor

from sane_hf.modeling.layout_sane import TokenLayout
from sane_hf.zoos import SCHEMA, ZooWriter, content_hash, load_zoo, reference_weights, weight_matrix, writing, zoo_info


def weights(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "fc.weight": torch.randn(3, 4, generator=generator).to(dtype),
        "fc.bias": torch.randn(3, generator=generator).to(dtype),
        "last": torch.randn(2, generator=generator),
    }


def seed_of(model_id: str, epoch: int) -> int:
    return zlib.crc32(f"{model_id} {epoch}".encode())


def row(model_id: str, epoch: int, **more):
    return {
        "model_id": model_id,
        "epoch": epoch,
        "architecture": "mlp",
        "architecture_config": "{}",
        "weights": weights(seed_of(model_id, epoch)),
    } | more


@pytest.fixture
def zoo(tmp_path):
    """Five models of two epochs in three splits."""
    with ZooWriter(tmp_path / "zoo", "tiny", {"mlp": {"config": "{}"}}, {"how": "by hand"}) as writer:
        for index, split in enumerate(["train", "test", "train", "validation", "train"]):
            for epoch in (0, 3):
                measured = {"train_accuracy": 0.75, "test_accuracy": 0.5, "validation_accuracy": 0.1 * index * epoch}
                writer.add(split, row(f"m{index}", epoch, seed=index, activation="tanh", **measured))
    return tmp_path / "zoo"


def test_plain_datasets_finds_the_splits(zoo):
    found = datasets.load_dataset(str(zoo))
    assert {split: part.num_rows for split, part in found.items()} == {"train": 6, "validation": 2, "test": 2}
    assert found["train"].column_names == SCHEMA.names
    assert found["train"].features["weights"].dtype == "large_binary"
    first = found["train"][1]
    assert (first["model_id"], first["epoch"], first["learning_rate"]) == ("m0", 3, None)
    assert first["generalization_gap"] == 0.25
    assert first["sha256"] == hashlib.sha256(first["weights"]).hexdigest()
    expected = weights(seed_of("m0", 3))
    assert all(torch.equal(expected[name], tensor) for name, tensor in load(first["weights"]).items())
    streamed = datasets.load_dataset(str(zoo), split="test", streaming=True)
    assert [part["model_id"] for part in streamed] == ["m1", "m1"]


def test_load_zoo_decodes_weights_in_the_order_of_the_network(zoo):
    train = load_zoo(zoo, "train")
    assert list(train[0]["weights"]) == ["fc.weight", "fc.bias", "last"]
    assert [list(part) for part in train[:2]["weights"]] == [["fc.weight", "fc.bias", "last"]] * 2
    late = train.filter(lambda epoch: epoch == 3, input_columns="epoch")
    assert late["model_id"] == ["m0", "m2", "m4"]
    assert torch.equal(late[2]["weights"]["last"], weights(seed_of("m4", 3))["last"])
    assert isinstance(train.with_format(None)[0]["weights"], bytes)
    with pytest.raises(ValueError, match="no split 'dev'; it has .*'validation'"):
        load_zoo(zoo, "dev")


def test_info_names_reference_splits_and_content(zoo):
    info = zoo_info(zoo)
    assert info["reference"] == {"model_id": "m4", "epoch": 3}  # best at its last epoch, in the train split
    (file,) = (zoo / "data").glob("train-*")
    assert info["splits"]["train"] == {"models": 3, "rows": 6, "files": [f"data/{file.name}"]}
    assert info["build"] == {"how": "by hand"}
    rows = [
        (part["model_id"], part["epoch"], part["sha256"])
        for split in datasets.load_dataset(str(zoo)).values()
        for part in split
    ]
    assert info["content_hash"] == content_hash(rows[::-1])
    assert torch.equal(reference_weights(zoo)["last"], weights(seed_of("m4", 3))["last"])


def test_ties_for_the_reference_go_to_the_first_model_id(tmp_path):
    with ZooWriter(tmp_path / "zoo", "tiny", {}) as writer:
        for model_id in ("c", "a", "b"):
            writer.add("train", row(model_id, 1, validation_accuracy=0.5))
        writer.add("test", row("0", 1, validation_accuracy=0.9))
    assert zoo_info(tmp_path / "zoo")["reference"] == {"model_id": "a", "epoch": 1}


def test_a_zoo_without_accuracies_has_no_reference(tmp_path):
    with ZooWriter(tmp_path / "zoo", "tiny", {}) as writer:
        writer.add("train", row("a", 1))
    assert "Test accuracy" not in (tmp_path / "zoo" / "README.md").read_text()
    with pytest.raises(ValueError, match="names no reference"):
        reference_weights(tmp_path / "zoo")


def test_row_groups_and_shards_end_by_bytes(tmp_path, monkeypatch):
    size = len(writing.to_bytes(weights(0)))
    monkeypatch.setattr(writing, "ROW_GROUP_BYTES", 3 * size)
    monkeypatch.setattr(writing, "SHARD_BYTES", 6 * size)
    with ZooWriter(tmp_path / "zoo", "tiny", {}) as writer:
        for epoch in range(8):
            writer.add("train", row("a", epoch))
    files = sorted((tmp_path / "zoo" / "data").iterdir())
    assert [file.name[:20] for file in files] == ["train-00000-of-00002", "train-00001-of-00002"]
    groups = [pq.read_metadata(file) for file in files]
    assert [[part.row_group(i).num_rows for i in range(part.num_row_groups)] for part in groups] == [[3, 3], [2]]
    assert load_zoo(tmp_path / "zoo", "train")["epoch"] == list(range(8))


def test_card_shows_the_spread(zoo):
    card = (zoo / "README.md").read_text()
    assert "10 checkpoints of 5 neural networks" in card
    assert " 50- 55 %     5 ####" in card
    assert all(f"| `{name}` |" in card for name in SCHEMA.names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_weight_matrix_is_the_flat_vectors(tmp_path, dtype):
    with ZooWriter(tmp_path / "zoo", "tiny", {}) as writer:
        for epoch in range(5):
            # another dtype in the midst: another header, of another length
            writer.add("train", row("a", epoch, weights=weights(epoch, dtype if epoch != 2 else torch.float32)))
    train = load_zoo(tmp_path / "zoo", "train")
    layout = TokenLayout.plan({"last": (2,), "fc.bias": (3,), "fc.weight": (3, 4)}, token_size=4)
    for part in (train, train.select([4, 2, 0]), train.filter(lambda epoch: epoch > 0, input_columns="epoch")):
        matrix = weight_matrix(part, layout)
        assert matrix.dtype == torch.float32
        expected = torch.stack([layout.flatten(example["weights"]).float() for example in part])
        assert torch.equal(matrix, expected)


def test_weight_matrix_refuses_another_architecture(zoo):
    train = load_zoo(zoo, "train")
    shapes = {"fc.weight": (3, 4), "fc.bias": (3,), "last": (2,)}
    for changed, message in (
        (shapes | {"new": (1,)}, "row 0: tensor 'new' of the layout is missing"),
        (shapes | {"last": (3,)}, r"row 0: tensor 'last' has shape \(2,\), the layout needs \(3,\)"),
        ({"fc.weight": (3, 4), "fc.bias": (3,)}, "row 0: tensor 'last' is not part of the layout"),
    ):
        with pytest.raises(ValueError, match=message):
            weight_matrix(train, TokenLayout.plan(changed, token_size=4))


@pytest.mark.parametrize(
    ("split", "change", "message"),
    [
        ("test", {}, "model 'a' leaks: it lies in split 'train' and would be added to 'test'"),
        ("train", {}, "model 'a' at epoch 0 was added before"),
        ("dev", {"model_id": "b"}, "split 'dev' is unknown"),
        ("train", {"model_id": "b", "acc": 1}, "column 'acc' is not part of a zoo"),
        ("train", {"model_id": "b", "weights": None}, "lacks 'weights'"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_left(tmp_path, split, change, message):
    def write():
        with ZooWriter(tmp_path / "zoo", "tiny", {}) as writer:
            writer.add("train", row("a", 0))
            writer.add(split, row("a", 0) | change)

    with pytest.raises(ValueError, match=message):
        write()
    assert list(tmp_path.iterdir()) == []


def test_an_empty_zoo_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the zoo 'tiny' is empty"), ZooWriter(tmp_path / "zoo", "tiny", {}):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_zoo_built_anew_in_the_same_place_is_not_served_from_the_cache(zoo):
    assert load_zoo(zoo, "test")["test_accuracy"] == [0.5, 0.5]
    shutil.rmtree(zoo)
    with ZooWriter(zoo, "tiny", {}) as writer:
        writer.add("test", row("m1", 0, test_accuracy=0.25))
    assert datasets.load_dataset(str(zoo))["test"]["test_accuracy"] == [0.25]
    shutil.rmtree(zoo)
    with ZooWriter(zoo, "tiny", {}) as writer:  # the same weights, measured anew
        writer.add("test", row("m1", 0, test_accuracy=0.75))
    assert datasets.load_dataset(str(zoo))["test"]["test_accuracy"] == [0.75]


def test_a_zoo_is_never_overwritten(zoo):
    with pytest.raises(ValueError, match="exists already"):
        ZooWriter(zoo, "tiny", {})
    assert zoo_info(zoo)["name"] == "tiny"


def test_a_leak_made_by_hand_is_found_on_loading(zoo):
    card, files = (
        (zoo / "README.md").read_text(),
        {part: of["files"][0] for part, of in zoo_info(zoo)["splits"].items()},
    )
    (zoo / "README.md").write_text(card.replace(files["test"], files["validation"]))
    with pytest.raises(ValueError, match="model 'm3' lies in the splits 'validation' and 'test'"):
        load_zoo(zoo)


def test_what_is_no_zoo_is_named(tmp_path, zoo, monkeypatch):
    with pytest.raises(ValueError, match="there is no zoo at .*nowhere"):
        load_zoo(tmp_path / "nowhere")
    monkeypatch.chdir(tmp_path)
    for read in (load_zoo, zoo_info):
        with pytest.raises(ValueError, match="no folder zoos/nowhere here, and no such dataset"):
            read("zoos/nowhere")
    (tmp_path / "zoos").mkdir()
    with pytest.raises(ValueError, match="no zoo at zoos/nowhere"):
        load_zoo("zoos/nowhere")
    with pytest.raises(ValueError, match="it has no zoo.json"):
        zoo_info(tmp_path)
    info = json.loads((zoo / "zoo.json").read_text())
    (zoo / "zoo.json").write_text(json.dumps(info | {"version": 99}))
    with pytest.raises(ValueError, match="format version 99"):
        zoo_info(zoo)
