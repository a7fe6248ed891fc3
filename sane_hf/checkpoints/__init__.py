"""Read any checkpoint safely, and write so that nothing is lost.

`load_checkpoint` reads safetensors files, sharded checkpoints, folders and, on request, PyTorch's pickles;
`save_checkpoint` writes safetensors; `to_bytes` and `from_bytes` are the same in memory, as the rows of a zoo need
it. Whatever is wrong with a file is a `CheckpointError`.
"""

from __future__ import annotations

from .atomic import atomic_directory, atomic_file, write_json_atomic, write_text_atomic
from .errors import CheckpointError
from .header import Header, HeaderLimits, TensorInfo
from .header_reading import read_header
from .names import natural_sort, tied_groups
from .reading import load_checkpoint
from .views import from_bytes
from .writing import save_checkpoint, to_bytes

__all__ = [
    "CheckpointError",
    "Header",
    "HeaderLimits",
    "TensorInfo",
    "atomic_directory",
    "atomic_file",
    "from_bytes",
    "load_checkpoint",
    "natural_sort",
    "read_header",
    "save_checkpoint",
    "tied_groups",
    "to_bytes",
    "write_json_atomic",
    "write_text_atomic",
]
