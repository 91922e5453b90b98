"""Partition tables: the boot record of an MBR and of each logical partition, the GPT's header and entries.

Sources: the kernel's include/linux/msdos_partition.h and block/partitions/efi.h; UEFI specification, chapter 5.
"""

from __future__ import annotations

import zlib

import construct as c

BOOT_RECORD_BYTES = 512
BOOT_SIGNATURE = b"\x55\xaa"
GPT_SIGNATURE = b"EFI PART"
GPT_HEADER_BYTES = 92
GPT_ENTRY_BYTES = 128
#: sys_ind of a GPT's protective entry.
PROTECTIVE = 0xEE
#: sys_ind of an extended partition, which holds logical ones.
EXTENDED = (0x05, 0x0F, 0x85)

MsdosPartition = c.Struct(
    "boot_ind" / c.Int8ul,  # 0x80: active, 0: not; anything else is no table
    "head" / c.Int8ul,
    "sector" / c.Int8ul,
    "cyl" / c.Int8ul,
    "sys_ind" / c.Int8ul,  # type
    "end_head" / c.Int8ul,
    "end_sector" / c.Int8ul,
    "end_cyl" / c.Int8ul,
    "start_sect" / c.Int32ul,  # sectors from the disk's start, of a logical partition from its boot record
    "nr_sects" / c.Int32ul,  # sectors; 0: the entry is unused
)

BootRecord = c.Struct(
    "boot_code" / c.Bytes(446),
    "partition_record" / MsdosPartition[4],
    "signature" / c.Bytes(2),
)

GptHeader = c.Struct(
    "signature" / c.Bytes(8),
    "revision" / c.Int32ul,
    "header_size" / c.Int32ul,  # bytes under header_crc32
    "header_crc32" / c.Int32ul,
    "reserved1" / c.Int32ul,
    "my_lba" / c.Int64ul,  # sector of this header
    "alternate_lba" / c.Int64ul,  # sector of the other one
    "first_usable_lba" / c.Int64ul,
    "last_usable_lba" / c.Int64ul,
    "disk_guid" / c.Bytes(16),
    "partition_entry_lba" / c.Int64ul,
    "num_partition_entries" / c.Int32ul,
    "sizeof_partition_entry" / c.Int32ul,  # bytes
    "partition_entry_array_crc32" / c.Int32ul,
)

GptEntry = c.Struct(
    "partition_type_guid" / c.Bytes(16),  # zeros: the entry is unused
    "unique_partition_guid" / c.Bytes(16),
    "starting_lba" / c.Int64ul,
    "ending_lba" / c.Int64ul,  # inclusive
    "attributes" / c.Int64ul,
    "partition_name" / c.Bytes(72),  # UTF-16, little-endian
)


def gpt_header_checksum(raw: bytes) -> int:
    """header_crc32 of the header_size bytes in ``raw``: over all of them, with the field zeroed."""
    return zlib.crc32(raw[:16] + bytes(4) + raw[20:])


def gpt_entries_checksum(raw: bytes) -> int:
    """partition_entry_array_crc32."""
    return zlib.crc32(raw)
