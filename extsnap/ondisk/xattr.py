"""Extended attributes as they stand in the inode's own area: a magic, entries, and values from the end backwards.

Source: the kernel's Documentation/filesystems/ext4/attributes.rst.
"""

from __future__ import annotations

import construct as c

IBODY_MAGIC = 0xEA020000
#: e_name_index of the prefix "system.".
SYSTEM_INDEX = 7

XattrEntry = c.Struct(
    "e_name_len" / c.Int8ul,
    "e_name_index" / c.Int8ul,
    "e_value_offs" / c.Int16ul,  # from the first entry
    "e_value_inum" / c.Int32ul,
    "e_value_size" / c.Int32ul,
    "e_hash" / c.Int32ul,
)
ENTRY_SIZE: int = XattrEntry.sizeof()
