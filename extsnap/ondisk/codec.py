"""The one boundary between Construct and the rest: exact lengths, flags that keep unknown bits, one error."""

from __future__ import annotations

import enum
from typing import Any

import construct as c

from extsnap.errors import FormatError


class Flags(c.Adapter):  # type: ignore[misc]  # Construct has no types
    """An integer as an `enum.IntFlag` that keeps bits it has no name for."""

    def __init__(self, subcon: Any, flags: type[enum.IntFlag]) -> None:
        super().__init__(subcon)
        self._flags = flags

    def _decode(self, obj: int, context: Any, path: str) -> enum.IntFlag:
        return self._flags(obj)

    def _encode(self, obj: int, context: Any, path: str) -> int:
        return int(obj)


def parse(struct: Any, raw: bytes, name: str, offset: int | None = None) -> Any:
    """Parse exactly ``raw``.

    Raises:
        FormatError: Too short, too long or impossible; carries structure and device offset.
    """
    size = struct.sizeof()
    if len(raw) != size:
        raise FormatError(f"has {len(raw)} bytes instead of {size}", structure=name, offset=offset)
    try:
        return struct.parse(raw)
    except c.ConstructError as error:
        raise FormatError(str(error).splitlines()[0], structure=name, offset=offset) from error


def build(struct: Any, value: Any, name: str) -> bytes:
    """The bytes of ``value``.

    Raises:
        FormatError: A field does not fit.
    """
    try:
        return bytes(struct.build(value))
    except c.ConstructError as error:
        raise FormatError(str(error).splitlines()[0], structure=name) from error
