"""Directory hashes against debugfs, which computes them with e2fsprogs' own code."""

from __future__ import annotations

import random
import re
import subprocess
import uuid

import pytest

from extsnap.ondisk.hashes import HALF_MD4, LEGACY, TEA, UNSIGNED, directory_hash

NAMES = {"legacy": LEGACY, "half_md4": HALF_MD4, "tea": TEA}
SEED = uuid.UUID("01234567-89ab-cdef-fedc-ba9876543210")


def names() -> list[bytes]:
    """Every length that matters (the hashes work on 16 or 32 bytes at a time), plain and with high bytes."""
    rng = random.Random(1)
    plain = [bytes(rng.choices(b"abcdefghijklmnopqrstuvwxyz0123456789._", k=length)) for length in range(1, 101)]
    # Valid UTF-8 with the high bit, which is where signed and unsigned characters part.
    high = ["".join(rng.choices("äöüßéøłж漢a", k=length)).encode() for length in range(1, 60)]
    return [*plain, *high, b"z" * 255, b".extsnap", b"lost+found"]


@pytest.mark.parametrize("seed", [SEED, None], ids=["seeded", "default-seed"])
@pytest.mark.parametrize("unsigned", [False, True], ids=["signed", "unsigned"])
@pytest.mark.parametrize("kind", NAMES)
def test_hash_is_the_one_of_debugfs(tmp_path, kind, unsigned, seed):
    version = NAMES[kind] + (UNSIGNED if unsigned else 0)
    option = f"-s {seed} " if seed else ""
    word = kind if not unsigned else f"{version}"
    script = tmp_path / "script"
    script.write_bytes(b"".join(f"dx_hash -h {word} {option}".encode() + name + b"\n" for name in names()))
    done = subprocess.run(["debugfs", "-f", str(script)], capture_output=True, check=True, env=None)
    found = [int(value, 16) for value in re.findall(rb"^Hash of .* is 0x([0-9a-f]+)", done.stdout, re.MULTILINE)]
    assert len(found) == len(names()), done.stderr[:300]
    words = [int.from_bytes(seed.bytes[at : at + 4], "little") for at in (0, 4, 8, 12)] if seed else [0] * 4
    assert [directory_hash(version, name, words) for name in names()] == found


def test_unknown_versions_are_refused():
    for version in (-1, 6, 255):
        with pytest.raises(ValueError, match="unknown"):
            directory_hash(version, b"x", [0] * 4)
