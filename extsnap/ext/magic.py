"""What a volume without an ext superblock is instead: for the one line that says why it is refused."""

from __future__ import annotations

from extsnap.blockdev.base import ReadableDevice

_RAW = "convert it with qemu-img convert -O raw"
_PART = "its partition table is empty or damaged: sfdisk --dump shows it"
#: (offset, magic, what it is, what to do), the more certain ones first.
_MAGICS = (
    (0, b"XFSB", "an XFS filesystem", ""),
    (0x10040, b"_BHRfS_M", "a Btrfs filesystem", ""),
    (0, b"hsqs", "a SquashFS filesystem", ""),
    (0x400, b"\x10\x20\xf5\xf2", "an F2FS filesystem", ""),
    (0x8001, b"CD001", "an ISO 9660 filesystem", ""),
    (3, b"NTFS    ", "an NTFS filesystem", ""),
    (0, b"LUKS\xba\xbe", "an encrypted volume (LUKS)", "open it with cryptsetup and name the mapped device"),
    (0x218, b"LVM2 001", "an LVM physical volume", "name the logical volume"),
    (0xFF6, b"SWAPSPACE2", "swap space", ""),
    (0, b"QFI\xfb", "a qcow2 image", _RAW),
    (0, b"KDMV", "a VMDK image", _RAW),
    (0x40, b"\x7f\x10\xda\xbe", "a VDI image", _RAW),
    (0, b"vhdxfile", "a VHDX image", _RAW),
    (0, b"\x3a\xff\x26\xed", "an Android sparse image", "convert it with simg2img"),
    (0, b"\x1f\x8b", "gzip-compressed data", "decompress it first"),
    (0, b"\xfd7zXZ\0", "xz-compressed data", "decompress it first"),
    (0, b"\x28\xb5\x2f\xfd", "zstd-compressed data", "decompress it first"),
    (0x200, b"EFI PART", "a disk with partitions (GPT)", _PART),
    (0x1000, b"EFI PART", "a disk with partitions (GPT)", _PART),
    (0x36, b"FAT1", "a FAT filesystem", ""),
    (0x52, b"FAT32", "a FAT filesystem", ""),
    (0x1FE, b"\x55\xaa", "a disk with partitions (MBR)", _PART),
)
_SPAN = max(offset + len(magic) for offset, magic, _, _ in _MAGICS)


def recognise(device: ReadableDevice) -> tuple[str, str]:
    """What a device holds by its magic numbers, and what to do about it; empty where that is not known.

    Raises:
        OSError: It cannot be read.
    """
    head = device.pread(0, min(_SPAN, device.size))
    for offset, magic, what, hint in _MAGICS:
        if head[offset : offset + len(magic)] == magic:
            return what, hint
    return "", ""
