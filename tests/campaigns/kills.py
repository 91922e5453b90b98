"""The campaign of kills: servers and commands that are killed at any moment.

Parts ``server-KIND``: SIGKILL of the server of a volume that the kernel has mounted and two programs write to, at a
random moment, also of a mount that is just being made.  Whoever uses the mount gets errors and ends; ``detach`` names
the mounts, ``detach --force`` takes all of it away, and nothing of the volume next to it; the next command recovers the
volume, every snapshot is exact, and what was fsynced is there.

Parts ``client-KIND``: SIGKILL, SIGTERM or Ctrl-C of a command on an image at rest or served, at a random moment.  The
next command works at once, the command happened or did not, and nothing of it stays: no process, mount, file.

On ext2 the programs never remove a file: a block that is used again may stand in what e2fsck finds of a file that is
gone, and e2fsck then writes to it; no fsync helps against that, on a disk either.

Part ``signals``: SIGTERM and Ctrl-C end servers of every kind; all that was written is there, without a mark.

A token is ``PART:NUMBER``; the number is the seed of all that the case chooses.  When the signal meets which
instruction is up to the scheduler: a replay does the same things with the same delays.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import oracle

from campaigns.kills_place import AT_ONCE, LOADS, PROGRAM, Bystander, Done, Place, alive, finished, place, until
from campaigns.report import Campaign, Report

KINDS = ("ext2", "ext3", "ext4")
PARTS = (*(f"server-{kind}" for kind in KINDS), *(f"client-{kind}" for kind in KINDS), "signals")

_STAND_INSIDE = "import os, sys, time; os.chdir(sys.argv[1]); print('inside', flush=True); time.sleep(600)"

#: Cases of a part below which clients get half of them.
FEW = 10


def run(report: Report, part: str, cases: int, rng: random.Random) -> None:
    """Try cases of one part."""
    if part.startswith("client") and cases < FEW:
        cases = -(-cases // 2)  # a test of all parts shall be quick, and servers are what matters most
    with _prepared(part, rng.getrandbits(32)) as (found, bystander):
        for _ in range(cases):
            _case(report, part, rng.getrandbits(32), found, bystander)


def replay(report: Report, token: str) -> None:
    """Try one case again; its image has the snapshots of another seed, which is nothing it depends on."""
    part, _, number = token.partition(":")
    with _prepared(part, 0) as (found, bystander):
        _case(report, part, int(number), found, bystander)


@contextlib.contextmanager
def _prepared(part: str, seed: int) -> Iterator[tuple[Place, Bystander]]:
    rng = random.Random(seed)
    kind = part.partition("-")[2] or rng.choice(KINDS[1:])
    with place() as found:
        found.prepare(kind, rng.choice((1024, 4096)), rng)
        bystander = Bystander(found.top)
        try:
            yield found, bystander
        finally:
            bystander.end()


def _case(report: Report, part: str, number: int, found: Place, bystander: Bystander) -> None:
    rng = random.Random(number)
    what = part.partition("-")[0]
    choose: dict[str, tuple[tuple[str, Callable[[Place, random.Random], None]], ...]] = {
        "server": (("server under load", _server_under_load),) * 5
        + (("server while mounting", _server_while_mounting),),
        "client": tuple((f"client {name}", command) for name, command in CLIENTS.items()),
        "signals": tuple((f"signal {name}", case) for name, case in SIGNALS.items()),
    }
    name, case = rng.choice(choose[what])
    with report.case(f"{part}:{number}", name), found.case():
        case(found, rng)
        found.assert_nothing_left()
        bystander.assert_untouched()


# ---- a server is killed


def _server_under_load(at: Place, rng: random.Random) -> None:
    attached = rng.random() < 0.4
    if attached:
        at.extsnap("attach", at.image, at.served)
        loop = at.command("losetup", "--find", "--show", at.served / "volume").out.strip()
        at.command("mount", loop, at.mount)
    else:
        at.extsnap("mount", at.image, at.mount)
    with_snapshot = rng.random() < 0.4
    if with_snapshot:
        at.extsnap("mount", "--snapshot", "one", at.image, at.second)
    server = at.server()
    loads = [at.load(name, rng.getrandbits(32)) for name in LOADS]
    inside = None
    if rng.random() < 0.3:
        inside = at.start(sys.executable, "-c", _STAND_INSIDE, at.mount)
        assert inside.stdout is not None
        assert inside.stdout.readline() == "inside\n"
    wanted = rng.choice((2, 20, 200, 600))
    until(lambda: at.lines() >= wanted, "the loads do not get on", pids=[server, *(load.pid for load in loads)])
    export = at.start(PROGRAM, "export", at.image, "two", at.top / "out/two") if rng.random() < 0.3 else None
    time.sleep(rng.random() * 0.6)
    assert all(load.poll() is None for load in loads), "a load ended before the kill"
    os.kill(server, signal.SIGKILL)

    for load in loads:
        done = finished(load)
        assert done.status == 0, str(done)
    if export is not None:
        done = finished(export)
        _assert_whole_or_absent(at, "two", done.status)
    for words in (("ls", "-la", at.mount), ("stat", at.mount), ("sync", "-f", at.mount), ("stat", "-f", at.mount)):
        at.command(*words, status=None)
    _clear(at, rng, attached, inside)
    at.assert_marked()
    at.recover()
    at.assert_exact()
    at.assert_fsynced_is_there()


def _clear(at: Place, rng: random.Random, attached: bool, inside: subprocess.Popen[str] | None) -> None:
    """Take away what the killed server left, in one of the ways that a user has."""
    targets = [at.image, at.mount, *([at.served] if attached else [])]
    before = sorted(at.mounts())
    refused = at.extsnap("detach", rng.choice(targets), status=1)
    assert "extsnap detach --force" in refused.err, str(refused)
    assert str(at.mount) in refused.err, str(refused)
    assert sorted(at.mounts()) == before, "a refused detach took mounts away"
    if rng.random() < 0.3:  # a command that reads changes nothing of that, nor does one that recovers
        at.extsnap("list", at.image)
        assert sorted(at.mounts()) == before, "list took mounts away"
    if rng.random() < 0.2 and inside is None and not attached:
        for point in (at.mount, at.second):
            if os.path.ismount(point):
                done = at.extsnap("umount", point, status=1)
                assert "had ended before the unmount" in done.err, str(done)
        return
    target = rng.choice(targets)
    if target == at.image and rng.random() < 0.3:
        at.image.rename(at.top / "elsewhere.img")
        try:
            done = at.extsnap("detach", "--force", target)
        finally:
            (at.top / "elsewhere.img").rename(at.image)
    else:
        done = at.extsnap("detach", "--force", target)
    assert not at.mounts(), f"{done}still mounted: {at.mounts()}"
    for gone in before:
        assert gone in done.err, f"it does not say that it unmounted {gone}: {done}"
    if inside is not None:
        assert str(inside.pid) in done.err, f"it does not name who stood in the mount: {done}"
        inside.kill()
        finished(inside)
    # One that is still in use goes with its last user.
    until(lambda: not at.loops(), f"a loop device is left: {at.loops()}", AT_ONCE)


def _server_while_mounting(at: Place, rng: random.Random) -> None:
    """The server ends somewhere between its start and the end of the mount command."""
    command = at.start(PROGRAM, "mount", at.image, at.mount)
    until(lambda: at.servers() or command.poll() is not None, "no server starts", pids=[command.pid])
    time.sleep(rng.random() * 0.15)
    for server in at.servers():
        os.kill(server, signal.SIGKILL)
    done = finished(command)
    assert "Traceback" not in done.err, str(done)
    if os.path.ismount(at.mount):
        at.command("ls", at.mount, status=None)
        forced = at.extsnap("detach", "--force", rng.choice((at.image, at.mount)))
        assert not at.mounts(), f"{forced}still mounted: {at.mounts()}"
    at.recover()  # sweeps as well
    at.assert_exact()


# ---- a client is killed


def _client(command: Callable[[Place], list[str]], check: Callable[[Place, int], None]) -> Callable[..., None]:
    """A case: kill the command somewhere between its start and its end; then ``check(place, its status)``."""

    def case(at: Place, rng: random.Random) -> None:
        attached = rng.random() < 0.4
        if attached:
            at.extsnap("attach", at.image, at.served)
        words = command(at)
        process = at.start(PROGRAM, *words)
        # Half of the time is the start of Python: a third of the cases are given to it.
        time.sleep(rng.uniform(0, 0.25) if rng.random() < 0.3 else rng.uniform(0.15, 0.9))
        number = rng.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT))
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)
        done = finished(process)
        _assert_no_traceback(done)
        _settle(at, attached)
        # The next command works at once.
        at.extsnap("list", at.image, seconds=AT_ONCE)
        check(at, done.status)
        at.extsnap("create", at.image, "next", seconds=AT_ONCE)
        if attached:
            at.extsnap("detach", at.served)
        at.assert_at_rest()
        names = at.names()
        assert names[-1] == "next", names
        at.assert_exact([name for name in ("one", "two") if name in names])
        at.extsnap("run", at.image, "--", "true")  # a new server sweeps what is left in the runtime directory

    return case


def _assert_no_traceback(done: Done) -> None:
    """Ctrl-C before the program's own first line is Python's to report."""
    assert "Traceback" not in done.err or "in main" not in done.err, str(done)


def _settle(at: Place, attached: bool) -> None:
    """What the command had started ends by itself; a mount that was made all the same is unmounted."""

    def quiet() -> bool:
        running = [pid for pid, where in at.servers().items() if where != at.served]
        return not running or os.path.ismount(at.mount)

    until(quiet, f"what a killed command started does not end: {at.left()}", AT_ONCE, list(at.servers()))
    if os.path.ismount(at.mount):
        at.extsnap("umount", at.mount)


def _check_create(at: Place, status: int) -> None:
    names = at.names()
    assert names in (["one", "two"], ["one", "two", "three"]), names
    assert status or names[-1] == "three", f"create ended with 0, and there is {names}"


def _check_delete(at: Place, status: int) -> None:
    names = at.names()
    assert names in (["one", "two"], ["two"]), names
    assert status or names == ["two"], f"delete ended with 0, and there is {names}"


def _old_files(at: Place) -> set[str]:
    """The files that tell the moments apart, by debugfs."""
    path = at.top / "out/base"
    at.extsnap("run", at.image, "--", "cp", "--sparse=always", "{}", path)
    listed = oracle.debugfs(path, "ls -l /")[0]
    path.unlink()
    return {word for word in listed.split() if word.startswith("old-")}


def _check_restore(at: Place, status: int) -> None:
    every = {f"old-{number}" for number in range(6)}
    files, names = _old_files(at), at.names()
    assert names[:2] == ["one", "two"], names
    assert len(names) <= 3, names
    assert files in (every, every - {"old-1", "old-2"}), f"neither restored nor as it was: {sorted(files)}"
    if files == every:
        assert len(names) == 3, f"restored without the safety snapshot: {names}"
        at.extsnap("restore", at.image, "--undo")
        assert _old_files(at) == every - {"old-1", "old-2"}, "the safety snapshot is not what was there"
    assert status or files == every, "restore ended with 0, and nothing was restored"


def _assert_whole_or_absent(at: Place, name: str, status: int) -> None:
    assert at.prepared is not None
    left = sorted(path.name for path in (at.top / "out").iterdir())
    assert left in ([], [name]), f"an export left {left}"
    assert status or left, "export ended with 0, and there is nothing"
    if left:
        assert oracle.sha256(at.top / "out" / name) == at.prepared.exports[name], (
            "an export under its name is not whole"
        )
        (at.top / "out" / name).unlink()


def _check_run(at: Place, status: int) -> None:
    files = _old_files(at)
    assert files in ({"old-0", "old-3", "old-4", "old-5"}, {"old-0", "old-4", "old-5"}), files
    assert status or "old-3" not in files, "run ended with 0, and its command did nothing"


def _umounted(at: Place, rng: random.Random) -> None:
    """``umount`` is killed: it happened, or the mount is there and works."""
    at.extsnap("mount", at.image, at.mount)
    (at.mount / "written").write_bytes(b"before")
    process = at.start(PROGRAM, "umount", at.mount)
    time.sleep(rng.uniform(0.1, 0.7))
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, rng.choice((signal.SIGKILL, signal.SIGTERM, signal.SIGINT)))
    done = finished(process)
    _assert_no_traceback(done)
    if os.path.ismount(at.mount) and at.command("test", "-e", at.mount / "written", status=None).status == 0:
        # Its umount(8) may still be at it.
        at.extsnap("umount", at.mount, status=None)
    until(lambda: not (at.mounts() or at.servers()), f"it stays: {at.left()}", AT_ONCE, list(at.servers()))
    at.extsnap("create", at.image, "next", seconds=AT_ONCE)
    at.assert_at_rest()
    at.assert_exact()
    at.extsnap("run", at.image, "--", "true")
    with oracle.mounted(at.image) as directory:
        assert (directory / "written").read_bytes() == b"before"


def _nothing(at: Place, status: int) -> None:
    """Nothing but what is checked after every command."""


CLIENTS: dict[str, Callable[..., None]] = {
    "create": _client(lambda at: ["create", str(at.image), "three"], _check_create),
    "delete": _client(lambda at: ["delete", str(at.image), "one"], _check_delete),
    "restore": _client(lambda at: ["restore", str(at.image), "one"], _check_restore),
    "export": _client(
        lambda at: ["export", str(at.image), "two", str(at.top / "out/two")],
        lambda at, status: _assert_whole_or_absent(at, "two", status),
    ),
    "run": _client(lambda at: ["run", str(at.image), "--", "debugfs", "-w", "-R", "rm /old-3", "{}"], _check_run),
    "mount": _client(lambda at: ["mount", str(at.image), str(at.mount)], _nothing),
    "umount": _umounted,
    "check": _client(lambda at: ["check", str(at.image)], _nothing),
}


# ---- signals end servers


def _written(at: Place, rng: random.Random) -> None:
    """Write for a while through the mount; the loads end by themselves."""
    for load in [at.load(name, rng.getrandbits(32), rng.uniform(0.2, 0.6)) for name in LOADS]:
        done = finished(load)
        assert done.status == 0, str(done)


def _ended_cleanly(at: Place, pid: int) -> None:
    until(lambda: not alive(pid), "the server does not end after the signal", AT_ONCE, [pid])
    at.assert_at_rest()
    at.assert_exact()


def _signal_attach(at: Place, rng: random.Random) -> None:
    """A served directory that nobody uses any more: it ends at once, with all that was written."""
    at.extsnap("attach", at.image, at.served)
    at.command("mount", "-o", "loop", at.served / "volume", at.mount)
    _written(at, rng)
    at.command("umount", at.mount)
    at.command("debugfs", "-w", "-R", "rm /old-3", at.served / "volume")
    server = at.server()
    os.kill(server, rng.choice((signal.SIGTERM, signal.SIGINT, signal.SIGHUP)))
    _ended_cleanly(at, server)
    at.assert_fsynced_is_there()
    with oracle.mounted(at.image) as directory:
        assert not (directory / "old-3").exists()


def _signal_open(at: Place, rng: random.Random) -> None:
    """With a file open, the server waits for its close, and what is written meanwhile is there."""
    at.extsnap("attach", at.image, at.served)
    server = at.server()
    offset = (39 << 20) + rng.randrange(1000) * 512
    with (at.served / "volume").open("r+b", buffering=0) as file:
        os.kill(server, signal.SIGTERM)
        content = os.pread(file.fileno(), 512, offset)
        os.pwrite(file.fileno(), content, offset)
        assert alive(server), "it ends although a file is open"
    _ended_cleanly(at, server)


def _signal_foreground(at: Place, rng: random.Random) -> None:
    """Ctrl-C of ``attach --foreground``: waits for the mount on top, then status 0."""
    process = at.start(PROGRAM, "attach", "--foreground", at.image, at.served)
    until(
        lambda: (at.served / "volume").exists() or process.poll() is not None, "it does not serve", pids=[process.pid]
    )
    at.command("mount", "-o", "loop", at.served / "volume", at.mount)
    _written(at, rng)
    if rng.random() < 0.5:
        os.kill(process.pid, signal.SIGINT)
        at.command("ls", at.mount)
        at.command("umount", at.mount)
    else:
        at.command("umount", at.mount)
        os.kill(process.pid, rng.choice((signal.SIGINT, signal.SIGTERM)))
    done = finished(process, AT_ONCE)
    assert done.status == 0, str(done)
    at.assert_at_rest()
    at.assert_exact()
    at.assert_fsynced_is_there()


def _signal_mount(at: Place, rng: random.Random) -> None:
    """The server of a mount waits for the end of the mount: writes go on, and all of them are there."""
    at.extsnap("mount", at.image, at.mount)
    server = at.server()
    loads = [at.load(name, rng.getrandbits(32), 0.8) for name in LOADS]
    until(lambda: at.lines() > 20, "the loads do not get on", pids=[server])
    os.kill(server, rng.choice((signal.SIGTERM, signal.SIGINT)))
    for load in loads:
        finished(load)
    assert alive(server), "it ended under a mount"
    at.extsnap("umount", at.mount)
    _ended_cleanly(at, server)
    at.assert_fsynced_is_there()


def _signal_twice(at: Place, rng: random.Random) -> None:
    """A second signal ends the server at once: for the mount that is like a kill, and cleared like one."""
    at.extsnap("mount", at.image, at.mount)
    server = at.server()
    loads = [at.load(name, rng.getrandbits(32)) for name in LOADS]
    until(lambda: at.lines() > 20, "the loads do not get on", pids=[server])
    os.kill(server, signal.SIGTERM)
    time.sleep(0.05)
    os.kill(server, signal.SIGTERM)
    until(lambda: not alive(server), "the server does not end after two signals", AT_ONCE, [server])
    for load in loads:
        finished(load)
    done = at.extsnap("detach", "--force", rng.choice((at.image, at.mount)))
    assert str(at.mount) in done.err, str(done)
    at.recover()
    at.assert_exact()
    at.assert_fsynced_is_there()


def _signal_forced(at: Place, rng: random.Random) -> None:
    """``detach --force`` of a server that lives: what is mounted is unmounted first, and nothing is lost."""
    attached = rng.random() < 0.5
    if attached:
        at.extsnap("attach", at.image, at.served)
        at.command("mount", "-o", "loop", at.served / "volume", at.mount)
    else:
        at.extsnap("mount", at.image, at.mount)
    server = at.server()
    _written(at, rng)
    refused = at.extsnap("detach", at.image, status=1)
    assert str(at.mount) in refused.err, str(refused)
    assert "extsnap detach --force" in refused.err, str(refused)
    done = at.extsnap("detach", "--force", rng.choice((at.image, at.mount)))
    assert str(at.mount) in done.err, str(done)
    _ended_cleanly(at, server)
    at.assert_fsynced_is_there()


def _signal_run(at: Place, rng: random.Random) -> None:
    """A signal of ``run`` reaches its command, and the volume is closed cleanly after that."""
    ready = at.top / "out/ready"
    script = f"debugfs -w -R 'rm /old-3' {{}} && touch {ready} && exec sleep 600"
    process = at.start(PROGRAM, "run", at.image, "--", "sh", "-c", script)
    until(lambda: ready.exists() or process.poll() is not None, "the command does not get on", pids=[process.pid])
    if rng.random() < 0.5:
        os.kill(process.pid, signal.SIGTERM)
    else:
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    done = finished(process, AT_ONCE)
    assert done.status in (130, 143), str(done)
    at.assert_at_rest()
    at.assert_exact()
    with oracle.mounted(at.image) as directory:
        assert not (directory / "old-3").exists()


SIGNALS: dict[str, Callable[[Place, random.Random], None]] = {
    "attach": _signal_attach,
    "open": _signal_open,
    "foreground": _signal_foreground,
    "mount": _signal_mount,
    "twice": _signal_twice,
    "forced": _signal_forced,
    "run": _signal_run,
}


CAMPAIGN = Campaign(
    name="kills",
    title="servers and commands that are killed at any moment, and signals that end them",
    parts=PARTS,
    short=28,
    long=469,
    run=run,
    replay=replay,
    needs_root=True,
)
