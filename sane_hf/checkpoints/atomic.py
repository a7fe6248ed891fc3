"""Writing that a crash, a full disk or a second process cannot spoil: a whole new content or the old one.

Everything is written to a sibling (`.NAME.sane-hf-tmp`), forced to disk and then renamed. A sibling that a killed
process left behind is swept by the next writer of the same name; a lock tells it from one that is being written.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from .errors import CheckpointError

try:
    import fcntl
except ImportError:  # not on Windows: siblings get random names there, and stay if a process is killed
    fcntl = None

_EXCHANGE = 2  # RENAME_EXCHANGE of Linux' renameat2
_AT_FDCWD = -100


def write_error(path: str | os.PathLike[str], error: OSError) -> CheckpointError:
    """Say what went wrong in writing and that nothing is lost.

    Args:
        path: What was to be written.
        error: What the system says.

    Returns:
        A CheckpointError (E_WRITE) to raise.
    """
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    fix = "free some space" if full else "check the path and its permissions"
    found = f"cannot be written ({error.strerror or error})"
    return CheckpointError("E_WRITE", path, None, found, "", f"{fix}; what was there before is unchanged")


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Write a file that appears at its path only when it is complete and on disk.

    Args:
        path: The file; folders above it are made. A link stays a link, and the file that it points to is replaced.

    Yields:
        A binary file to write to. If the block fails, the old content stays and nothing is left behind.

    Raises:
        CheckpointError: E_WRITE, if the file cannot be made or put in place.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with atomic_file(f"{folder}/a.bin") as file:
        ...         _ = file.write(b"abc")
        ...     Path(folder, "a.bin").read_bytes()
        b'abc'
    """
    target = Path(os.path.realpath(path))
    try:
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary, descriptor = _new_file(target)
    except OSError as error:
        raise write_error(path, error) from error
    placed = False
    with open(descriptor, "wb") as file:  # closed, and so unlocked, only after the rename
        try:
            yield file
            try:
                file.flush()
                if target.exists():
                    os.chmod(temporary, stat.S_IMODE(target.stat().st_mode))
                os.fsync(file.fileno())
                os.replace(temporary, target)
                placed = True  # from here on the sibling's name may be another process's
                _sync_directory(target.parent)
            except OSError as error:
                raise write_error(path, error) from error
        finally:
            if not placed:
                temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Fill a folder that appears at its path only when it is complete and on disk.

    A folder that is there already is replaced as a whole, on Linux in one step; anything else there is refused.

    Args:
        path: The folder; those above it are made.

    Yields:
        A new, empty folder beside it to write to. If the block fails, the old folder stays and nothing is left
        behind.

    Raises:
        CheckpointError: E_WRITE, if the folder cannot be made or put in place.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with atomic_directory(f"{folder}/run") as temporary:
        ...         _ = (temporary / "a.txt").write_text("abc")
        ...     sorted(path.name for path in Path(folder).rglob("*"))
        ['a.txt', 'run']
    """
    target = Path(os.path.realpath(path))
    try:
        if target.exists() and not target.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary, descriptor = _new_directory(target)
    except OSError as error:
        raise write_error(path, error) from error
    placed = False
    try:
        yield temporary
        try:
            _sync_tree(temporary)
            _put_directory(temporary, target)
            placed = True
            _sync_directory(target.parent)
        except OSError as error:
            raise write_error(path, error) from error
    finally:
        if not placed:
            shutil.rmtree(temporary, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)


def write_text_atomic(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file (UTF-8) whole or not at all.

    Args:
        path: The file; folders above it are made.
        text: Its new content.

    Raises:
        CheckpointError: E_WRITE; the old content is unchanged.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_text_atomic(f"{folder}/a.txt", "abc")
        ...     Path(folder, "a.txt").read_text()
        'abc'
    """
    content = text.encode("utf-8")
    with atomic_file(path) as file:
        try:
            file.write(content)
            file.flush()
        except OSError as error:
            raise write_error(path, error) from error


def write_json_atomic(path: str | os.PathLike[str], value: Any) -> None:
    """Write a JSON file (indented, UTF-8) whole or not at all.

    Args:
        path: The file; folders above it are made.
        value: Its new content: dicts, lists, texts, finite numbers, booleans, None.

    Raises:
        ValueError: A number is NaN or infinite, which JSON does not know.
        TypeError: Something else cannot be written as JSON.
        CheckpointError: E_WRITE; the old content is unchanged.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_json_atomic(f"{folder}/a.json", {"r2": 0.5})
        ...     Path(folder, "a.json").read_text()
        '{\\n  "r2": 0.5\\n}\\n'
    """
    try:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: {error}; write None for a number that is missing") from None
    except TypeError as error:
        raise TypeError(f"{os.fspath(path)}: {error}; convert it to a plain Python value") from None
    write_text_atomic(path, text + "\n")


def _sibling(target: Path, random: bool) -> Path:
    middle = f".{uuid.uuid4().hex[:12]}" if random else ""
    return target.with_name(f".{target.name}{middle}.sane-hf-tmp")


def _new_file(target: Path) -> tuple[Path, int]:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    for random in (fcntl is None, fcntl is None, True):
        temporary = _sibling(target, random)
        _sweep(temporary)
        try:
            descriptor = os.open(temporary, flags, 0o666)
        except FileExistsError:
            continue  # another process writes the same file just now
        if _lock(descriptor, temporary):
            return temporary, descriptor
        os.close(descriptor)
    raise FileExistsError(errno.EEXIST, "other processes write it at the same time")


def _new_directory(target: Path) -> tuple[Path, int | None]:
    for random in (fcntl is None, fcntl is None, True):
        temporary = _sibling(target, random)
        _sweep(temporary)
        try:
            temporary.mkdir()
        except FileExistsError:
            continue
        if fcntl is None:
            return temporary, None
        try:
            descriptor = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # swept by another process before it was locked
        if _lock(descriptor, temporary):
            return temporary, descriptor
        os.close(descriptor)
    raise FileExistsError(errno.EEXIST, "other processes write it at the same time")


def _lock(descriptor: int, path: Path) -> bool:
    """Lock what was just made; false if another process took it for a leftover in between."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except (BlockingIOError, FileNotFoundError):
        return False


def _sweep(leftover: Path) -> None:
    """Remove what a killed process left: nobody holds its lock."""
    if fcntl is None:
        return
    try:
        descriptor = os.open(leftover, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        if _lock(descriptor, leftover):
            if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                shutil.rmtree(leftover)
            else:
                leftover.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _put_directory(temporary: Path, target: Path) -> None:
    if not target.exists():
        os.replace(temporary, target)
        return
    with _locked(target) as locked:  # the old folder gets the sibling's name: nobody may sweep it and use that name
        if locked and _exchange(temporary, target):
            shutil.rmtree(temporary, ignore_errors=True)
            return
    old = _sibling(target, random=True)
    os.replace(target, old)
    try:
        os.replace(temporary, target)
    except OSError:
        os.replace(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    if fcntl is None:
        yield False
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield _lock(descriptor, folder)
    finally:
        os.close(descriptor)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; false where the system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    return rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _EXCHANGE) == 0


def _sync_tree(folder: Path) -> None:
    for where, _, names in os.walk(folder):
        for name in names:
            path = Path(where, name)
            if not path.is_symlink() and path.is_file():
                descriptor = os.open(path, os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
        _sync_directory(Path(where))


def _sync_directory(folder: Path) -> None:
    if os.name == "nt":
        return  # folders cannot be opened there
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
