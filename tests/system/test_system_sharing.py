"""One old content, one copy: what `extsnap dump` says, against the block lists and counts of e2fsprogs."""

from __future__ import annotations

import json
import os
import random
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
from arena import arena, make_volume

Cli = Callable[..., "subprocess.CompletedProcess[str]"]
SNAPSHOTS = [f"s{number}" for number in range(6)]


def dump(cli: Cli, image: Path, what: str) -> Any:
    return json.loads(cli("dump", "--json", image, what).stdout)[what]


def records_of(cli: Cli, image: Path, block: int) -> list[dict[str, Any]]:
    return [
        record
        for record in dump(cli, image, "records")
        if record["block"] <= block < record["block"] + record["length"]
    ]


def judge_bitmaps(cli: Cli, image: Path) -> None:
    """Both bitmaps of the dump are those of e2fsprogs: ext's own, and the store's blocks."""
    bitmaps = dump(cli, image, "bitmaps")
    store = oracle.store_blocks(image)
    assert store is not None
    listed = [block for start, length in bitmaps["snapshot"] for block in range(start, start + length)]
    assert sorted(listed) == store.all_blocks.tolist()
    volume = oracle.volume_facts(image)
    used = np.zeros(volume.blocks, np.bool_)
    used[: volume.first_block] = True
    for start, length in bitmaps["block"]:
        used[start : start + length] = True
    assert np.array_equal(used, oracle.blocks_in_use(image)[: volume.blocks])
    assert used[store.all_blocks].all()


@pytest.mark.parametrize(("kind", "block_size"), [("ext2", 1024), ("ext4", 4096)])
def test_one_copy_for_all_and_freed_with_the_last(kind: str, block_size: int, run_cli: Cli) -> None:
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("no /dev/fuse")
    content = random.Random(1).randbytes(16 * block_size)
    with arena() as top:
        image = make_volume(top / "disk.img", kind, 24, "-b", str(block_size), files={"target": content})
        for name in SNAPSHOTS:
            run_cli("create", image, name)
        block = int(oracle.file_blocks(image, "/target").data_blocks[3])
        run_cli("run", image, "--", "debugfs", "-w", "-R", "zap_block -f /target -p 17 3", "{}")

        (record,) = records_of(run_cli, image, block)
        assert record["snapshots"] == SNAPSHOTS
        store = oracle.store_blocks(image)
        assert store is not None
        logical = record["copy"] + block - record["block"]
        row = store.data[np.flatnonzero(store.data[:, 0] <= logical)[-1]]
        physical = int(row[1] + logical - row[0])
        assert logical < row[0] + row[2]
        raw = image.read_bytes()
        assert raw[physical * block_size :][:block_size] == content[3 * block_size :][:block_size]
        assert raw[block * block_size :][:block_size] == bytes([17]) * block_size
        judge_bitmaps(run_cli, image)

        run_cli("run", image, "--", "debugfs", "-w", "-R", "zap_block -f /target -p 18 3", "{}")
        (again,) = records_of(run_cli, image, block)
        assert (again["copy"], again["snapshots"]) == (record["copy"], SNAPSHOTS)
        assert again["writes"] > record["writes"]

        run_cli("create", image, "later")  # it needs none of the copies so far
        free, owned = oracle.free_count(image), len(oracle.store_blocks(image).all_blocks)  # type: ignore[union-attr]
        order = SNAPSHOTS.copy()
        random.Random(2).shuffle(order)
        for gone in order[:-1]:
            assert json.loads(run_cli("delete", "--json", image, gone).stdout)["freed_bytes"] == 0
            assert oracle.free_count(image) == free
            oracle.assert_clean(image)
        (last,) = records_of(run_cli, image, block)
        assert last["snapshots"] == order[-1:]
        judge_bitmaps(run_cli, image)

        freed = json.loads(run_cli("delete", "--json", image, order[-1]).stdout)["freed_bytes"]
        assert freed >= block_size
        assert records_of(run_cli, image, block) == []
        oracle.assert_clean(image)
        now = oracle.store_blocks(image)
        assert now is not None
        assert oracle.free_count(image) - free == owned - len(now.all_blocks) >= freed // block_size
        assert oracle.free_counts(image)[0] == oracle.free_count(image)
        judge_bitmaps(run_cli, image)
