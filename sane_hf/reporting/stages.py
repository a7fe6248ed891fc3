"""Stages of an evaluation whose results are kept on disk, so that an interrupted one goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import logging
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

import sane_hf
from sane_hf.checkpoints import load_checkpoint, save_checkpoint, write_json_atomic

logger = logging.getLogger(__name__)

Result = dict[str, Any]  # JSON values, and numpy arrays at the top level

# The rooms whose code decides a figure. A change in any of them makes kept results stale.
ROOMS = ("modeling", "architectures", "symmetry", "members", "zoos", "generation", "analysis")


class Stages:
    """Runs stages, each once for the same content, and keeps what they return.

    A stage `name` is kept as `name.json`, its arrays beside it as `name.safetensors`.

    Args:
        folder: where results are kept; made if absent.
        content: what all stages depend on, such as hashes of the model and of the zoo.

    Attributes:
        seconds: stage -> seconds it took when it ran.
        peak_memory: most memory, in bytes, that this process or the one that ran a kept stage had in use.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> Stages(folder, {"model": "a"}).run("square", lambda: {"values": np.arange(3) ** 2})["values"].tolist()
        [0, 1, 4]
        >>> Stages(folder, {"model": "a"}).run("square", lambda: 1 / 0)["values"].tolist()  # kept: not run again
        [0, 1, 4]
    """

    def __init__(self, folder: str | Path, content: Mapping[str, str]):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.content = {**content, "code": _code_hash()}
        self.seconds: dict[str, float] = {}
        self._peak = 0

    @property
    def peak_memory(self) -> int:
        return max(self._peak, _peak_memory())

    def run(self, name: str, compute: Callable[[], Result], **settings: Any) -> Result:
        """Return the kept result of a stage, or compute and keep it.

        Args:
            name: of the stage; a file name.
            compute: gives the result: JSON values and, at the top level, numpy arrays of numbers or booleans.
            **settings: JSON values that the result depends on beside the content.

        Returns:
            The result, the same whether kept or computed.
        """
        key = hashlib.sha256(json.dumps([self.content, settings], sort_keys=True).encode()).hexdigest()
        file = self.folder / f"{name}.json"
        kept = json.loads(file.read_text()) if file.exists() else {}
        if kept.get("key") != key:
            started = time.perf_counter()
            result = compute()
            arrays = {field: value for field, value in result.items() if isinstance(value, np.ndarray)}
            kept = {
                "key": key,
                "seconds": time.perf_counter() - started,
                "peak_memory_bytes": _peak_memory(),
                "arrays": bool(arrays),
                "result": {field: value for field, value in result.items() if field not in arrays},
            }
            kept = json.loads(json.dumps(kept))  # tuples and the like become what a kept result would give
            # Arrays first: the JSON file, which says that the stage is done, is the last to appear.
            if arrays:
                tensors = {field: torch.from_numpy(np.ascontiguousarray(array)) for field, array in arrays.items()}
                save_checkpoint(tensors, self._arrays(name), metadata={"key": key})
            write_json_atomic(file, kept)
            logger.info("%s took %.1f s", name, kept["seconds"])
        else:
            logger.info("%s is kept in %s", name, file)
        self.seconds[name] = kept["seconds"]
        self._peak = max(self._peak, kept["peak_memory_bytes"])
        result = dict(kept["result"])
        if kept["arrays"]:
            result.update({field: value.numpy() for field, value in load_checkpoint(self._arrays(name)).items()})
        return result

    def _arrays(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread, as small networks like it.

    Threads wait for each other at every small operation: with two threads on two cores that others use too, evaluating
    decoded networks took 446 s instead of 14.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def hash_files(files: Iterable[Path]) -> str:
    """One hash of the names and contents of files, in the order given.

    Args:
        files: existing files.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(f"{file.name}\0{hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def _code_hash() -> str:
    package = Path(sane_hf.__file__).parent
    files = [path for room in ROOMS for path in (package / room).glob("*.py")]
    files += [Path(__file__).with_name("subject.py"), *Path(__file__).parent.glob("*ing.py")]
    return hash_files(sorted(files))


def _peak_memory() -> int:
    """Bytes; Linux counts in kilobytes, macOS in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
