"""JSON from strangers: every name once, whole Unicode, no numbers that readers could take differently."""

from __future__ import annotations

import json
import os
from typing import Any, NoReturn

from .errors import CheckpointError, quote


def parse_json(raw: bytes, path: str | os.PathLike[str], code: str, offset: int = 0) -> Any:
    """Parse JSON text strictly.

    Args:
        raw: The text, UTF-8.
        path: For errors.
        code: Code of the errors, such as ``"E_INDEX"``.
        offset: Where the text begins in its file, for the places in errors.

    Returns:
        The value.

    Raises:
        CheckpointError: E_DUPLICATE_KEY with both values, or `code` for everything else.

    Example:
        >>> parse_json(b'{"a": [1, 2]}', "a.json", "E_INDEX")
        {'a': [1, 2]}
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            _refuse_duplicate(pairs, path)
        return result

    try:
        # Python reads "-0" as the integer 0, safetensors does not; the slower hook only where it can matter
        signs: dict[str, Any] = {"parse_int": _integer} if b"-0" in raw else {}
        return json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=_no_constant, **signs)
    except CheckpointError:
        raise
    except UnicodeDecodeError as error:
        found, at = "bytes that are not UTF-8", error.start
    except json.JSONDecodeError as error:
        found, at = f"no valid JSON ({error.msg})", len(error.doc[: error.pos].encode("utf-8"))
    except ValueError as error:  # numbers of thousands of digits, -0, NaN
        found, at = str(error), 0
    except RecursionError:
        found, at = "values nested too deep", 0
    refuse_json(path, code, f"{found} at byte {offset + at}", "JSON text in UTF-8")


def refuse_json(
    path: str | os.PathLike[str], code: str, found: str, expected: str, name: str | None = None
) -> NoReturn:
    """Refuse JSON content.

    Args:
        path: For the error.
        code: Its code.
        found: What was found.
        expected: What is needed.
        name: The tensor, if one is to blame.

    Raises:
        CheckpointError: Always.
    """
    fix = "the file is damaged or not what it seems: get it from its source again"
    raise CheckpointError(code, path, name, found, expected, fix)


def _integer(text: str) -> int:
    if text == "-0":
        raise ValueError("the number -0")
    return int(text)


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"the number {text}")


def _refuse_duplicate(pairs: list[tuple[str, Any]], path: str | os.PathLike[str]) -> NoReturn:
    seen: set[str] = set()
    name = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
    first, second, *_ = (value for other, value in pairs if other == name)
    raise CheckpointError(
        "E_DUPLICATE_KEY",
        path,
        name,
        f"given twice, as {quote(first)} and as {quote(second)}",
        "every name once",
        "readers would disagree on which counts: get the file from its source again",
    )
