"""Writing: what was there before survives every failure, and nothing half-written is ever seen."""

import json
import os
import resource
import signal
import stat
import subprocess
import sys
import threading
import time

import pytest
import safetensors.torch
import torch

from sane_hf.checkpoints import (
    CheckpointError,
    atomic_directory,
    atomic_file,
    load_checkpoint,
    save_checkpoint,
    to_bytes,
    write_json_atomic,
    write_text_atomic,
)

from .checkpoint_files import small_network
from .test_checkpoint_reading import same


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_library_and_transformers_read_what_we_write(tmp_path):
    path = tmp_path / "new" / "folders" / "model.safetensors"
    save_checkpoint(small_network(), path, metadata={"source": "digits"})
    assert same(safetensors.torch.load_file(path), small_network())
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata()["source"] == "digits"
        assert file.metadata()["format"] == "pt"
    assert path.read_bytes() == to_bytes(small_network(), {"source": "digits"})
    assert names_in(path.parent) == ["model.safetensors"]


def test_any_layout_of_memory_is_written_as_it_looks():
    base = torch.arange(24.0).reshape(4, 6)
    state_dict = {
        "transposed": base.T,
        "slice": base[1:3, ::2],
        "expanded": base[0, 0].expand(3),
        "parameter": torch.nn.Parameter(base),
        "conjugate": torch.complex(base, base).conj(),
        "channels_last": base.reshape(1, 2, 3, 4).contiguous(memory_format=torch.channels_last),
    }
    loaded = safetensors.torch.load(to_bytes(state_dict))
    assert same(loaded, {name: t.detach().resolve_conj().clone().contiguous() for name, t in state_dict.items()})


def test_what_cannot_be_written_is_named_and_leaves_the_old_file(tmp_path):
    path = tmp_path / "model.safetensors"
    save_checkpoint(small_network(), path)
    cases = [
        ("E_NO_TENSORS", {}, None),
        ("E_NAME", {7: torch.ones(1)}, None),
        ("E_NAME", {"__metadata__": torch.ones(1)}, None),
        ("E_NAME", {"x" * 4097: torch.ones(1)}, None),
        ("E_NAME", {"\ud800": torch.ones(1)}, None),
        ("E_STRUCTURE", {"w": 1.0}, None),
        ("E_META", {"w": torch.ones(1, device="meta")}, None),
        ("E_SPARSE", {"w": torch.ones(1).to_sparse()}, None),
        ("E_DTYPE", {"w": torch.ones(1, dtype=torch.complex128)}, None),
        ("E_SHAPE", {"w": torch.ones([1] * 33)}, None),
        ("E_METADATA", {"w": torch.ones(1)}, {"epoch": 3}),
    ]
    for code, state_dict, metadata in cases:
        with pytest.raises(CheckpointError) as error:
            save_checkpoint(state_dict, path, metadata)
        assert error.value.code == code
        with pytest.raises(CheckpointError):
            to_bytes(state_dict, metadata)
    assert same(load_checkpoint(path), small_network())
    assert names_in(tmp_path) == ["model.safetensors"]


def test_a_failed_block_leaves_the_old_content_and_nothing_else(tmp_path):
    write_text_atomic(tmp_path / "a.txt", "old")
    with atomic_directory(tmp_path / "run") as folder:
        (folder / "a.txt").write_text("old")

    def fail_in_file():
        with atomic_file(tmp_path / "a.txt") as file:
            file.write(b"new")
            raise KeyboardInterrupt

    def fail_in_folder():
        with atomic_directory(tmp_path / "run") as folder:
            (folder / "b.txt").write_text("new")
            raise RuntimeError("stop")

    with pytest.raises(KeyboardInterrupt):
        fail_in_file()
    with pytest.raises(RuntimeError, match="stop"):
        fail_in_folder()
    assert (tmp_path / "a.txt").read_text() == "old"
    assert names_in(tmp_path / "run") == ["a.txt"]
    assert names_in(tmp_path) == ["a.txt", "run"]


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_is_replaced_as_a_whole(exchange, tmp_path, monkeypatch):
    from sane_hf.checkpoints import atomic

    if not exchange:  # as on systems that cannot swap two names
        monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    for name in ("old", "new"):
        with atomic_directory(tmp_path / "deep" / "run") as folder:
            (folder / name).mkdir()
            (folder / name / "file").write_text(name)
    assert names_in(tmp_path / "deep" / "run") == ["new"]
    assert names_in(tmp_path / "deep") == ["run"]


def test_a_folder_that_cannot_be_put_in_place_leaves_the_old_one(tmp_path, monkeypatch):
    from sane_hf.checkpoints import atomic

    with atomic_directory(tmp_path / "run") as folder:
        (folder / "old").touch()
    monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    genuine, calls = os.replace, []

    def second_fails(source, target):
        calls.append(source)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        genuine(source, target)

    monkeypatch.setattr(os, "replace", second_fails)
    with pytest.raises(CheckpointError, match="E_WRITE"), atomic_directory(tmp_path / "run") as folder:
        (folder / "new").touch()
    assert names_in(tmp_path / "run") == ["old"]
    assert names_in(tmp_path) == ["run"]


def test_files_and_folders_do_not_replace_each_other(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("old")
    with pytest.raises(CheckpointError, match="E_WRITE"):
        write_text_atomic(tmp_path / "folder", "new")
    with pytest.raises(CheckpointError, match="E_WRITE"), atomic_directory(tmp_path / "file"):
        pass
    with pytest.raises(CheckpointError, match="E_WRITE"):
        write_text_atomic(tmp_path / "file" / "below", "new")
    assert (tmp_path / "file").read_text() == "old"


def test_links_and_permissions_stay(tmp_path):
    (tmp_path / "real").write_text("old")
    os.chmod(tmp_path / "real", 0o640)
    (tmp_path / "link").symlink_to("real")
    write_text_atomic(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"
    assert stat.S_IMODE((tmp_path / "real").stat().st_mode) == 0o640
    umask = os.umask(0)
    os.umask(umask)
    write_text_atomic(tmp_path / "fresh", "new")
    assert stat.S_IMODE((tmp_path / "fresh").stat().st_mode) == 0o666 & ~umask


def test_a_full_disk_keeps_the_old_file(tmp_path):
    path = tmp_path / "model.safetensors"
    save_checkpoint(small_network(), path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="E_WRITE") as error:
            save_checkpoint({"w": torch.zeros(1_000_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert "unchanged" in error.value.fix
    assert same(load_checkpoint(path), small_network())
    assert names_in(tmp_path) == ["model.safetensors"]


def test_json_is_strict_and_readable(tmp_path):
    path = tmp_path / "metrics.json"
    write_json_atomic(path, {"r2": 0.5, "name": "é"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"r2": 0.5, "name": "é"}
    with pytest.raises(ValueError, match=r"metrics\.json.*None"):
        write_json_atomic(path, {"r2": float("nan")})
    with pytest.raises(TypeError, match=r"metrics\.json"):
        write_json_atomic(path, {"r2": torch.zeros(1)})
    assert json.loads(path.read_text(encoding="utf-8"))["r2"] == 0.5


def test_threads_that_write_one_file_leave_one_whole_content(tmp_path):
    path = tmp_path / "a.txt"
    texts = [str(i) * 100_000 for i in range(8)]
    errors = []

    def write(text):
        for _ in range(5):
            try:
                write_text_atomic(path, text)
            except CheckpointError as error:
                errors.append(error)

    threads = [threading.Thread(target=write, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert path.read_text() in texts
    assert names_in(tmp_path) == ["a.txt"]


KILLED = """
import importlib.util, os, pathlib, sys, types
# the writing module alone: importing torch would take longer than the test
package = types.ModuleType("checkpoints"); package.__path__ = [sys.argv[1]]; sys.modules["checkpoints"] = package
from checkpoints.atomic import atomic_directory, atomic_file
folder = pathlib.Path(sys.argv[2])
for i in range(1_000_000):
    with atomic_file(folder / "a.bin") as file:
        for _ in range(4):
            file.write(bytes([i % 251]) * 250_000)
    with atomic_directory(folder / "run") as temporary:
        for name in "ab":
            (temporary / name).write_bytes(bytes([i % 251]) * 100_000)
    print(i, flush=True)
"""


def kill_while_writing(root, folder, delay):
    command = [sys.executable, "-c", KILLED, str(root / "sane_hf" / "checkpoints"), str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    process.stdout.readline()  # one round is written
    time.sleep(delay)
    process.kill()
    process.wait()
    process.stdout.close()
    content = (folder / "a.bin").read_bytes()
    assert len(content) == 1_000_000
    assert len(set(content)) == 1
    parts = [(folder / "run" / name).read_bytes() for name in "ab"]
    assert [len(part) for part in parts] == [100_000, 100_000]
    assert len(set(parts[0] + parts[1])) == 1


def test_a_killed_writer_leaves_the_old_content_and_the_next_one_sweeps(root, tmp_path):
    for delay in (0.0, 0.011, 0.023):
        kill_while_writing(root, tmp_path, delay)
    sweep(tmp_path)


def sweep(folder):
    write_text_atomic(folder / "a.bin", "new")
    with atomic_directory(folder / "run") as temporary:
        (temporary / "c").touch()
    assert names_in(folder) == ["a.bin", "run"]
    assert names_in(folder / "run") == ["c"]


@pytest.mark.slow
def test_a_writer_killed_at_fifty_moments_never_spoils_anything(root, tmp_path):
    for i in range(50):
        kill_while_writing(root, tmp_path, i * 0.0017)
    sweep(tmp_path)
