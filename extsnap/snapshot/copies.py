"""Copies of old blocks on their way into the store: written piece by piece, recorded together.

    write    pieces are read, checksummed and written to blocks of the store that nothing refers to
    record   one batch of the log names all of them; a barrier; then they count

Much is written before the batch is complete, so the disk works while more arrives; and a piece is small enough to stay
in the processor's cache from being read to being written.

A crash before the barrier leaves free blocks with some content, and perhaps a batch: see `extsnap.snapshot.engine`.
What is written here and not recorded must still be on the medium when the batch is: nobody may overwrite it meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from extsnap.arrays import Bits, Ints, breaks_to_runs, filled_rows, jumps
from extsnap.blockdev.base import flush_while
from extsnap.snapshot import format as fmt
from extsnap.snapshot.index import RUN_MAX, Level

if TYPE_CHECKING:
    from extsnap.snapshot.engine import Engine

#: Bytes that are read, checksummed and written at once; measured: docs/DECISIONS.md.
PIECE_BYTES = 4 << 20


@dataclass(frozen=True)
class _Part:
    """Some blocks whose copies are written.

    Attributes:
        blocks: int64[n], sorted.
        copy: int64[n], the logical block of the copy, or ZERO_COPY.
        mask: uint32[n], mask ids.
        crcs: uint32[n], of the copies; anything where there is none.
    """

    blocks: Ints
    copy: Ints
    mask: npt.NDArray[np.uint32]
    crcs: npt.NDArray[np.uint32]


class Copies:
    """Copies that are written and not recorded.

    Attributes:
        taken: How many blocks of the store they have.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._parts: list[_Part] = []
        self.taken = 0

    def write(self, positions: Ints, old: Bits | None = None) -> None:
        """Copy the blocks at sorted ``positions`` for every snapshot that still needs them, but those written before.

        Args:
            positions: int64[n].
            old: What the medium has there, if that is known: uint8[n, block_size].

        Raises:
            VolumeFull: No room (callers reserve it first).
            OSError: What was written before this call still waits to be recorded; `forget` gives all of it back.
        """
        engine = self._engine
        if self._parts:
            new = ~np.isin(positions - engine.shift, np.concatenate([part.blocks for part in self._parts]))
            positions, old = positions[new], old if old is None else old[new]
        missing = engine.missing(positions)
        todo: npt.NDArray[np.bool_] = np.asarray(missing.any(axis=1))
        if not todo.all():
            positions, missing, old = positions[todo], missing[todo], old if old is None else old[todo]
        blocks, mask = positions - engine.shift, engine.masks.intern(missing)
        # Content that is known is not read, and has left the cache anyway.
        step = max(1, PIECE_BYTES // engine.block_size) if old is None else max(1, len(blocks))
        for low in range(0, len(blocks), step):
            piece = slice(low, low + step)
            known = engine.content(blocks[piece]) if old is None else old[piece]
            self._write(blocks[piece], mask[piece], known)

    def _write(self, blocks: Ints, mask: npt.NDArray[np.uint32], old: Bits) -> None:
        engine = self._engine
        filled = filled_rows(old)
        logical = engine.store.allocate(int(filled.sum()))
        try:
            copies = old if filled.all() else old[filled]
            crcs = np.zeros(len(blocks), np.uint32)
            crcs[filled] = fmt.crcs(copies)
            engine.store.write_blocks(logical, copies.reshape(-1).data, engine.shareable(blocks[filled]))
        except BaseException:
            engine.store.unallocate(logical)
            raise
        copy = np.full(len(blocks), fmt.ZERO_COPY, np.int64)
        copy[filled] = logical
        self._parts.append(_Part(blocks, copy, mask, crcs))
        self.taken += len(logical)

    def record(self, meanwhile: Callable[[], None] | None = None) -> None:
        """Record what was written, at most what one batch has place for; durable on return, and then in the index.

        Args:
            meanwhile: As `Engine.rewrite` has it.

        Raises:
            VolumeFull: The log is full, and there is no room to fold it.
            OSError: Nothing was recorded.
        """
        if not self._parts:
            return
        engine, store, level = self._engine, self._engine.store, self._level()
        if store.batch_bytes(len(engine.new_masks), engine.masks.words, len(level), len(level.crcs)) > store.log_left:
            engine.fold()
        store.append_batch(engine.new_masks, level.build(), level.crcs)
        flush_while(engine.medium, meanwhile)
        store.log_advance()
        self._parts, self.taken = [], 0  # from here on they are not ours to give back, whatever happens
        engine.recorded(level)

    def _level(self) -> Level:
        parts = self._parts
        part = _Part(
            np.concatenate([part.blocks for part in parts]),
            np.concatenate([part.copy for part in parts]),
            np.concatenate([part.mask for part in parts]),
            np.concatenate([part.crcs for part in parts]),
        )
        order = np.argsort(part.blocks, kind="stable")
        copy, crcs = part.copy[order], part.crcs[order]
        return records(part.blocks[order], copy, part.mask[order], crcs[copy != fmt.ZERO_COPY])

    def forget(self) -> None:
        """Give back the blocks of what was written and not recorded."""
        for part in self._parts:
            self._engine.store.unallocate(part.copy[part.copy != fmt.ZERO_COPY])
        self._parts, self.taken = [], 0


def records(blocks: Ints, copy: Ints, mask: npt.NDArray[np.uint32], crcs: npt.NDArray[np.uint32]) -> Level:
    """Records of single blocks (sorted), as long runs as can be.

    Args:
        blocks: int64[n].
        copy: int64[n], the logical block of the copy, or ZERO_COPY.
        mask: uint32[n], mask ids.
        crcs: Of the copies, in order.
    """
    filled = copy != fmt.ZERO_COPY
    new = (
        jumps(blocks)
        | (np.diff(mask.astype(np.int64), prepend=-1) != 0)
        | np.where(filled, jumps(copy), np.diff(filled.astype(np.int8), prepend=2) != 0)
    )
    first, length = breaks_to_runs(new, RUN_MAX)
    return Level(blocks[first], length, copy[first], mask[first], np.zeros(len(first), np.int64), crcs)
