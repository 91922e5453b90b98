"""Fifty clients of one server at once, some of them rude, while its volume is read and written.

Who asks properly is answered in time, whatever the others do: those that send nonsense, half a request or none, that
hang up before the answer, that read a large answer slowly, or that ask and ask and never read.  A create that returned
is there, a delete that returned is done, no name is there twice, and every list shows what was there at one moment
between its question and its answer.  Meanwhile requests to ``volume`` wait no longer than `STALL`, and what the server
keeps in memory for its clients stays bounded.

In turn the volume is read raw, written raw in short sessions (a create is refused as long as one is open), or mounted
by the kernel with a program on it that calls fsync.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import oracle
from arena import make_volume

from campaigns.report import Report
from campaigns.together_place import ENDS_WITHIN, STALL, Pauses, Place
from extsnap.errors import SnapshotExists, VolumeBusy
from extsnap.serve import checking, control, session

CLIENTS = 50
_REQUESTS = 6  # of each that asks properly
_MEBIBYTES = 64
_FILE_BYTES = 6 << 20
#: How much more memory a server may have after all this: answers to those who do not read are not piled up.
_GROWTH_BYTES = 200 << 20
#: More than a server takes at once: the rest waits until those that are silent have to go.
_CROWD = 300
MODES = ("read", "write", "mount")

# What goes on with the volume meanwhile; each prints its longest wait in seconds at the end of its input.
_READER = """
import mmap, os, random, select, sys, time
volume, copy, seed, *places = sys.argv[1:]
places = [tuple(map(int, place.split(","))) for place in places]
rng, longest, count = random.Random(int(seed)), 0.0, 0
served = os.open(volume, os.O_RDONLY | os.O_DIRECT)
plain = open(copy, "rb")
page = mmap.mmap(-1, 65536)
while not select.select([0], [], [], 0.002)[0]:
    start, length = rng.choice(places)
    at = start + rng.randrange(length // 65536) * 65536
    before = time.monotonic()
    os.preadv(served, [page], at)
    longest, count = max(longest, time.monotonic() - before), count + 1
    plain.seek(at)
    if page[:] != plain.read(65536):
        sys.exit(f"bytes {at} to {at + 65536} of volume are not what they were")
print(longest, count)
"""
_WRITER = """
import os, random, select, sys, time
volume, seed, *places = sys.argv[1:]
rng, longest, count = random.Random(int(seed)), 0.0, 0
places = [tuple(map(int, place.split(","))) for place in places]
while not select.select([0], [], [], 0.05)[0]:
    served = os.open(volume, os.O_RDWR)
    for _ in range(rng.randrange(1, 20)):
        start, length = rng.choice(places)
        at = start + rng.randrange(length // 4096) * 4096
        data = rng.randbytes(4096)
        before = time.monotonic()
        os.pwrite(served, data, at)
        if rng.random() < 0.3:
            os.fsync(served)
        longest, count = max(longest, time.monotonic() - before), count + 1
    before = time.monotonic()
    os.close(served)
    longest = max(longest, time.monotonic() - before)
print(longest, count)
"""
_MOUNTED = """
import os, random, select, sys, time
top, seed = sys.argv[1:]
rng, longest, count = random.Random(int(seed)), 0.0, 0
held = {}
while not select.select([0], [], [], 0.002)[0]:
    name, data = f"{top}/new-{count % 30}", rng.randbytes(rng.randrange(8000))
    before = time.monotonic()
    with open(name, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    longest, count = max(longest, time.monotonic() - before), count + 1
    held[name] = data
for name, data in held.items():
    if open(name, "rb").read() != data:
        sys.exit(f"{name} is not what was written")
print(longest, count)
"""


_OF_A_CHECK = re.compile(r"check-\d{8}T\d{6}Z-\d+")


@dataclass(eq=False)
class _Life:
    """When a name was asked for and was there, by the clock of this process; None: not yet."""

    create_sent: float
    created: float | None = None
    delete_sent: float | None = None
    deleted: float | None = None


@dataclass
class _Ledger:
    """What the clients know of the snapshots.

    Attributes:
        lives: Of every name that was asked for, one after another.
        faults: What was not as it should be.
        longest: Seconds that an answer took.
    """

    lives: dict[str, list[_Life]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    longest: float = 0.0
    answers: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def expected(self) -> set[str]:
        """Names that are there when nobody asks any more."""
        return {name for name, lives in self.lives.items() for life in lives if life.created and not life.deleted}

    def check_list(self, entries: list[dict[str, Any]], sent: float, answered: float, always: set[str]) -> None:
        """A list shows what was there at a moment between question and answer, all of it whole."""
        names = [str(entry["name"]) for entry in entries]
        with self.lock:
            if len(set(names)) != len(names):
                self.faults.append(f"a name twice in {sorted(names)}")
            if len({entry["id"] for entry in entries}) != len(entries):
                self.faults.append("an id twice")
            for entry in entries:
                if entry["state"] != "ok" or not entry["created"] or entry["used_bytes"] <= 0:
                    self.faults.append(f"half a snapshot: {entry}")
            must = {
                name
                for name, lives in self.lives.items()
                for life in lives
                if life.created and life.created <= sent and not (life.delete_sent and life.delete_sent <= answered)
            }
            may = {
                name
                for name, lives in self.lives.items()
                for life in lives
                if life.create_sent <= answered and not (life.deleted and life.deleted <= sent)
            }
            if missing := (must | always) - set(names):
                self.faults.append(f"list lacks {sorted(missing)}")
            # A check of a volume in use has a snapshot of its own meanwhile; at the end none may be left.
            strange = {name for name in set(names) - may - always if not _OF_A_CHECK.fullmatch(name)}
            if strange:
                self.faults.append(f"list shows {sorted(strange)}, which are not there")


def prepare(place: Place) -> None:
    """Make a volume with snapshots that have many records: their dump is a large answer."""
    content = random.Random("together clients").randbytes(_FILE_BYTES)
    image = make_volume(place.top / "volume.img", "ext4", _MEBIBYTES, "-b", "4096", files={"big": content, "s": b"s"})
    copies = {}
    for number, name in enumerate(("first", "second")):
        place.extsnap("create", image, name)
        copies[name] = oracle.copy_image(image, place.top / f"{name}.copy")
        blocks = [start + at for _, start, count in _runs(image) for at in range(number, count, 2)]
        script = place.top / "scatter.py"
        script.write_text(
            "import os, sys\nf = os.open(sys.argv[1], os.O_RDWR)\n"
            "for at in map(int, sys.argv[2:]):\n    os.pwrite(f, os.urandom(4096), at * 4096)\n"
        )
        place.extsnap("run", image, "--", sys.executable, script, "{}", *map(str, blocks))
    place.shared.update({"image": image, **copies})


def _runs(image: Path) -> list[list[int]]:
    runs: list[list[int]] = oracle.file_blocks(image, "/big").data.tolist()
    return runs


# ---- a case


def case(report: Report, token: str, number: int, place: Place) -> None:
    """Try one."""
    mode = MODES[number % len(MODES)]
    top = place.top / f"case-{number}"
    with report.case(token, f"50 clients, volume {mode}"):
        top.mkdir()
        try:
            with place.here():
                _try(place, top, mode, random.Random(number))
        except BaseException:
            place.clear()
            raise
        finally:
            shutil.rmtree(top, ignore_errors=True)


def _try(place: Place, top: Path, mode: str, rng: random.Random) -> None:
    image = oracle.copy_image(place.shared["image"], top / "disk.img")
    (top / "served").mkdir()
    (top / "mnt").mkdir()
    place.extsnap("attach", image, top / "served")
    if mode == "mount":
        place.extsnap("mount", image, top / "mnt")
    server = json.loads(place.extsnap("info", "--json", image).out)["attached"]["pid"]
    before = _memory(server)
    ledger, always = _Ledger(), {"first", "second"}
    crowd = rng.random() < 0.3
    with Pauses() as pauses, _busy(place, top, mode, rng) as io:
        threads = []
        over = threading.Event()
        for index in range(CLIENTS):
            own = random.Random(rng.getrandbits(32))
            rude = RUDE[index // 3 % len(RUDE)] if index % 3 == 0 else None
            if rude is None:
                arguments: tuple[Any, ...] = (str(image), top, index, own, ledger, always)
                threads.append(threading.Thread(target=_proper, args=arguments))
            else:
                threads.append(threading.Thread(target=_rudely, args=(rude, image, own, over, ledger)))
        silent = _connect_many(image, _CROWD) if crowd else []
        for thread in threads:
            thread.start()
        memory = before
        deadline = time.monotonic() + 3 * ENDS_WITHIN
        proper = [thread for index, thread in enumerate(threads) if index % 3]
        while any(thread.is_alive() for thread in proper) and time.monotonic() < deadline:
            memory = max(memory, _memory(server))
            time.sleep(0.02)
        stuck = sum(thread.is_alive() for thread in proper)
        over.set()
        for thread in threads:
            thread.join(5)
        for connection in silent:
            connection.close()
    assert not stuck, f"{stuck} clients were not served within {3 * ENDS_WITHIN:.0f} s"
    assert not ledger.faults, "; ".join(ledger.faults[:5])
    assert ledger.answers >= CLIENTS, "hardly anything was asked"
    limit = ENDS_WITHIN + pauses.longest
    assert ledger.longest < limit, f"an answer took {ledger.longest:.1f} s"
    assert io.longest < STALL + pauses.longest, f"the volume stood still for {io.longest:.2f} s"
    assert io.count, "the volume was not used"
    assert memory - before < _GROWTH_BYTES, f"the server grew by {(memory - before) >> 20} MiB"
    _assert_all_there(place, top, image, mode, ledger, always)


def _assert_all_there(place: Place, top: Path, image: Path, mode: str, ledger: _Ledger, always: set[str]) -> None:
    expected = ledger.expected() | always
    listed = [entry["name"] for entry in json.loads(place.extsnap("list", "--json", image).out)["snapshots"]]
    assert sorted(listed) == sorted(expected), f"{sorted(listed)} are there, not {sorted(expected)}"
    assert set(os.listdir(top / "served" / "snapshots")) == expected
    for name in always:
        oracle.assert_view_is_copy(top / "served" / "snapshots" / name, place.shared[name])
    for name in sorted(expected - always)[:2]:
        oracle.assert_clean(top / "served" / "snapshots" / name)
    if mode == "mount":
        place.extsnap("umount", top / "mnt")
    place.extsnap("detach", image)
    oracle.assert_clean(image)
    checked = json.loads(place.extsnap("check", "--json", "--quick", image).out)
    assert checked["ok"], checked
    place.assert_nothing_left()


def _memory(process: int) -> int:
    """Bytes of memory that a process has."""
    fields = Path(f"/proc/{process}/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGESIZE")


@dataclass
class _Io:
    longest: float = 0.0
    count: int = 0


@contextlib.contextmanager
def _busy(place: Place, top: Path, mode: str, rng: random.Random) -> Iterator[_Io]:
    """Use the volume for the length of a ``with``."""
    seed, volume = str(rng.getrandbits(32)), str(top / "served" / "volume")
    runs = [row for row in _runs(place.shared["image"]) if row[2] >= 16]
    places = [f"{start * 4096},{count * 4096}" for _, start, count in runs]
    if mode == "read":
        copy = top / "volume.copy"
        shutil.copyfile(volume, copy)
        command = [_READER, volume, str(copy), seed, *places]
    elif mode == "write":
        command = [_WRITER, volume, seed, *places]
    else:
        command = [_MOUNTED, str(top / "mnt"), seed]
    process = subprocess.Popen(
        [sys.executable, "-c", *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    io = _Io()
    try:
        yield io
        out, err = process.communicate("", timeout=ENDS_WITHIN)
        assert process.returncode == 0, err
        longest, count = out.split()
        io.longest, io.count = float(longest), int(count)
    finally:
        process.kill()
        process.communicate()


# ---- clients that ask properly

_VERBS = (*("create",) * 3, *("delete",) * 2, *("list",) * 2, "show", "info", "dump", "check", "export")


def _proper(image: str, top: Path, index: int, rng: random.Random, ledger: _Ledger, always: set[str]) -> None:
    """Ask, and note what was answered."""
    mine: list[str] = []
    try:
        for number in range(_REQUESTS):
            began = time.monotonic()
            _ask(image, top, f"c{index}-{number}", rng, ledger, always, mine)
            with ledger.lock:
                ledger.longest = max(ledger.longest, time.monotonic() - began)
                ledger.answers += 1
    except Exception as error:
        with ledger.lock:
            ledger.faults.append(f"a client got {type(error).__name__}: {error}")


def _ask(
    image: str, top: Path, name: str, rng: random.Random, ledger: _Ledger, always: set[str], mine: list[str]
) -> None:
    verb = rng.choice(_VERBS)
    if verb == "check":
        report = checking.check(image, quick=True)
        assert report["store"]["ok"], report
        return
    with session.open_session(image, writable=verb in ("create", "delete")) as opened:
        assert opened.served is not None, "the server was not found"
        if verb == "create":
            shared = rng.random() < 0.25
            _create(opened, f"shared-{rng.randrange(3)}" if shared else name, ledger, mine, shared=shared)
        elif verb == "delete" and mine:
            _delete(opened, mine.pop(rng.randrange(len(mine))), ledger)
        elif verb == "show":
            assert opened.call("show", name="first")["name"] == "first"
        elif verb == "info":
            assert opened.call("info")["store"]["bytes"] > 0
        elif verb == "dump":
            assert len(opened.call("dump", what="records")["records"]) > 1000
        elif verb == "export":
            out = top / f"{name}.img"
            assert opened.call("export", name="first", out=str(out))["bytes"] == out.stat().st_size
            out.unlink()
        else:
            sent = time.monotonic()
            entries = opened.call("list")["snapshots"]
            ledger.check_list(entries, sent, time.monotonic(), always)


def _create(opened: session.Session, name: str, ledger: _Ledger, mine: list[str], *, shared: bool) -> None:
    """Take a snapshot, unless the volume is in use for longer than a little while; of two of one name one fails."""
    life = _Life(time.monotonic())
    with ledger.lock:
        ledger.lives.setdefault(name, []).append(life)
    for _ in range(20):
        try:
            opened.call("create", name=name)
        except VolumeBusy:  # somebody writes: refused, and nothing happened
            time.sleep(0.02)
            continue
        except SnapshotExists:
            assert shared, f"{name} is there already"
            break
        with ledger.lock:
            life.created = time.monotonic()
            if sum(bool(other.created and not other.delete_sent) for other in ledger.lives[name]) > 1:
                ledger.faults.append(f"{name} was created twice")
        mine.append(name)
        return
    with ledger.lock:
        ledger.lives[name].remove(life)


def _delete(opened: session.Session, name: str, ledger: _Ledger) -> None:
    with ledger.lock:
        life = next(one for one in ledger.lives[name] if one.created and not one.deleted)
        life.delete_sent = time.monotonic()
    opened.call("delete", names=[name])
    with ledger.lock:
        life.deleted = time.monotonic()


# ---- clients that do not


def _connect(image: str | Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(ENDS_WITHIN)
    connection.connect(os.fspath(control.socket_path(control.image_key(os.fspath(image)))))
    return connection


def _connect_many(image: Path, count: int) -> list[socket.socket]:
    """Connections that say nothing; those for which the server has no place wait in its queue, or fail."""
    found = []
    for _ in range(count):
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.setblocking(False)
        try:
            connection.connect(os.fspath(control.socket_path(control.image_key(os.fspath(image)))))
        except BlockingIOError:
            connection.close()
            break
        found.append(connection)
    return found


def _garbage(connection: socket.socket, rng: random.Random, over: threading.Event) -> None:
    """Nonsense, until the server hangs up."""
    kinds = (
        lambda: rng.randbytes(3000) + b"\n",
        lambda: b"[" * 100_000 + b"\n",
        lambda: b'{"verb": 7}\n',
        lambda: b'{"verb": "create", "args": [1]}\n',
        lambda: b"x" * (2 << 20),
        lambda: b'{"verb": "\\ud800", "args": {}}\n{"verb": "create", "args": {"name": "\\ud800"}}\n',
        lambda: b'{"verb": "delete", "args": {"names": [[1], {}]}}\nnonsense\n',
        lambda: b"\n" * 1000,
    )
    with contextlib.suppress(OSError):
        connection.sendall(rng.choice(kinds)())
        connection.settimeout(1)
        while connection.recv(65536):
            pass


def _half(connection: socket.socket, rng: random.Random, over: threading.Event) -> None:
    """The first half of a request, and no more."""
    connection.sendall(b'{"verb": "list", "ar')
    over.wait(ENDS_WITHIN)


def _half_and_gone(connection: socket.socket, rng: random.Random, over: threading.Event) -> None:
    """The same, hanging up."""
    connection.sendall(b'{"verb": "create", "args": {"name": "never"}}'[: rng.randrange(1, 40)])


def _gone_early(connection: socket.socket, rng: random.Random, over: threading.Event) -> None:
    """A question, and nobody there for the answer."""
    connection.sendall(rng.choice((b'{"verb": "dump", "args": {"what": "records"}}\n', b'{"verb": "list"}\n' * 50)))


def _slow(connection: socket.socket, rng: random.Random, over: threading.Event) -> None:
    """A large answer, read a little at a time, and whole in the end."""
    connection.sendall(b'{"verb": "dump", "args": {"what": "records"}}\n')
    answer = bytearray()
    while not answer.endswith(b"\n"):
        piece = connection.recv(4096 if not over.is_set() else 1 << 20)
        if not piece:
            raise AssertionError(f"the server hung up after {len(answer)} bytes of a large answer")
        answer += piece
        over.wait(0.005)
    assert json.loads(answer)["ok"] is True


def _never_reads(connection: socket.socket, rng: random.Random, over: threading.Event) -> None:
    """One question after the other, without ever taking an answer."""
    connection.settimeout(0.05)
    question = b'{"verb": "dump", "args": {"what": "records"}}\n' * 400
    while not over.is_set():
        try:
            connection.sendall(question)
        except OSError:
            over.wait(0.05)


def _never_asks(connection: socket.socket, rng: random.Random, over: threading.Event) -> None:
    """Nothing at all."""
    over.wait(ENDS_WITHIN)


RUDE: tuple[Callable[[socket.socket, random.Random, threading.Event], None], ...] = (
    _garbage,
    _never_reads,
    _half,
    _slow,
    _half_and_gone,
    _gone_early,
    _never_asks,
    _garbage,
)


def _rudely(
    behaves: Callable[[socket.socket, random.Random, threading.Event], None],
    image: Path,
    rng: random.Random,
    over: threading.Event,
    ledger: _Ledger,
) -> None:
    times = 5 if behaves in (_garbage, _half_and_gone, _gone_early) else 1
    for _ in range(times):
        try:
            with _connect(image) as connection:
                behaves(connection, rng, over)
        except AssertionError as error:
            with ledger.lock:
                ledger.faults.append(str(error))
        except OSError:
            pass  # hung up on, as is right
