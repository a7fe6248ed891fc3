"""Read a pickle without running it: which globals it asks for, what it does with them, which storages it names.

The scan follows the stack machine symbolically (Python's `pickletools`): nothing is imported, nothing is called. It
stands before ``torch.load(weights_only=True)``, which has had a hole before (CVE-2025-32434), and it knows what to
say: a pickle that calls ``os.system`` and one that merely holds an ``argparse.Namespace`` are refused differently.
"""

from __future__ import annotations

import pickletools
import sys
from dataclasses import dataclass, field
from typing import Any, BinaryIO, NamedTuple

from .errors import quote

_MARK = object()
_OPAQUE = object()
_STORAGE_ITEMSIZE = {
    "Double": 8,
    "Long": 8,
    "ComplexFloat": 8,
    "ComplexDouble": 16,
    "Float": 4,
    "Int": 4,
    "Half": 2,
    "BFloat16": 2,
    "Short": 2,
    "Char": 1,
    "Byte": 1,
    "Bool": 1,
    "Untyped": 1,
}

# Ordinary content of research checkpoints: refused, but no reason for alarm.
_BENIGN = {
    "_codecs": {"encode"},
    "argparse": {"Namespace"},
    "builtins": {
        *("object", "dict", "list", "tuple", "set", "frozenset", "int", "float", "complex", "bool", "str", "bytes"),
        *("bytearray", "slice", "range", "type"),
    },
    "collections": {"OrderedDict", "defaultdict", "Counter", "deque"},
    "copy_reg": {"_reconstructor"},
    "copyreg": {"_reconstructor"},
    "datetime": {"datetime", "date", "time", "timedelta", "timezone"},
    "decimal": {"Decimal"},
    "fractions": {"Fraction"},
    "pathlib": {"Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath"},
    "pathlib._local": {"Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath"},
    "types": {"SimpleNamespace"},
    "uuid": {"UUID"},
    "numpy": {"dtype", "ndarray"},
    **{
        f"numpy.{core}.{module}": {"_reconstruct", "scalar", "_frombuffer"}
        for core in ("core", "_core")
        for module in ("multiarray", "numeric")
    },
    "torch.storage": {"_load_from_bytes", "TypedStorage", "UntypedStorage"},
}
_BENIGN["__builtin__"] = _BENIGN["builtins"] | {"unicode", "long", "xrange"}


class Global(NamedTuple):
    """Something that a pickle imports, such as ``collections.OrderedDict``."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Storage(NamedTuple):
    """A tensor storage that a pickle refers to: its key and its size in bytes, None for a type unknown here."""

    key: str
    nbytes: int | None


@dataclass
class PickleScan:
    """What a pickle would do.

    Args:
        uses: For each global: how it is used (``"call"``, ``"create"`` for an instance without calling anything,
            ``"name"``).
        storages: The storages it refers to.
        stopped: Why the scan could not reach the end; empty if it did.
    """

    uses: dict[Global, set[str]] = field(default_factory=dict)
    storages: list[Storage] = field(default_factory=list)
    stopped: str = ""

    def unsafe(self) -> list[Global]:
        """Globals whose use could run code of an attacker's choice."""
        return [what for what, uses in self.uses.items() if _is_unsafe(what, uses)]

    def foreign(self) -> list[Global]:
        """Globals that a state dict has no need of."""
        return [what for what in self.uses if not _is_of_tensors(what)]


def _is_unsafe(what: Global, uses: set[str]) -> bool:
    root = what.module.partition(".")[0]
    if what.name in _BENIGN.get(what.module, ()):
        return False
    if root in sys.stdlib_module_names or root in ("__builtin__", "copy_reg", "commands", "numpy"):
        return True
    if root == "torch":  # torch.load decides; here only what it refuses and what looks like a call
        return "call" in uses and not what.module.startswith(("torch.nn.", "torch.optim.")) and not _rebuilds(what)
    return "call" in uses  # a class of somebody's own project: creating an instance alone runs nothing of it


def _is_of_tensors(what: Global) -> bool:
    if what.module == "torch" and (what.name.endswith("Storage") or what.name.islower() or what.name[-1:].isdigit()):
        return True  # storages and dtypes
    return _rebuilds(what) or what.module in ("torch.nn.parameter", "collections")


def _rebuilds(what: Global) -> bool:
    if what.module in ("torch._utils", "torch._tensor", "torch.serialization"):
        return what.name.startswith(("_rebuild", "_get_layout"))
    return what.module == "torch" and what.name in ("Size", "device", "Tensor")


def scan_pickle(stream: BinaryIO) -> PickleScan:
    """Scan one pickle; the stream stands behind it afterwards.

    Args:
        stream: Binary file whose ``read`` never allocates more than there is (`io.BytesIO`, `mmap.mmap`).

    Returns:
        What the pickle asks for.

    Example:
        >>> import io, pickle
        >>> scan = scan_pickle(io.BytesIO(pickle.dumps(print)))
        >>> [str(what) for what in scan.unsafe()]
        ['builtins.print']
    """
    scan = PickleScan()
    machine = _Machine(scan)
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            machine.step(opcode, argument)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError) as error:
        scan.stopped = f"{type(error).__name__}: {quote(str(error))}"
    return scan


class _Machine:
    def __init__(self, scan: PickleScan) -> None:
        self.scan = scan
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def step(self, opcode: pickletools.OpcodeInfo, argument: Any) -> None:
        special = getattr(self, f"_{opcode.name.lower()}", None)
        if special is not None:
            special(argument)
            return
        before = opcode.stack_before
        if pickletools.markobject in before:
            self._pop_to_mark()
            before = before[: before.index(pickletools.markobject)]
        if before:
            del self.stack[-len(before) :]
        if len(opcode.stack_after) == 1 and isinstance(argument, int | str):
            self.stack.append(argument)  # numbers and texts count: sizes and names of storages and globals
        else:
            self.stack.extend([_OPAQUE] * len(opcode.stack_after))

    def _pop_to_mark(self) -> list[Any]:
        at = len(self.stack) - 1
        while self.stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise ValueError("no mark on the stack")
        items = self.stack[at + 1 :]
        del self.stack[at:]
        return items

    def _use(self, what: Any, how: str) -> None:
        if isinstance(what, Global):
            self.scan.uses.setdefault(what, set()).add(how)

    def _import(self, module: Any, name: Any) -> None:
        known = isinstance(module, str) and isinstance(name, str)
        what = Global(module, name) if known else Global("builtins", "a name computed while loading")
        self._use(what, "name")
        self.stack.append(what)

    def _mark(self, _: Any) -> None:
        self.stack.append(_MARK)

    def _dup(self, _: Any) -> None:
        self.stack.append(self.stack[-1])

    def _global(self, argument: str) -> None:
        self._import(*argument.split(" ", 1))

    def _stack_global(self, _: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self._import(module, name)

    def _inst(self, argument: str) -> None:
        self._pop_to_mark()
        self._import(*argument.split(" ", 1))
        self._use(self.stack[-1], "call")

    def _obj(self, _: Any) -> None:
        self._use(self._pop_to_mark()[0], "call")
        self.stack.append(_OPAQUE)

    def _reduce(self, _: Any) -> None:
        self.stack.pop()
        self._use(self.stack.pop(), "call")
        self.stack.append(_OPAQUE)

    def _newobj(self, _: Any) -> None:
        self.stack.pop()
        self._use(self.stack.pop(), "create")
        self.stack.append(_OPAQUE)

    def _newobj_ex(self, _: Any) -> None:
        self.stack.pop()
        self._newobj(None)

    def _ext1(self, argument: int) -> None:
        self._import("copyreg", f"extension {argument}")
        self._use(self.stack[-1], "call")

    _ext2 = _ext4 = _ext1

    def _put(self, argument: int) -> None:
        self.memo[argument] = self.stack[-1]

    _binput = _long_binput = _put

    def _memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def _get(self, argument: int) -> None:
        self.stack.append(self.memo[argument])

    _binget = _long_binget = _get

    def _tuple(self, _: Any) -> None:
        self.stack.append(tuple(self._pop_to_mark()))

    def _empty_tuple(self, _: Any) -> None:
        self.stack.append(())

    def _tuple1(self, _: Any) -> None:
        self._tuple_of(1)

    def _tuple2(self, _: Any) -> None:
        self._tuple_of(2)

    def _tuple3(self, _: Any) -> None:
        self._tuple_of(3)

    def _tuple_of(self, count: int) -> None:
        items = tuple(self.stack[-count:])
        del self.stack[-count:]
        self.stack.append(items)

    def _binpersid(self, _: Any) -> None:
        identifier = self.stack.pop()
        if isinstance(identifier, tuple) and len(identifier) >= 5 and identifier[0] == "storage":
            _, kind, key, _, numel = identifier[:5]
            itemsize = None
            if isinstance(kind, Global) and kind.module.startswith("torch") and kind.name.endswith("Storage"):
                itemsize = _STORAGE_ITEMSIZE.get(kind.name.removesuffix("Storage"))
            known = itemsize is not None and type(numel) is int
            self.scan.storages.append(Storage(str(key), numel * itemsize if known else None))
        self.stack.append(_OPAQUE)
