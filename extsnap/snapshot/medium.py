"""The medium: the device with the guard, the dirty mark and the pointer in its superblocks.

Above this module nobody sees the three: a superblock that goes out gets them, one that comes in is freed of
them.  They live below copy-on-write, so copies, views, exports and the served volume never carry them.

The translation is a bijection on 1,024 bytes, also while a tool above writes a superblock in pieces and its
checksum is wrong for a moment: what is kept is by how much the checksum was wrong (stored xor computed).

Durability of a change of state (`Medium.set_state`).  A mark goes on at the primary first, then, after a
barrier, at the backups; it comes off in the opposite order.  So a crash leaves a mark on a backup only where
the primary has it too, and every extsnap command looks at the primary.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from extsnap.blockdev.base import Buffer, CloningDevice, Pieces, flush_while, read_pieces, where, write_pieces
from extsnap.ondisk.checksum import crc32c_raw
from extsnap.snapshot.format import POINTER_BYTES, POINTER_OFFSET

SUPERBLOCK_BYTES = 1024
PRIMARY_OFFSET = 1024
MAGIC = b"\x53\xef"
DIRTY_MARK = 1 << 31
READ_ONLY = 0x1000
METADATA_CSUM = 0x400
_INCOMPAT = slice(0x60, 0x64)
_RO_COMPAT = slice(0x64, 0x68)
_POINTER = slice(POINTER_OFFSET, POINTER_OFFSET + POINTER_BYTES)
_CHECKSUM = slice(0x3FC, 0x400)


@dataclass(frozen=True)
class SuperblockState:
    """What extsnap adds to the superblocks on the medium."""

    guard: bool = False
    mark: bool = False
    pointer: bytes = b""


def _word(raw: Buffer, field: slice) -> int:
    return int.from_bytes(raw[field], "little")


def translate(raw: bytes, state: SuperblockState) -> bytes:
    """A superblock with exactly the guard, mark and pointer of ``state``, and its checksum as (in)valid as before.

    Bytes that are no ext superblock come back unchanged.
    """
    if raw[0x38:0x3A] != MAGIC:
        return raw
    out = bytearray(raw)
    incompat = _word(raw, _INCOMPAT) & ~DIRTY_MARK | (DIRTY_MARK if state.mark else 0)
    ro_compat = _word(raw, _RO_COMPAT) & ~READ_ONLY | (READ_ONLY if state.guard else 0)
    out[_INCOMPAT] = incompat.to_bytes(4, "little")
    out[_RO_COMPAT] = ro_compat.to_bytes(4, "little")
    out[_POINTER] = state.pointer or bytes(POINTER_BYTES)
    if ro_compat & METADATA_CSUM:
        wrong_by = _word(raw, _CHECKSUM) ^ crc32c_raw(0xFFFFFFFF, raw[:0x3FC])
        out[_CHECKSUM] = (crc32c_raw(0xFFFFFFFF, bytes(out[:0x3FC])) ^ wrong_by).to_bytes(4, "little")
    return bytes(out)


def read_state(raw: bytes) -> SuperblockState:
    """What a superblock from the medium carries; the pointer only where its magic is right."""
    pointer = raw[_POINTER]
    return SuperblockState(
        guard=bool(_word(raw, _RO_COMPAT) & READ_ONLY),
        mark=bool(_word(raw, _INCOMPAT) & DIRTY_MARK),
        pointer=bytes(pointer) if pointer[:4] == b"XSNP" else b"",
    )


class Medium:
    """A device whose superblocks are translated on the way.

    Attributes:
        device: The raw device; the store reads and writes its own blocks there.
        state: What the superblocks carry now.
        offsets: Byte offsets of all superblocks, the primary first.
        is_torn: A change of state failed half way: the superblocks may say different things.
    """

    def __init__(self, device: CloningDevice) -> None:
        self.device = device
        self.size = device.size
        self.offsets: list[int] = []
        self.is_torn = False
        self.state = SuperblockState()
        if device.size >= PRIMARY_OFFSET + SUPERBLOCK_BYTES:
            raw = device.pread(PRIMARY_OFFSET, SUPERBLOCK_BYTES)
            if raw[0x38:0x3A] == MAGIC:
                self.offsets = [PRIMARY_OFFSET]
                self.state = read_state(raw)

    def set_offsets(self, offsets: list[int]) -> None:
        """Name the superblocks, primary and backups, by byte offset; those past the end are left out."""
        inside = sorted({PRIMARY_OFFSET, *offsets})
        self.offsets = [offset for offset in inside if offset + SUPERBLOCK_BYTES <= self.size]

    def _touched(self, offset: int, length: int) -> list[int]:
        end = offset + length
        return [at for at in self.offsets if at < end and at + SUPERBLOCK_BYTES > offset]

    def superblock(self, at: int = PRIMARY_OFFSET) -> bytes:
        """One superblock as it is seen from above."""
        return translate(self.device.pread(at, SUPERBLOCK_BYTES), SuperblockState())

    def pread(self, offset: int, length: int) -> bytes:
        """Read as seen from above."""
        buffer = bytearray(length)
        self.readinto(offset, memoryview(buffer))
        return bytes(buffer)

    def readinto(self, offset: int, buffer: memoryview) -> None:
        """Read as seen from above."""
        self.device.readinto(offset, buffer)
        end = offset + len(buffer)
        for at in self._touched(offset, len(buffer)):
            low, high = max(at, offset), min(at + SUPERBLOCK_BYTES, end)
            buffer[low - offset : high - offset] = self.superblock(at)[low - at : high - at]

    def where(self, offset: int, length: int) -> tuple[int, int] | None:
        """Where in a file this stands as it is seen from above; None where nowhere."""
        return None if self._touched(offset, length) else where(self.device, offset, length)

    def read_pieces(self, pieces: Pieces) -> None:
        """Read many places as seen from above."""
        special = self._touching(pieces)
        for offset, buffer in pieces.some(special):
            self.readinto(offset, buffer)
        read_pieces(self.device, pieces.some(~special))

    def write_pieces(self, pieces: Pieces) -> None:
        """Write many places from above, which do not overlap."""
        special = self._touching(pieces)
        for offset, data in pieces.some(special):
            self.pwrite(offset, data)
        write_pieces(self.device, pieces.some(~special))

    def _touching(self, pieces: Pieces) -> npt.NDArray[np.bool_]:
        """bool[n]: which pieces have bytes of a superblock."""
        offsets = np.array(self.offsets, np.int64)
        ended = np.searchsorted(offsets + SUPERBLOCK_BYTES, pieces.offsets, "right")
        return ended < np.searchsorted(offsets, pieces.offsets + pieces.lengths)

    def pwrite(self, offset: int, data: Buffer) -> None:
        """Write from above: superblocks get the guard, the mark and the pointer, each in one write.

        Nothing is durable before `flush`.
        """
        view = memoryview(data)
        position, end = offset, offset + len(view)
        for at in self._touched(offset, len(view)):
            if position < at:
                self.device.pwrite(position, view[position - offset : at - offset])
            low, high = max(at, offset), min(at + SUPERBLOCK_BYTES, end)
            whole = bytearray(self.superblock(at))
            whole[low - at : high - at] = view[low - offset : high - offset]
            self.device.pwrite(at, translate(bytes(whole), self.state))
            position = high
        if position < end:
            self.device.pwrite(position, view[position - offset :])

    def punch(self, offset: int, length: int) -> None:
        """Punch; superblocks inside become zeros, which carry nothing."""
        self.device.punch(offset, length)

    def flush(self) -> None:
        """Barrier on the device."""
        self.device.flush()

    def flush_while(self, work: Callable[[], None]) -> None:
        """The same, and ``work`` meanwhile, see `extsnap.blockdev.base`."""
        flush_while(self.device, work)

    def resize(self, size: int) -> None:
        """Make the device ``size`` bytes long.

        Raises:
            OSError: It cannot be; ENOSPC where its size is fixed.
        """
        resize = getattr(self.device, "resize", None)
        if resize is None:
            raise OSError(errno.ENOSPC, "the size of the device is fixed")
        resize(size)
        self.size = self.device.size

    def set_state(self, state: SuperblockState) -> None:
        """Rewrite every superblock with ``state``; durable when this returns.

        Crash: with the mark going on, the primary may have it and the backups not; with the mark going off,
        the backups may have lost it and the primary not.  Never the other way round.

        Raises:
            OSError: It was not done, or only in part; whoever asks again has all of it done.
        """
        primary, *backups = self.offsets
        contents = {at: self.superblock(at) for at in self.offsets}
        self.is_torn = True
        order = [[primary], backups] if state.mark else [backups, [primary]]
        for group in order:
            for at in group:
                self.device.pwrite(at, translate(contents[at], state))
            if group:
                self.device.flush()
        self.state, self.is_torn = state, False
