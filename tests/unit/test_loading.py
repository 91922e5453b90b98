"""Once a server has imported what it may need, no command makes it import anything more."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import lab

# A process of its own: here everything is imported by some test.
COMMANDS = """
import gc, json, signal, sys
from extsnap.serve import loading, numpy_alone
numpy_alone.load()
from extsnap.serve import server
state = gc.get_threshold(), signal.getsignal(signal.SIGINT)
loading.everything()
assert (gc.get_threshold(), signal.getsignal(signal.SIGINT)) == state, "the program's own settings are not a server's"
before = set(sys.modules)
from extsnap.snapshot.volume import Volume
from extsnap.snapshot.verbs import VERBS
volume = Volume.open(sys.argv[1], writable=True)
volume.begin_serving()
calls = [("create", {"name": "one"}), ("create", {"name": "two", "message": "m"})]
calls += [(name, {}) for name in ("list", "info")]
calls += [(name, {"name": "one"}) for name in ("show", "checksum", "layout")]
calls += [("dump", {"what": what}) for what in ("header", "log", "records", "snapshots", "bitmaps")]
calls += [("check", {}), ("check_copies", {}), ("note_check", {"damaged": ["one"], "sound": []})]
calls += [("note_check", {"damaged": [], "sound": ["one"]}), ("set", {"values": {"on-full": "drop-oldest"}})]
calls += [("guard", {"wanted": False}), ("export", {"name": "one", "out": sys.argv[2], "force": True})]
calls += [("restore", {"name": "one"}), ("delete", {"names": ["two"]}), ("accept", {}), ("strip", {})]
for number, (name, arguments) in enumerate(calls):
    volume.verb(name, **arguments)
    volume.write(volume.size - 8192, bytes([number + 1]) * 1024)
    volume.flush()
volume.end_serving()
volume.close()
print(json.dumps([sorted(set(sys.modules) - before), sorted(set(VERBS) - {name for name, _ in calls})]))
"""


def test_no_command_imports_anything(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(lab.plain_image("ext4"))
    run = [sys.executable, "-c", COMMANDS, str(image), str(tmp_path / "out.img")]
    ran = subprocess.run(run, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    imported, not_called = json.loads(ran.stdout)
    assert imported == not_called == []
