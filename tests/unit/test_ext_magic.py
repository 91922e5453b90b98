"""A volume that is something else is called by its name; judged by what the programs of each kind write."""

from __future__ import annotations

import gzip
import lzma
import shutil
import subprocess
from pathlib import Path

import pytest

import extsnap
from extsnap.errors import NotExtError

MIB = 1 << 20


def refusal(path: Path) -> str:
    before = path.read_bytes()
    with pytest.raises(NotExtError) as refused:
        extsnap.open(path)
    assert path.read_bytes() == before
    return f"{refused.value}; {refused.value.hint}"


@pytest.mark.parametrize(
    ("program", "options", "said"), [("mkfs.xfs", ["-q"], "an XFS filesystem"), ("mkswap", [], "swap space")]
)
def test_volumes_of_other_programs(program: str, options: list[str], said: str, tmp_path: Path) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(320 * MIB)
    path.chmod(0o600)
    subprocess.run([program, *options, path], check=True, capture_output=True)
    assert f"{path} holds {said}, not ext2, ext3 or ext4" in refusal(path)


def test_compressed_images(tmp_path: Path) -> None:
    for name, data in (("gzip", gzip.compress(bytes(MIB))), ("xz", lzma.compress(bytes(64 * MIB)))):
        path = tmp_path / f"disk.img.{name}"
        path.write_bytes(data)
        assert f"holds {name}-compressed data, not ext2, ext3 or ext4; decompress it first" in refusal(path)


@pytest.mark.parametrize(
    ("offset", "magic", "said"),
    [
        (0, "514649fb", "qcow2 image, not ext2, ext3 or ext4; convert it with qemu-img convert -O raw"),
        (0, "4c554b53babe0002", "encrypted volume (LUKS), not ext2, ext3 or ext4; open it with cryptsetup"),
        (510, "55aa4546492050415254", "disk with partitions (GPT)"),
        (510, "55aa", "disk with partitions (MBR)"),
        (0, "", "no ext2, ext3 or ext4 filesystem; check the path"),
    ],
)
def test_magic_numbers_of_the_specifications(offset: int, magic: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    content = bytearray(MIB)
    content[offset : offset + len(magic) // 2] = bytes.fromhex(magic)
    path.write_bytes(content)
    assert said in refusal(path)
