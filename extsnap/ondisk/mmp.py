"""The block of multiple-mount protection: who has a volume in use, on whichever machine.

Source: the kernel's Documentation/filesystems/ext4/mmp.rst.
"""

from __future__ import annotations

import construct as c

MAGIC = 0x004D4D50
#: mmp_seq of a volume that nobody uses.
SEQ_CLEAN = 0xFF4D4D50
#: mmp_seq while e2fsck has it.
SEQ_FSCK = 0xE24D4D50

MmpBlock = c.Struct(
    "mmp_magic" / c.Int32ul,
    "mmp_seq" / c.Int32ul,
    "mmp_time" / c.Int64ul,
    "mmp_nodename" / c.Bytes(64),
    "mmp_bdevname" / c.Bytes(32),
    "mmp_check_interval" / c.Int16ul,  # seconds
    "mmp_pad1" / c.Int16ul,
    "mmp_pad2" / c.Bytes(904),
    "mmp_checksum" / c.Int32ul,
)
