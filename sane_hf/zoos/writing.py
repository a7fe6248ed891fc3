"""Write a zoo: Parquet shards per split, `zoo.json`, and a card whose YAML makes `load_dataset` find the splits."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from sane_hf.checkpoints import to_bytes

from .card import render_zoo_card
from .schema import SCHEMA, SPLITS, content_hash

logger = logging.getLogger(__name__)

ROW_GROUP_BYTES = 16 * 2**20  # some 1,600 rows of 10 kB, one row of 45 MB
SHARD_BYTES = 256 * 2**20
ZOO_VERSION = 1  # of zoo.json and the columns
_ENCODED = ["model_id", "architecture", "architecture_config", "activation", "initialization"]
# Statistics let readers skip row groups; on the weights they would cost two thirds of the writing speed.
_STATISTICS = [name for name in SCHEMA.names if name != "weights"]


class ZooWriter:
    """Write the rows of a zoo, one split after the other or mixed, holding at most one row group per split in memory.

    The zoo appears at `path` whole, when the `with` block ends without an error; until then it lies in a hidden folder
    beside it.

    Args:
        path: folder of the zoo, which must not exist yet.
        name: of the zoo.
        architectures: what `describe_architecture` gives, for each architecture by name.
        build: how the zoo was made, JSON values; goes into `zoo.json` and onto the card.
        licence: identifier for the card, such as "apache-2.0".

    Raises:
        ValueError: `path` exists.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> import torch
        >>> with TemporaryDirectory() as folder:
        ...     with ZooWriter(Path(folder) / "zoo", "tiny", {}) as writer:
        ...         writer.add("train", {"model_id": "a", "epoch": 0, "architecture": "mlp",
        ...             "architecture_config": "{}", "weights": {"w": torch.ones(2)}})
        ...     sorted(path.name for path in (Path(folder) / "zoo").rglob("*"))  # doctest: +ELLIPSIS
        ['README.md', 'data', 'train-00000-of-00001-...parquet', 'zoo.json']
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        name: str,
        architectures: Mapping[str, Any],
        build: Mapping[str, Any] | None = None,
        licence: str = "apache-2.0",
    ) -> None:
        self.path = Path(path)
        if self.path.exists():
            raise ValueError(f"{self.path} exists already; a zoo is never overwritten: remove it or write elsewhere")
        self.name, self.licence = name, licence
        self.architectures, self.build = dict(architectures), dict(build or {})
        self._folder = self.path.parent / f".{self.path.name}.writing"
        self._split_of: dict[str, str] = {}
        self._splits: dict[str, _SplitWriter] = {}
        self._rows: dict[tuple[str, int], dict[str, Any]] = {}  # all columns but the weights

    def __enter__(self) -> ZooWriter:
        if self._folder.exists():
            shutil.rmtree(self._folder)
        (self._folder / "data").mkdir(parents=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            for split in self._splits.values():
                split.close()
            shutil.rmtree(self._folder, ignore_errors=True)

    def add(self, split: str, row: Mapping[str, Any]) -> None:
        """Add one checkpoint.

        Args:
            split: "train", "validation" or "test".
            row: values by column of `SCHEMA`. `weights` is a state dict or safetensors bytes; `sha256` and
                `generalization_gap` are computed; a property left out is null.

        Raises:
            ValueError: an unknown split or column, a missing required column, a checkpoint added before, or a model
                that lies in another split already (a leak), naming it.
        """
        if split not in SPLITS:
            raise ValueError(f"split {split!r} is unknown; a zoo has {list(SPLITS)}")
        row = dict(row)
        unknown = sorted(set(row) - set(SCHEMA.names))
        if unknown:
            raise ValueError(f"column {unknown[0]!r} is not part of a zoo; its columns are {SCHEMA.names}")
        missing = [
            field.name
            for field in SCHEMA
            if not field.nullable and field.name != "sha256" and row.get(field.name) is None
        ]
        if missing:
            raise ValueError(
                f"a row of the zoo lacks {missing[0]!r}; needed are model_id, epoch, architecture, "
                "architecture_config and weights"
            )
        model_id, epoch = row["model_id"], row["epoch"]
        other = self._split_of.setdefault(model_id, split)
        if other != split:
            raise ValueError(
                f"model {model_id!r} leaks: it lies in split {other!r} and would be added to {split!r}; "
                "all checkpoints of a model belong to one split"
            )
        if (model_id, epoch) in self._rows:
            raise ValueError(f"model {model_id!r} at epoch {epoch} was added before")
        if not isinstance(row["weights"], bytes):
            weights: dict[str, Tensor] = row["weights"]
            row["weights"] = to_bytes(weights)
        row["sha256"] = hashlib.sha256(row["weights"]).hexdigest()
        if row.get("train_accuracy") is not None and row.get("test_accuracy") is not None:
            row["generalization_gap"] = row["train_accuracy"] - row["test_accuracy"]
        properties = {name: row.get(name) for name in SCHEMA.names if name != "weights"}
        self._rows[model_id, epoch] = properties | {"split": split}
        if split not in self._splits:
            self._splits[split] = _SplitWriter(self._folder / "data", split)
        self._splits[split].add(row)

    def _finish(self) -> None:
        if not self._rows:
            raise ValueError(f"the zoo {self.name!r} is empty: not one checkpoint was added; nothing was written")
        splits = {name: self._splits[name].finish() for name in SPLITS if name in self._splits}
        info = {
            "version": ZOO_VERSION,
            "name": self.name,
            "architectures": self.architectures,
            "reference": choose_reference(self._rows.values()),
            "splits": splits,
            "content_hash": content_hash((*key, row["sha256"]) for key, row in self._rows.items()),
            "build": self.build,
        }
        (self._folder / "zoo.json").write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
        card = render_zoo_card(info, list(self._rows.values()), self.licence)
        (self._folder / "README.md").write_text(card, encoding="utf-8")
        for path in [*self._folder.rglob("*"), self._folder]:
            _sync(path)
        self._folder.rename(self.path)
        _sync(self.path.parent)
        logger.info("wrote %d checkpoints of %d models to %s", len(self._rows), len(self._split_of), self.path)


class _SplitWriter:
    """The shards of one split; a row group and a shard end when they have reached their bytes."""

    def __init__(self, folder: Path, split: str) -> None:
        self.folder, self.split = folder, split
        self.group: list[dict[str, Any]] = []
        self.group_bytes = self.shard_bytes = 0
        self.models: set[str] = set()
        self.rows = 0
        self.shards: list[Path] = []
        self.digests: list[str] = []
        self.digest = hashlib.sha256()
        self.writer: pq.ParquetWriter | None = None

    def add(self, row: dict[str, Any]) -> None:
        self.group.append(row)
        self.group_bytes += len(row["weights"])
        self.models.add(row["model_id"])
        properties = {name: row.get(name) for name in SCHEMA.names if name != "weights"}  # sha256 stands for them
        self.digest.update(json.dumps(properties, default=str).encode())
        self.rows += 1
        if self.group_bytes >= ROW_GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self.writer is None:
            self.shards.append(self.folder / f"{self.split}-{len(self.shards):05d}.part")
            self.writer = pq.ParquetWriter(
                self.shards[-1], SCHEMA, compression="zstd", use_dictionary=_ENCODED, write_statistics=_STATISTICS
            )
        self.writer.write_table(pa.Table.from_pylist(self.group, schema=SCHEMA), row_group_size=len(self.group))
        self.shard_bytes += self.group_bytes
        self.group, self.group_bytes = [], 0
        if self.shard_bytes >= SHARD_BYTES:
            self.close()

    def close(self) -> None:
        """Close the shard under way, if any."""
        if self.writer is not None:
            self.writer.close()
            self.digests.append(self.digest.hexdigest()[:16])
        self.writer, self.shard_bytes, self.digest = None, 0, hashlib.sha256()

    def finish(self) -> dict[str, Any]:
        """Write what is left, give the shards their names, and return the split's entry in `zoo.json`.

        A name ends in a hash of what the shard holds: `datasets` recognises a local dataset in its cache by the name
        of the folder and the names of the files alone, and would go on serving a zoo that was built anew.
        """
        if self.group:
            self._flush()
        self.close()
        files = []
        for index, (shard, digest) in enumerate(zip(self.shards, self.digests, strict=True)):
            target = self.folder / f"{self.split}-{index:05d}-of-{len(self.shards):05d}-{digest}.parquet"
            shard.rename(target)
            files.append(f"{self.folder.name}/{target.name}")
        return {"models": len(self.models), "rows": self.rows, "files": files}


def choose_reference(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Choose the network that the others are aligned to.

    Args:
        rows: properties of every checkpoint, with its `split`.

    Returns:
        `{"model_id", "epoch"}`: among the models of the train split the one whose last checkpoint has the highest
        validation accuracy, ties by model_id, at that epoch. None if no such checkpoint has a validation accuracy.

    Example:
        >>> row = {"model_id": "a", "epoch": 5, "split": "train", "validation_accuracy": 0.5}
        >>> choose_reference([row, row | {"model_id": "b", "validation_accuracy": 0.9}])
        {'model_id': 'b', 'epoch': 5}
    """
    last: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        if row["split"] == "train" and (row["model_id"] not in last or row["epoch"] > last[row["model_id"]]["epoch"]):
            last[row["model_id"]] = row
    candidates = [row for row in last.values() if row["validation_accuracy"] is not None]
    if not candidates:
        return None
    best = min(candidates, key=lambda row: (-row["validation_accuracy"], row["model_id"]))
    return {"model_id": best["model_id"], "epoch": best["epoch"]}


def _sync(path: Path) -> None:
    """Flush a file or folder to disk, so that a crash after the final rename finds it whole."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
