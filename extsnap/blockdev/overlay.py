"""A copy-on-write layer in memory: edits are tried on it before anything reaches a medium."""

from __future__ import annotations

from extsnap.blockdev.base import Buffer, ReadableDevice


class Overlay:
    """Reads through to the device below; writes stay here as whole blocks.

    Args:
        device: Never written.
        block_size: Unit of what is kept, in bytes.
    """

    def __init__(self, device: ReadableDevice, block_size: int) -> None:
        self._device = device
        self._block_size = block_size
        self._blocks: dict[int, bytearray] = {}
        self.size = device.size

    def _below(self, block: int) -> bytes:
        offset = block * self._block_size
        data = self._device.pread(offset, min(self._block_size, self.size - offset))
        return data + bytes(self._block_size - len(data))

    def pread(self, offset: int, length: int) -> bytes:
        """Read, with the writes so far."""
        buffer = bytearray(length)
        if length:
            self.readinto(offset, memoryview(buffer))
        return bytes(buffer)

    def readinto(self, offset: int, buffer: memoryview) -> None:
        """Read, with the writes so far."""
        self._device.readinto(offset, buffer)
        size, end = self._block_size, offset + len(buffer)
        first, last = offset // size, (end - 1) // size
        touched = (
            [block for block in range(first, last + 1) if block in self._blocks]
            if last - first < len(self._blocks)
            else [block for block in self._blocks if first <= block <= last]
        )
        for block in touched:
            low, high = max(offset, block * size), min(end, (block + 1) * size)
            buffer[low - offset : high - offset] = self._blocks[block][low - block * size : high - block * size]

    def pwrite(self, offset: int, data: Buffer) -> None:
        """Keep ``data``; nothing reaches the device below."""
        if offset < 0 or offset + len(data) > self.size:
            raise ValueError(f"write of {len(data)} bytes at {offset} leaves the device of {self.size}")
        view, size, end = memoryview(data), self._block_size, offset + len(data)
        for block in range(offset // size, (end + size - 1) // size):
            if block not in self._blocks:
                self._blocks[block] = bytearray(self._below(block))
            low, high = max(offset, block * size), min(end, (block + 1) * size)
            self._blocks[block][low - block * size : high - block * size] = view[low - offset : high - offset]

    def punch(self, offset: int, length: int) -> None:
        """Zeros."""
        self.pwrite(offset, bytes(length))

    def flush(self) -> None:
        """Nothing to do: nothing is meant to last."""

    def changes(self) -> dict[int, bytes]:
        """Blocks whose content differs from the device below."""
        return {block: bytes(data) for block, data in self._blocks.items() if bytes(data) != self._below(block)}
