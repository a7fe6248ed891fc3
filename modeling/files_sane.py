"""Saving a weight tokenizer to a folder or the Hub, and loading it, as `AutoTokenizer` expects it."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import PushToHubMixin, cached_file

from .layout_sane import TokenLayout

CONFIG_FILE = "tokenizer_config.json"
REFERENCE_FILE = "reference.safetensors"

_HUB_ARGUMENTS = {
    *("cache_dir", "force_download", "proxies", "token", "revision", "local_files_only", "subfolder", "repo_type"),
}
_LOADING_ARGUMENTS = {"trust_remote_code", "code_revision"}


class TokenizerFiles(PushToHubMixin, ABC):
    """Base of [`WeightTokenizer`]: its files. Everything but the references is JSON."""

    layouts: dict[str, TokenLayout]
    references: dict[str, dict[str, Tensor]]
    _auto_class: str | None = "AutoTokenizer"

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """All but the references as plain JSON data."""

    @classmethod
    @abstractmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of `to_dict`."""

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoTokenizer") -> None:
        """Save this class's code with every tokenizer, so that `auto_class` loads it with `trust_remote_code=True`.

        This is so from the beginning for `AutoTokenizer`.
        """
        cls._auto_class = auto_class

    def save_pretrained(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any
    ) -> tuple[str, ...]:
        """Save everything to a folder: `tokenizer_config.json`, the references if any are set, and the code.

        Args:
            save_directory (`str` or `os.PathLike`): The folder, made if it is not there.
            push_to_hub (`bool`): Upload it as well, to `repo_id` or to the name of the folder.
            kwargs: Passed to `push_to_hub`.

        Returns:
            `tuple[str, ...]`: The files written.
        """
        folder = Path(save_directory)
        if folder.is_file():
            raise ValueError(f"{folder} is a file; save_pretrained needs a folder.")
        folder.mkdir(parents=True, exist_ok=True)
        data = self.to_dict()
        written: list[Path] = []
        if self._auto_class is not None:
            written += map(Path, custom_object_save(self, folder, config=data) or [])
        if self.references:
            tensors = {
                f"{key}:{name}": tensor.contiguous()
                for key, reference in self.references.items()
                for name, tensor in reference.items()
            }
            written.append(_replace(folder / REFERENCE_FILE, lambda path: save_file(tensors, path)))
        text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
        written.append(_replace(folder / CONFIG_FILE, lambda path: path.write_text(text, encoding="utf-8")))
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", folder.name), **kwargs)
        return tuple(str(path) for path in written)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Self:
        """Load what [`TokenizerFiles.save_pretrained`] saved.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): A folder, or the name of a repository on the Hub.
            kwargs: Arguments of the download: `revision`, `token`, `cache_dir`, `subfolder`, `local_files_only`, ...

        Returns:
            `WeightTokenizer`: The tokenizer.

        Raises:
            `OSError`: If there is no such folder or repository, or no tokenizer in it.
            `ValueError`: On an argument that is none of the download, and on a file that is damaged or too new.
        """
        hub = {name: kwargs[name] for name in _HUB_ARGUMENTS if kwargs.get(name) is not None}
        hub |= {name: value for name, value in kwargs.items() if name == "_commit_hash"}
        odd = [name for name in kwargs if name not in _HUB_ARGUMENTS | _LOADING_ARGUMENTS and not name.startswith("_")]
        if odd:
            raise ValueError(
                f"from_pretrained got {odd[0]!r}, which is fixed when a tokenizer is made. Make a new WeightTokenizer "
                "for other settings."
            )
        path = str(cached_file(pretrained_model_name_or_path, CONFIG_FILE, **hub))
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            tokenizer = cls.from_dict(data)
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not the file of a weight tokenizer: {error!r}. Save it again.") from error
        if data.get("references"):
            tensors = load_file(str(cached_file(pretrained_model_name_or_path, REFERENCE_FILE, **hub)))
            tokenizer.references = {key: {} for key in data["references"]}
            for name, tensor in tensors.items():
                key, _, name = name.partition(":")
                tokenizer.references[key][name] = tensor
            for key, reference in tokenizer.references.items():
                if key in tokenizer.layouts:  # safetensors sorts the names
                    tokenizer.references[key] = {name: reference[name] for name in tokenizer.layouts[key].shapes}
        return tokenizer


def _replace(path: Path, write: Callable[[Path], Any]) -> Path:
    """Write a file under another name first, so that a crash leaves the old one whole."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path
