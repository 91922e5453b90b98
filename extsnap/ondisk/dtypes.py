"""numpy dtypes for tables, derived from the Construct definitions: one source of truth."""

from __future__ import annotations

from typing import Any

import construct as c
import numpy as np

from extsnap.ondisk.codec import Flags


def dtype_of(struct: Any) -> np.dtype[Any]:
    """The packed dtype of a Construct ``Struct`` of fixed-size fields; ``Bytes(n)`` becomes uint8[n].

    Raises:
        TypeError: A field has no fixed-size counterpart.
    """
    return np.dtype([(field.name, *_field(field.subcon)) for field in struct.subcons])


def _field(subcon: Any) -> tuple[Any, ...]:
    if isinstance(subcon, Flags):
        return _field(subcon.subcon)
    if isinstance(subcon, c.FormatField):
        order, kind = subcon.fmtstr[0], "u" if subcon.fmtstr[1].isupper() else "i"
        return (np.dtype(f"{order}{kind}{subcon.length}"),)
    if isinstance(subcon, c.Array):
        inner = _field(subcon.subcon)
        return (inner[0], (int(subcon.count),))
    if isinstance(subcon, c.Bytes):
        return (np.dtype("u1"), (int(subcon.length),))
    if isinstance(subcon, c.Struct):
        return (dtype_of(subcon),)
    raise TypeError(f"{subcon!r} has no dtype")
