"""Disk images with partition tables, written by hand from the specifications, never with extsnap's definitions."""

from __future__ import annotations

import struct
import subprocess
import uuid
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

MIB = 1 << 20
LINUX, EXTENDED, PROTECTIVE = 0x83, 0x05, 0xEE
LINUX_GUID = uuid.UUID("0FC63DAF-8483-4772-8E79-3D69D8477DE4").bytes_le

#: (number, first byte, bytes)
Parts = Sequence[tuple[int, int, int]]


def boot_record(entries: Iterable[tuple[int, int, int]]) -> bytes:
    """A sector of an MBR; entries are (type, first sector, sectors)."""
    table = b"".join(struct.pack("<B3sB3sII", 0, bytes(3), kind, bytes(3), *where) for kind, *where in entries)
    return bytes(446) + table.ljust(64, b"\0") + b"\x55\xaa"


def gpt(size: int, parts: Parts, *, sector: int = 512, entries: int = 128) -> dict[int, bytes]:
    """What is written where, for a GPT with its backup."""
    array = bytearray(entries * 128)
    for number, first, length in parts:
        where = (first // sector, (first + length) // sector - 1)
        name = f"part {number}".encode("utf-16-le").ljust(72, b"\0")
        entry = LINUX_GUID + uuid.uuid5(uuid.NAMESPACE_OID, str(number)).bytes + struct.pack("<QQQ", *where, 0) + name
        array[(number - 1) * 128 : number * 128] = entry
    last, array_sectors = size // sector - 1, -(-len(array) // sector)
    usable = (2 + array_sectors, last - array_sectors - 1)

    def header(own: int, other: int, table: int) -> bytes:
        def raw(checksum: int) -> bytes:
            return struct.pack(
                "<8sIIIIQQQQ16sQIII",
                *(b"EFI PART", 0x10000, 92, checksum, 0, own, other, *usable, bytes(range(16)), table),
                *(entries, 128, zlib.crc32(array)),
            )

        return raw(zlib.crc32(raw(0)))

    return {
        0: boot_record([(PROTECTIVE, 1, min(last, 0xFFFFFFFF))]),
        sector: header(1, last, 2),
        2 * sector: bytes(array),
        (last - array_sectors) * sector: bytes(array),
        last * sector: header(last, 1, last - array_sectors),
    }


def mbr(
    primary: Parts, logical: Parts = (), *, container: tuple[int, int] = (0, 0), sector: int = 512
) -> dict[int, bytes]:
    """What is written where, for an MBR; logical partitions have their boot record one sector before.

    Args:
        primary: Numbers 1 to 4.
        logical: Numbers from 5.
        container: First byte and bytes of the extended partition, number 4; its first boot record is there.
        sector: Bytes.
    """
    rows = [(0, 0, 0)] * 4
    for number, first, length in primary:
        rows[number - 1] = (LINUX, first // sector, length // sector)
    written = {}
    if container[1]:
        rows[3] = (EXTENDED, container[0] // sector, container[1] // sector)
        records = [container[0], *(first - sector for _, first, _ in logical[1:])]
        for index, ((_, first, length), at) in enumerate(zip(logical, records, strict=True)):
            chain = [(LINUX, (first - at) // sector, length // sector)]
            if index + 1 < len(logical):
                following = records[index + 1]
                size = logical[index + 1][1] + logical[index + 1][2] - following
                chain.append((EXTENDED, (following - container[0]) // sector, size // sector))
            written[at] = boot_record(chain)
    return {0: boot_record(rows), **written}


def make(path: Path, size: int, writes: dict[int, bytes]) -> Path:
    """Write a sparse image."""
    with path.open("wb") as file:
        file.truncate(size)
        for offset, data in writes.items():
            file.seek(offset)
            file.write(data)
    return path


def mkfs(path: Path, offset: int, length: int, kind: str = "ext4", label: str = "") -> None:
    """Make a filesystem in a range of an image."""
    options = ["-E", f"offset={offset}", *(["-L", label] if label else [])]
    command = ["mke2fs", "-q", "-F", "-t", kind, *options, str(path), f"{length >> 10}k"]
    subprocess.run(command, check=True, capture_output=True)
