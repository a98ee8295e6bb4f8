"""JSON for the door's frames, from the accelerator inside Python's own `json`.

Knows nothing of the frames. The `json` package imports `re` and `enum`, half of the time that a command takes to start;
what prints JSON as a result uses `json` itself.
"""

from __future__ import annotations

from _json import encode_basestring_ascii, make_scanner

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class _Context:
    """The scanner's settings, as `json.JSONDecoder` has them."""

    strict, object_hook, object_pairs_hook = True, None, None
    parse_float, parse_int, parse_constant = float, int, float


_scan = make_scanner(_Context())  # type: ignore[arg-type]


def dumps(value: Any) -> str:
    """`value`, of dicts, lists, tuples, text, numbers and None, as ASCII."""
    if value is None:
        return "null"
    if isinstance(value, str):
        return encode_basestring_ascii(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, dict):
        return "{" + ",".join(f"{dumps(key)}:{dumps(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(dumps, value)) + "]"
    raise TypeError(f"{type(value).__name__} is not JSON")


def loads(text: str) -> Any:
    """Raises ValueError when `text` does not hold one JSON value and nothing else."""
    try:
        value, end = _scan(text, 0)
    except StopIteration:
        end = -1
    if end != len(text):
        raise ValueError(f"not JSON: {text[:80]!r}")
    return value
