"""Directory hashes: legacy, half MD4 and TEA, with signed and unsigned characters.

Source: fs/ext4/hash.c and e2fsprogs `lib/ext2fs/dirhash.c`.
"""

from __future__ import annotations

from collections.abc import Callable

LEGACY, HALF_MD4, TEA = 0, 1, 2
#: Added to a version for unsigned characters (s_flags has 2).
UNSIGNED = 3
_MASK = 0xFFFFFFFF
_DEFAULT_SEED = (0x67452301, 0xEFCDAB89, 0x98BADCFE, 0x10325476)
_EOF = 0x7FFFFFFF


def _words(name: bytes, count: int, *, signed: bool) -> list[int]:
    """The next ``count`` words of input, padded with the length as the kernel does."""
    pad = len(name) | len(name) << 8
    pad |= pad << 16
    value, words = pad & _MASK, []
    for index, byte in enumerate(name[: count * 4]):
        value = ((byte - 256 if signed and byte > 127 else byte) + (value << 8)) & _MASK
        if index % 4 == 3:
            words.append(value)
            value = pad & _MASK
    if len(words) < count:
        words.append(value)
    return words + [pad & _MASK] * (count - len(words))


def _rotate(value: int, bits: int) -> int:
    return (value << bits | value >> (32 - bits)) & _MASK


_ROUNDS: tuple[tuple[Callable[[int, int, int], int], int, tuple[int, ...], tuple[int, ...]], ...] = (
    (lambda x, y, z: z ^ (x & (y ^ z)), 0, (0, 1, 2, 3, 4, 5, 6, 7), (3, 7, 11, 19)),
    (lambda x, y, z: (x & y) + ((x ^ y) & z), 0x5A827999, (1, 3, 5, 7, 0, 2, 4, 6), (3, 5, 9, 13)),
    (lambda x, y, z: x ^ y ^ z, 0x6ED9EBA1, (3, 7, 2, 6, 1, 5, 0, 4), (3, 9, 11, 15)),
)


def _half_md4(state: list[int], words: list[int]) -> list[int]:
    a, b, c, d = state
    for function, constant, order, shifts in _ROUNDS:
        for step, word in enumerate(order):
            a = _rotate((a + function(b, c, d) + words[word] + constant) & _MASK, shifts[step % 4])
            a, b, c, d = d, a, b, c
    return [(old + new) & _MASK for old, new in zip(state, (a, b, c, d), strict=True)]


def _tea(state: list[int], words: list[int]) -> list[int]:
    b0, b1 = state[:2]
    a, b, c, d = words
    total = 0
    for _ in range(16):
        total = (total + 0x9E3779B9) & _MASK
        b0 = (b0 + (((b1 << 4) + a) ^ (b1 + total) ^ ((b1 >> 5) + b))) & _MASK
        b1 = (b1 + (((b0 << 4) + c) ^ (b0 + total) ^ ((b0 >> 5) + d))) & _MASK
    return [(state[0] + b0) & _MASK, (state[1] + b1) & _MASK, *state[2:]]


def _legacy(name: bytes, *, signed: bool) -> int:
    first, second = 0x12A3FE2D, 0x37ABE8F9
    for byte in name:
        value = byte - 256 if signed and byte > 127 else byte
        new = (second + (first ^ (value * 7152373))) & _MASK
        if new & 0x80000000:
            new = (new - 0x7FFFFFFF) & _MASK
        first, second = new, first
    return (first << 1) & _MASK


def directory_hash(version: int, name: bytes, seed: tuple[int, ...] | list[int]) -> int:
    """The major hash of a name: what the hash tree is ordered by.

    Args:
        version: LEGACY, HALF_MD4 or TEA, plus UNSIGNED.
        name: Without terminator.
        seed: s_hash_seed, four words; all zeros stands for the default.

    Raises:
        ValueError: The version is unknown.
    """
    signed = version < UNSIGNED
    kind = version % UNSIGNED
    if not 0 <= version < 2 * UNSIGNED:
        raise ValueError(f"hash version {version} is unknown")
    if kind == LEGACY:
        value = _legacy(name, signed=signed)
    else:
        state = list(seed) if any(seed) else list(_DEFAULT_SEED)
        step = 32 if kind == HALF_MD4 else 16
        for at in range(0, len(name), step):
            words = _words(name[at:], step // 4, signed=signed)
            state = _half_md4(state, words) if kind == HALF_MD4 else _tea(state, words)
        value = state[1] if kind == HALF_MD4 else state[0]
    value &= ~1
    return (_EOF - 1) << 1 if value == _EOF << 1 else value
