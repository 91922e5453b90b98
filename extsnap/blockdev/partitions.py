"""Partition tables of a disk: MBR with logical partitions, and GPT; numbers as the kernel gives them.

A table may come from anybody.  Nothing in it is trusted: what cannot be used is told of each partition
(`Partition.problem`), a table that makes no sense raises `FormatError`, and reading ends after a bounded number
of sectors whatever it says.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from extsnap.blockdev.base import ReadableDevice
from extsnap.errors import FormatError
from extsnap.ondisk import partition as disk
from extsnap.ondisk.codec import parse

SECTOR_SIZES = (512, 4096)
#: The kernel numbers no more partitions of one disk than this (DISK_MAX_PARTS).
_NUMBER_MAX = 256
#: Boot records of logical partitions that are followed; each holds at most one in practice.
_CHAIN_MAX = 512
_GPT_ARRAY_BYTES_MAX = 4 << 20
_HINT = "repair the partition table with sfdisk or gdisk"
_TYPES = {0x07: "NTFS or exFAT", 0x0B: "FAT", 0x0C: "FAT", 0x82: "swap", 0x83: "Linux", 0x8E: "LVM", 0xEF: "EFI"}


@dataclass(frozen=True)
class Partition:
    """One partition.

    Attributes:
        number: As in the kernel's names: 1 for sda1; logical partitions begin at 5.
        offset: Bytes from the start of the disk.
        length: Bytes.
        name: The GPT's name of it, or the MBR's type in words.
        extended: It only holds logical partitions.
        problem: Why it cannot be used; "" if it can.
    """

    number: int
    offset: int
    length: int
    name: str = ""
    extended: bool = False
    problem: str = ""

    @property
    def end(self) -> int:
        """The first byte behind it."""
        return self.offset + self.length


@dataclass(frozen=True)
class Table:
    """A partition table.

    Attributes:
        kind: "MBR" or "GPT".
        sector_size: Bytes; the unit that the table counts in.
        partitions: In the order of their numbers.
        warning: What is wrong with the table although it could be read; "" if nothing is.
    """

    kind: str
    sector_size: int
    partitions: tuple[Partition, ...]
    warning: str = ""

    def numbered(self, number: int) -> Partition | None:
        """The partition of this number."""
        return next((found for found in self.partitions if found.number == number), None)


def read_table(device: ReadableDevice, sector_size: int | None = None) -> Table | None:
    """Read the partition table of a disk.

    Args:
        device: The whole disk.
        sector_size: Bytes; None where it is not known: a GPT tells, and an MBR is taken for one of 512.

    Returns:
        The table, or None if there is none: no boot record, or one without entries.

    Raises:
        FormatError: The table is damaged or impossible.
        OSError: It cannot be read.
    """
    if device.size < disk.BOOT_RECORD_BYTES:
        return None
    record = _boot_record(device, 0)
    if record is None:
        return None
    entries = record.partition_record
    # A boot sector of a filesystem has the signature too; the kernel tells it by this byte as well.
    if any(entry.boot_ind not in (0, 0x80) for entry in entries):
        return None
    if any(entry.sys_ind == disk.PROTECTIVE for entry in entries):
        return _read_gpt(device, SECTOR_SIZES if sector_size is None else (sector_size,))
    if not any(entry.nr_sects for entry in entries):
        return None
    return _read_mbr(device, entries, sector_size or SECTOR_SIZES[0])


def _boot_record(device: ReadableDevice, offset: int) -> Any:
    """The boot record at ``offset`` bytes, or None if there is none."""
    raw = device.pread(offset, disk.BOOT_RECORD_BYTES)
    if not raw.endswith(disk.BOOT_SIGNATURE):
        return None
    return parse(disk.BootRecord, raw, "msdos_partition table", offset)


# ---- MBR


def _read_mbr(device: ReadableDevice, entries: Any, sector: int) -> Table:
    found: list[Partition] = []
    logical: list[Partition] = []
    structures = [(0, sector)]
    for number, entry in enumerate(entries, 1):
        if not entry.nr_sects:
            continue
        extended = entry.sys_ind in disk.EXTENDED
        name = "extended" if extended else _TYPES.get(entry.sys_ind, f"type 0x{entry.sys_ind:02x}")
        offset, length = entry.start_sect * sector, entry.nr_sects * sector
        found.append(Partition(number, offset, length, name, extended))
        if extended:
            for start, size, kind, record in _logical(device, offset, length, sector):
                structures.append((record, record + sector))
                if size:
                    name = _TYPES.get(kind, f"type 0x{kind:02x}")
                    logical.append(Partition(5 + len(logical), start, size, name))
    return Table("MBR", sector, _judged([*found, *logical], structures, device.size))


def _logical(device: ReadableDevice, first: int, first_length: int, sector: int) -> Iterator[tuple[int, int, int, int]]:
    """Follow the chain of boot records of one extended partition, as the kernel's parse_extended does.

    Yields:
        (offset, length, type, offset of the boot record), in bytes; a length of 0 for a record without a partition.

    Raises:
        FormatError: The chain goes in circles, leaves the disk, or has no end.
    """
    at, length = first, first_length
    seen: set[int] = set()
    count = 0
    while True:
        if at in seen or len(seen) >= _CHAIN_MAX:
            what = "goes round in circles" if at in seen else "has no end"
            raise _damaged(f"the chain of logical partitions {what}", at)
        seen.add(at)
        if at + disk.BOOT_RECORD_BYTES > device.size:
            raise _damaged("the chain of logical partitions leaves the disk", at)
        record = _boot_record(device, at)
        if record is None:
            return
        entries = record.partition_record
        yield at, 0, 0, at
        for slot, entry in enumerate(entries):
            if not entry.nr_sects or entry.sys_ind in disk.EXTENDED:
                continue
            size, start = entry.nr_sects * sector, at + entry.start_sect * sector
            # The third and fourth entries are unused, and may hold anything.
            outside = start < first or start + size > first + first_length
            if slot >= 2 and (entry.start_sect * sector + size > length or outside):
                continue
            count += 1
            if count > _NUMBER_MAX:
                raise _damaged(f"there are more than {_NUMBER_MAX} logical partitions", at)
            yield start, size, entry.sys_ind, at
        link = next((entry for entry in entries if entry.nr_sects and entry.sys_ind in disk.EXTENDED), None)
        if link is None:
            return
        at, length = first + link.start_sect * sector, link.nr_sects * sector


def _damaged(message: str, offset: int) -> FormatError:
    return FormatError(message, structure="msdos_partition table", offset=offset, hint=_HINT)


# ---- GPT


def _read_gpt(device: ReadableDevice, sizes: tuple[int, ...]) -> Table:
    """The primary GPT, or its backup where the primary is damaged.

    Raises:
        FormatError: Both are damaged; carries what is wrong with the primary.
    """
    first: FormatError | None = None
    for sector in sizes:
        try:
            return _gpt_at(device, 1, sector)
        except FormatError as error:
            if first is None or device.pread(0, min(device.size, sector + 8))[sector:] == disk.GPT_SIGNATURE:
                first = error
    for sector in sizes:
        try:
            table = _gpt_at(device, device.size // sector - 1, sector)
        except FormatError:
            continue
        return replace(table, warning="the primary GPT is damaged: its backup at the end of the disk is used")
    assert first is not None
    raise FormatError(
        f"{first.message}; the backup at the end of the disk cannot be used either",
        structure="GPT",
        hint=_HINT,
    ) from first


def _gpt_at(device: ReadableDevice, lba: int, sector: int) -> Table:
    """The GPT whose header is in sector ``lba``.

    Raises:
        FormatError: There is no valid one.
    """
    at = lba * sector

    def require(condition: bool, field: str, message: str) -> None:
        if not condition:
            raise FormatError(message, structure="gpt_header", field=field, offset=at, hint=_HINT)

    require(0 < lba < device.size // sector, "", "is not on the disk")
    raw = device.pread(at, sector)
    header = parse(disk.GptHeader, raw[: disk.GPT_HEADER_BYTES], "gpt_header", at)
    require(header.signature == disk.GPT_SIGNATURE, "signature", "is wrong")
    require(disk.GPT_HEADER_BYTES <= header.header_size <= sector, "header_size", "is impossible")
    checksum = disk.gpt_header_checksum(raw[: header.header_size])
    require(header.header_crc32 == checksum, "header_crc32", "does not match the header")
    require(header.my_lba == lba, "my_lba", f"is {header.my_lba} in sector {lba}")
    entry, count = header.sizeof_partition_entry, header.num_partition_entries
    require(entry == disk.GPT_ENTRY_BYTES, "sizeof_partition_entry", f"is {entry}: 128 is supported")
    require(count * entry <= _GPT_ARRAY_BYTES_MAX, "num_partition_entries", f"is {count}: too many")
    start = header.partition_entry_lba * sector
    require(start + count * entry <= device.size, "partition_entry_lba", "leaves the disk")
    array = device.pread(start, count * entry)
    checksum = disk.gpt_entries_checksum(array)
    require(header.partition_entry_array_crc32 == checksum, "partition_entry_array_crc32", "does not match the entries")
    found = []
    for number in range(1, min(count, _NUMBER_MAX) + 1):
        piece = array[(number - 1) * entry : number * entry]
        if any(piece[:16]):
            found.append(_gpt_partition(parse(disk.GptEntry, piece, "gpt_entry"), number, sector))
    structures = [(0, 2 * sector), (at, at + sector), (start, start + count * entry)]
    return Table("GPT", sector, _judged(found, structures, device.size))


def _gpt_partition(entry: Any, number: int, sector: int) -> Partition:
    name = entry.partition_name.decode("utf-16-le", errors="replace").split("\0")[0]
    sectors = entry.ending_lba - entry.starting_lba + 1
    return Partition(number, entry.starting_lba * sector, max(sectors, 0) * sector, name)


# ---- what cannot be used


def _judged(found: list[Partition], structures: list[tuple[int, int]], size: int) -> tuple[Partition, ...]:
    """The partitions with their problems: outside the disk, or sharing bytes with another one or the table."""
    problems: dict[int, str] = {}
    taken = [(low, high, "the partition table") for low, high in structures]
    taken += [(part.offset, part.end, f"partition {part.number}") for part in found if not part.extended]
    reach, owner = 0, ""
    # Sorted by their starts, two ranges overlap only if one starts before the furthest end so far.
    by_name = {f"partition {part.number}": part.number for part in found}
    for low, high, name in sorted(taken):
        if low < reach and low < high and name != owner:
            for one, other in ((name, owner), (owner, name)):
                if one in by_name:
                    problems.setdefault(by_name[one], f"it shares bytes with {other}")
        if high > reach:
            reach, owner = high, name
    for part in found:
        if not part.length:
            problems[part.number] = "it ends before it begins"
        elif part.end > size:
            problems[part.number] = f"it ends {part.end - size} bytes behind the end of the disk"
    return tuple(replace(part, problem=problems.get(part.number, "")) for part in found)
