"""tools/bench runs and measures what it says; its figures mean nothing at these sizes."""

from __future__ import annotations

import json
import os
import xml.etree.ElementTree
from pathlib import Path

import bench
import bench_rows
import pytest
from arena import arena


def measured(*words: str | Path) -> list[bench_rows.Row]:
    """Run it in small, twice the second time against the first."""
    with arena() as top:
        (top / "images").mkdir()
        options = ["--quick", "--directory", str(top / "images"), "--json", str(top / "new.json"), *map(str, words)]
        assert bench.main(options) == 0
        assert not list((top / "images").iterdir()), "images were left behind"
        text = (top / "new.json").read_text()
        assert json.loads(text)["machine"]["cores"] == os.cpu_count()
        return bench_rows.from_json(text)


@pytest.mark.system
def test_the_data_path_is_measured_against_a_raw_loop_device(capsys: pytest.CaptureFixture[str]) -> None:
    """Every kind of work, in pairs; without the peer, and says so."""
    rows = measured("--only", "loop", "--no-peer")
    assert "rows against qcow2 are left out: left out" in capsys.readouterr().out
    work = ("first", "steady")
    assert {row.key for row in rows} >= {f"loop/{w}-{how}/raw" for w in work for how in ("random", "sequential")}
    for row in rows:
        assert row.limit is not None
        assert row.at_least
        assert row.values == bench_rows.ratios(row.samples["ours"], row.samples["raw"])


if os.environ.get("EXTSNAP_LONG"):

    @pytest.mark.system
    def test_all_of_it_runs(tmp_path: Path) -> None:
        """All sections, the peer too, and the plots."""
        rows = measured("--plots", tmp_path)
        sections = {row.key.partition("/")[0] for row in rows}
        assert sections >= {"start", "loop", "mounted", "view", "tree", "verbs", "open", "records", "create", "growth"}
        assert any(row.key == "mounted/first-random/qcow2" for row in rows)
        for name in ("snapshots", "records", "size"):
            xml.etree.ElementTree.parse(tmp_path / f"growth-{name}.svg")
