"""ext's checksums: pure functions over raw bytes, with the checksum's own field zeroed or skipped.

crc32c here is raw: reflected polynomial 0x82F63B78, no final xor.  Source: e2fsprogs `lib/ext2fs/csum.c`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from extsnap.ondisk.castagnoli import crc32c

_ONES = 0xFFFFFFFF


def crc32c_raw(seed: int, data: Any) -> int:
    """crc32c of ``data`` continued from ``seed``, without the inversions at both ends."""
    return ~int(crc32c(data, ~seed & _ONES)) & _ONES


def filesystem_seed(uuid: bytes) -> int:
    """The checksum seed of a filesystem without the csum_seed feature."""
    return crc32c_raw(_ONES, uuid)


def superblock_checksum(raw: bytes) -> int:
    """s_checksum: over bytes 0 to 0x3fb, not seeded."""
    return crc32c_raw(_ONES, raw[:0x3FC])


def inode_seed(seed: int, ino: int, generation: int) -> int:
    """Seed of everything that belongs to one inode: extent blocks, directory blocks."""
    return crc32c_raw(seed, ino.to_bytes(4, "little") + generation.to_bytes(4, "little"))


def inode_checksum(seed: int, ino: int, raw: bytes) -> int:
    """32-bit checksum of an inode of any size; i_checksum_hi counts only where the inode has one."""
    body = bytearray(raw)
    generation = int.from_bytes(raw[0x64:0x68], "little")
    body[0x7C:0x7E] = b"\0\0"
    if len(raw) > 128 and int.from_bytes(raw[0x80:0x82], "little") >= 4:
        body[0x82:0x84] = b"\0\0"
    return crc32c_raw(inode_seed(seed, ino, generation), bytes(body))


def extent_checksum(iseed: int, raw: bytes) -> int:
    """et_checksum of an extent block: over the header and all eh_max entries, used or not."""
    return crc32c_raw(iseed, raw[: 12 + 12 * int.from_bytes(raw[4:6], "little")])


def orphan_block_checksum(iseed: int, block: int, raw: bytes) -> int:
    """ob_checksum of a block of the orphan file: over its number (64 bits) and everything before the 8-byte tail."""
    return crc32c_raw(iseed, block.to_bytes(8, "little") + raw[:-8])


def bitmap_checksum(seed: int, bitmap: Any) -> int:
    """32-bit checksum of a block or inode bitmap (blocks per group / 8, inodes per group / 8 bytes)."""
    return crc32c_raw(seed, bitmap)


def journal_superblock_checksum(raw: bytes) -> int:
    """s_checksum of a jbd2 superblock: over its 1,024 bytes with the field zeroed."""
    return crc32c_raw(_ONES, raw[:0xFC] + bytes(4) + raw[0x100:1024])


def _table(polynomial: int, kind: type[np.unsignedinteger[Any]]) -> npt.NDArray[Any]:
    table = np.arange(256, dtype=kind)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ kind(polynomial), table >> 1).astype(kind)
    return table


_CRC16 = _table(0xA001, np.uint16)
_CRC32C = _table(0x82F63B78, np.uint32)


def _crc_rows(table: npt.NDArray[Any], start: int, rows: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
    """The checksum of every row of uint8[n, m], continued from ``start``; one step a column."""
    crc = np.full(len(rows), start, table.dtype)
    for column in np.ascontiguousarray(rows.T):
        crc = (crc >> 8) ^ table[(crc ^ column) & 0xFF]
    return crc


def crc16_rows(start: int, rows: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint16]:
    """crc16 (0xA001) of every row of uint8[n, m], continued from ``start``: uint16[n]."""
    return _crc_rows(_CRC16, start, rows)


def crc32c_rows(seed: int, rows: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint32]:
    """`crc32c_raw` of every row of uint8[n, m], all at once, for many short rows: uint32[n]."""
    return _crc_rows(_CRC32C, seed, rows)


def group_checksums(
    raw: npt.NDArray[np.uint8], groups: npt.NDArray[np.int64], *, seed: int, uuid: bytes, metadata_csum: bool
) -> npt.NDArray[np.uint16]:
    """bg_checksum of group descriptors.

    Args:
        raw: uint8[n, desc_size], the descriptors.
        groups: int64[n], their numbers.
        seed: Filesystem checksum seed (metadata_csum).
        uuid: s_uuid (uninit_bg).
        metadata_csum: Which of the two kinds.
    """
    numbers = groups.astype("<u4").view(np.uint8).reshape(-1, 4)
    if metadata_csum:
        cleared = raw.copy()
        cleared[:, 0x1E:0x20] = 0
        joined = np.concatenate([numbers, cleared], axis=1)
        return (crc32c_rows(seed, joined) & 0xFFFF).astype(np.uint16)
    head = int(crc16_rows(0xFFFF, np.frombuffer(uuid, np.uint8)[None, :])[0])
    body = [numbers, raw[:, :0x1E]]
    if raw.shape[1] > 32:
        body.append(raw[:, 0x20:])
    return crc16_rows(head, np.concatenate(body, axis=1))
