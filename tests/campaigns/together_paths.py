"""Two commands at the same moment on one image, each by a path of its own.

Each ends in time.  It succeeds, or is refused with status 1 and one line that names who has the image.  There is an
order of the two in which every success was possible, every other failure is what the command says of such a volume,
and the snapshots, the files and their content are afterwards what that order makes of them: what succeeded happened
once.  Snapshots are exact, ``extsnap check`` and e2fsck find nothing, and nothing is left.

Paths: the same, a relative one, a symbolic and a hard link, a bind mount, ``/proc/PID/fd/N``, a loop device; for a
volume in a partition all of these with ``-P``, the partition's node, and a loop device that begins where it does.
One of the two commands, or the server that they find, is stopped and continued at times, so that they meet where they
would not by themselves.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import permutations
from pathlib import Path

import disks
import hosts
import oracle
from arena import make_volume

import extsnap
from campaigns.report import Report
from campaigns.together_place import Ended, Place

_KINDS = {"ext2": "ext2", "ext3": "ext3", "ext4": "ext4"}
_MEBIBYTES = 16
_START = 2 * disks.MIB
_NUMBER = 2
_DATA_BYTES = 200_000
# What a refusal must have in it: a process, a device, or where it is served or mounted.
_NAMES_WHO = re.compile(r"\bprocess \d+|\bpid \d+|/dev/loop\d+|\b(?:at|on) /\S+")


# ---- what each command does to a volume, in words


@dataclass(frozen=True)
class State:
    """A volume as the commands see it.

    Attributes:
        snapshots: What each snapshot shows, by name: (letter of the data, files added).
        base: The same of the base volume.
        store: Whether there is one.
        served: It is served until somebody ends that.
        mounted: The kernel has it.
    """

    snapshots: dict[str, tuple[str, frozenset[str]]] = field(default_factory=dict)
    base: tuple[str, frozenset[str]] = ("C", frozenset())
    store: bool = True
    served: bool = False
    mounted: bool = False


Effect = Callable[[State, int], State | None]


def _same(state: State, number: int) -> State | None:
    return state


def _create(state: State, number: int) -> State | None:
    return replace(state, snapshots={**state.snapshots, f"new{number}": state.base}, store=True)


def _create_same(state: State, number: int) -> State | None:
    return None if "new" in state.snapshots else _created(state, "new")


def _created(state: State, name: str) -> State:
    return replace(state, snapshots={**state.snapshots, name: state.base}, store=True)


def _delete(state: State, number: int) -> State | None:
    if "one" not in state.snapshots:
        return None
    return replace(state, snapshots={name: shown for name, shown in state.snapshots.items() if name != "one"})


def _restore(state: State, number: int) -> State | None:
    if "two" not in state.snapshots or state.mounted:
        return None
    return replace(_created(state, "before-restore-two"), base=state.snapshots["two"])


def _restore_unsafely(state: State, number: int) -> State | None:
    if "two" not in state.snapshots or state.mounted:
        return None
    return replace(state, base=state.snapshots["two"])


def _needs_two(state: State, number: int) -> State | None:
    return state if "two" in state.snapshots else None


def _needs_store(state: State, number: int) -> State | None:
    return state if state.store else None


def _attach(state: State, number: int) -> State | None:
    return None if state.served or state.mounted else replace(state, served=True, store=True)


def _mount(state: State, number: int) -> State | None:
    return replace(state, mounted=True)


def _run_writing(state: State, number: int) -> State | None:
    letter, files = state.base
    return None if state.mounted else replace(state, base=(letter, files | {f"added{number}"}))


def _strip(state: State, number: int) -> State | None:
    return None if state.mounted else replace(state, snapshots={}, store=False)


def _detach(state: State, number: int) -> State | None:
    return replace(state, served=False) if state.served and not state.mounted else None


@dataclass(frozen=True)
class Command:
    """One command: its words, where ``IMAGE`` stands for the path and ``TOP`` for the case's directory.

    Attributes:
        effect: What it makes of a volume; None where it has to fail.
        writes: It writes to the volume like one who thinks it is his alone: not beside a mount, nor twice.
    """

    words: tuple[str, ...]
    effect: Effect
    writes: bool = False


COMMANDS: dict[str, Command] = {
    "create": Command(("create", "IMAGE", "newNUMBER"), _create),
    "create-same": Command(("create", "IMAGE", "new"), _create_same),
    "delete": Command(("delete", "IMAGE", "one"), _delete),
    "restore": Command(("restore", "IMAGE", "two"), _restore),
    "restore-unsafely": Command(("restore", "--no-safety", "IMAGE", "two"), _restore_unsafely),
    "export": Command(("export", "IMAGE", "two", "TOP/out.img"), _needs_two),
    "check": Command(("check", "--json", "IMAGE"), _same),
    "list": Command(("list", "--json", "IMAGE"), _same),
    "info": Command(("info", "--json", "IMAGE"), _same),
    "show": Command(("show", "--json", "IMAGE", "two"), _needs_two),
    "dump": Command(("dump", "--json", "IMAGE", "records"), _needs_store),
    "attach": Command(("attach", "IMAGE", "TOP/servedNUMBER"), _attach),
    "mount": Command(("mount", "IMAGE", "TOP/mntNUMBER"), _mount),
    "run": Command(("run", "IMAGE", "--", "debugfs", "-R", "stat /data", "{}"), _same),
    "run-writing": Command(
        ("run", "IMAGE", "--", "debugfs", "-w", "-R", "write TOP/small addedNUMBER", "{}"), _run_writing, writes=True
    ),
    "strip": Command(("strip", "IMAGE"), _strip),
    "detach": Command(("detach", "IMAGE"), _detach),
}
_FIRST_CREATES = ("create", "create-same")


# ---- images and paths


def _letter(letter: str) -> bytes:
    return random.Random(f"together {letter}").randbytes(_DATA_BYTES)


def _letter_of(content: bytes) -> str:
    return next((letter for letter in "ABC" if content == _letter(letter)), hashlib.sha256(content).hexdigest())


def prepare(place: Place) -> None:
    """Make an image of each kind, with two snapshots and without, and whole copies of the moments."""
    for name, kind in _KINDS.items():
        image = make_volume(place.top / f"{name}.img", kind, _MEBIBYTES, "-b", "1024", files={"data": _letter("A")})
        place.shared[f"{name} plain"] = oracle.copy_image(image, place.top / f"{name}.plain")
        for snapshot, following in (("one", "B"), ("two", "C")):
            place.extsnap("create", image, snapshot)
            place.shared[f"{name} {snapshot}"] = oracle.copy_image(image, place.top / f"{name}.{snapshot}")
            script = place.top / "rewrite.py"
            script.write_text(
                "import os, sys\nf = os.open(sys.argv[1], os.O_RDWR)\ndata = open(sys.argv[2], 'rb').read()\n"
                "for part in sys.argv[3:]:\n    to, at, count = map(int, part.split(','))\n"
                "    os.pwrite(f, data[at : at + count], to)\n"
            )
            (place.top / "letter").write_bytes(_letter(following))
            runs = oracle.file_blocks(image, "/data").data.tolist()
            parts = [
                f"{physical * 1024},{logical * 1024},{min(count * 1024, _DATA_BYTES - logical * 1024)}"
                for logical, physical, count in runs
            ]
            place.extsnap("run", image, "--", sys.executable, script, "{}", place.top / "letter", *parts)
        place.shared[f"{name} full"] = image


@dataclass
class _Image:
    """The image of a case.

    Attributes:
        path: Of the file.
        partition: Number of the partition, if it is a disk.
        ways: How it is spelled, by what kind of a path: the words that stand for IMAGE.
    """

    path: Path
    partition: int | None
    ways: dict[str, tuple[str, ...]]


@contextlib.contextmanager
def _image(place: Place, top: Path, template: Path, on_disk: bool, wanted: tuple[str, str]) -> Iterator[_Image]:
    """An image with the two paths that are wanted."""
    path = top / "disk.img"
    if on_disk:
        size = (_MEBIBYTES + 8) * disks.MIB
        disks.make(path, size, disks.gpt(size, [(_NUMBER, _START, _MEBIBYTES * disks.MIB)]))
        with path.open("r+b") as file, template.open("rb") as source:
            file.seek(_START)
            shutil.copyfileobj(source, file)
    else:
        oracle.copy_image(template, path)
    by_number = ("-P", str(_NUMBER)) if on_disk else ()
    (top / "link.img").symlink_to("disk.img")
    os.link(path, top / "hard.img")
    ways: dict[str, tuple[str, ...]] = {
        "same": (str(path), *by_number),
        "relative": (os.path.relpath(path, place.top), *by_number),
        "symbolic": (str(top / "link.img"), *by_number),
        "hard": (str(top / "hard.img"), *by_number),
    }
    with contextlib.ExitStack() as stack:
        if "bind" in wanted:
            (top / "bind").mkdir()
            hosts.sh("mount", "--bind", top, top / "bind")
            stack.callback(hosts.sh, "umount", top / "bind")
            ways["bind"] = (str(top / "bind" / "disk.img"), *by_number)
        if "descriptor" in wanted:
            descriptor = os.open(path, os.O_RDWR)
            stack.callback(os.close, descriptor)
            ways["descriptor"] = (f"/proc/{os.getpid()}/fd/{descriptor}", *by_number)
        if {"loop", "node"} & set(wanted):
            device = stack.enter_context(hosts.loop(path))
            ways["loop"] = (device, *by_number)
            if "node" in wanted:
                length = _MEBIBYTES * disks.MIB
                node = stack.enter_context(hosts.partition_node(device, _NUMBER, _START, length))
                ways["node"] = (node,)
        if "offset" in wanted:
            options = ("--offset", str(_START), "--sizelimit", str(_MEBIBYTES * disks.MIB))
            ways["offset"] = (stack.enter_context(hosts.loop(path, *options)),)
        yield _Image(path, _NUMBER if on_disk else None, ways)


_WAYS = ("same", "same", "relative", "symbolic", "hard", "bind", "descriptor", "loop")
_WAYS_ON_DISK = (*_WAYS, "node", "node", "offset")


# ---- a case


def case(report: Report, token: str, number: int, place: Place) -> None:
    """Try one."""
    rng = random.Random(number)
    kind = rng.choice(sorted(_KINDS))
    on_disk = rng.random() < 0.35
    before = rng.choice(("rest", "rest", "rest", "plain", "attached", "mounted"))
    ways = (rng.choice(_WAYS_ON_DISK if on_disk else _WAYS), rng.choice(_WAYS_ON_DISK if on_disk else _WAYS))
    names = _two_commands(rng, before)
    top = place.top / f"case-{number}"
    with report.case(token, " & ".join(sorted(names)) if before == "rest" else f"{before} volume"):
        top.mkdir()
        try:
            with place.here(), _image(place, top, place.shared[f"{kind} {_template(before)}"], on_disk, ways) as image:
                _try(place, top, image, kind, before, ways, names, rng)
        except BaseException as error:
            error.add_note(f"{before} {kind}: {names[0]} by {ways[0]}, {names[1]} by {ways[1]}")
            place.clear()
            if isinstance(error, AssertionError):
                raise AssertionError(f"{error}\n  {error.__notes__[-1]}") from error
            raise
        finally:
            shutil.rmtree(top, ignore_errors=True)


def _template(before: str) -> str:
    return "plain" if before == "plain" else "full"


def _two_commands(rng: random.Random, before: str) -> tuple[str, str]:
    while True:
        first, second = rng.choice(sorted(COMMANDS)), rng.choice(sorted(COMMANDS))
        if before == "plain" and rng.random() < 0.7:
            first, second = rng.choice(_FIRST_CREATES), rng.choice((*_FIRST_CREATES, "attach", "list"))
        writing = COMMANDS[first].writes + COMMANDS[second].writes
        if writing < 2 and not (writing and (before == "mounted" or "mount" in (first, second))):
            return first, second


def _try(
    place: Place,
    top: Path,
    image: _Image,
    kind: str,
    before: str,
    ways: tuple[str, str],
    names: tuple[str, str],
    rng: random.Random,
) -> None:
    (top / "small").write_bytes(b"small")
    for number in range(3):
        (top / f"served{number}").mkdir()
        (top / f"mnt{number}").mkdir()
    own_mounts, own_loops = place.mounts(), place.loops()
    snapshots = {} if before == "plain" else {"one": ("A", frozenset[str]()), "two": ("B", frozenset[str]())}
    start = State(snapshots, ("A" if before == "plain" else "C", frozenset()), store=before != "plain")
    spelled = ["-P", str(image.partition)] if image.partition else []
    if before in ("attached", "mounted"):
        if own_loops:  # a loop device over it is in the way of serving it: by that device, then
            spelled = list(image.ways[next(way for way in ways if way in ("loop", "node", "offset"))][1:])
            path = image.ways[next(way for way in ways if way in ("loop", "node", "offset"))][0]
        else:
            path = str(image.path)
        if len(own_loops) > 1:
            return  # each is in the other's way: nothing can be served
        verb, directory = ("attach", "served0") if before == "attached" else ("mount", "mnt0")
        place.extsnap(verb, path, *spelled, top / directory)
        start = replace(start, served=before == "attached", mounted=before == "mounted")
    ended = _both(place, top, [image.ways[way] for way in ways], names, rng)
    _end_all(place, top)
    after = _find(place, image)
    _judge(start, names, ended, after)
    for name, letter in (("one", "A"), ("two", "B")):
        if name in after.snapshots:
            assert after.snapshots[name] == (letter, frozenset())
    _assert_exact(place, top, image, kind, after)
    place.assert_nothing_left(mounts=own_mounts, loops=own_loops)


def _both(
    place: Place, top: Path, paths: list[tuple[str, ...]], names: tuple[str, str], rng: random.Random
) -> list[Ended]:
    """Run both commands; at times one of them, or a server, stands still for a while."""
    started = []
    try:
        for number, (name, path) in enumerate(zip(names, paths, strict=True), 1):
            words: list[str] = []
            for word in COMMANDS[name].words:
                filled = word.replace("NUMBER", str(number)).replace("TOP", str(top))
                words += path if word == "IMAGE" else [filled]
            started.append(place.start(*words))
        for command in started:
            command.ready()
        spread = rng.choice((0.0, 0.01, 0.05, 0.3))
        for command in started:
            command.go(rng.uniform(0, spread))
        if rng.random() < 0.6:
            time.sleep(rng.uniform(0, rng.choice((0.02, 0.1, 0.4))))
            others = [pid for pid in place.servers() if pid not in [one.process.pid for one in started]]
            whom = rng.choice((started[0].process.pid, started[1].process.pid, *others[:1]))
            with contextlib.suppress(ProcessLookupError):
                os.kill(whom, signal.SIGSTOP)
                time.sleep(rng.uniform(0.05, 0.8))
                os.kill(whom, signal.SIGCONT)
        return [command.end() for command in started]
    finally:
        for command in started:
            command.kill()


def _end_all(place: Place, top: Path) -> None:
    """Unmount and detach whatever the case has mounted and attached."""
    for number in range(3):
        if os.path.ismount(top / f"mnt{number}"):
            place.extsnap("umount", top / f"mnt{number}")
    for number in range(3):
        if os.path.ismount(top / f"served{number}"):
            place.extsnap("detach", top / f"served{number}")
    place_is_quiet = [point for point in place.mounts() if point.startswith(str(top / "served"))]
    assert not place_is_quiet, place_is_quiet


def _find(place: Place, image: _Image) -> State:
    """What is there now, as debugfs and e2fsck see it; loop devices may still stand on the file."""
    work = image.path.parent
    with extsnap.open(image.path, writable=False, partition=image.partition) as volume:
        shown = {}
        for name, handle in volume.snapshots.items():
            plain = "before-restore-two" if name.startswith("before-restore-two-") else name
            assert plain not in shown, f"two snapshots {plain}"
            view = work / f"{plain}.view"
            with handle.open() as source, view.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
            oracle.assert_clean(view)
            shown[plain] = _shown(view)
        store = volume.store is not None
    base = work / "base.copy"
    with image.path.open("rb") as whole, base.open("wb") as target:
        whole.seek(_START if image.partition else 0)
        length = _MEBIBYTES * disks.MIB
        while length:
            piece = whole.read(min(length, 1 << 20))
            target.write(piece)
            length -= len(piece)
    oracle.assert_clean(base)
    return State(shown, _shown(base), store)


def _shown(path: Path) -> tuple[str, frozenset[str]]:
    """The letter of the data, and the files that were added."""
    done = subprocess.run(["debugfs", "-R", "cat /data", str(path)], capture_output=True, check=True)
    names = re.findall(r"/(added\d)/", oracle.debugfs(path, "ls -p /")[0])
    return _letter_of(done.stdout), frozenset(names)


def _judge(start: State, names: tuple[str, str], ended: list[Ended], after: State) -> None:
    """Find an order of the two that explains everything.

    Raises:
        AssertionError: There is none, or a refusal does not name who.
    """
    told = "; ".join(map(str, ended))
    for one in ended:
        if one.status == 0:
            continue
        assert one.status == (125 if one.words[0] == "run" else 1), told
        assert len(one.err.strip().splitlines()) == 1, f"not one line: {told}"
    explained, why = False, []
    for order in permutations(range(2)):
        state, possible = start, [start]
        fault = ""
        for index in order:
            one, effect = ended[index], COMMANDS[names[index]].effect
            following = effect(state, index + 1)
            if one.status:
                if following is not None and not _NAMES_WHO.search(one.err):
                    fault = fault or f"{names[index]} failed without naming who"
            elif following is None:
                fault = fault or f"{names[index]} succeeded, which it cannot"
            else:
                state = following
                possible.append(state)
        if (state.snapshots, state.base) != (after.snapshots, after.base):
            fault = fault or f"there would be {state.snapshots} and {state.base}"
        fault = fault or _contradicted(names, ended, possible)
        explained = explained or not fault
        why.append(fault)
    assert explained, f"{told}; found {after.snapshots} and {after.base}; {' / '.join(why)}"


def _contradicted(names: tuple[str, str], ended: list[Ended], possible: list[State]) -> str:
    """What an answer says that was never so; empty if all are true of one of the states."""
    for name, one in zip(names, ended, strict=True):
        if one.status:
            continue
        if name == "list":
            entries = json.loads(one.out)["snapshots"]
            listed = sorted(re.sub(r"^(before-restore-two)-.*", r"\1", entry["name"]) for entry in entries)
            if not any(listed == sorted(state.snapshots) for state in possible):
                return f"list shows {listed}"
        if name == "info":
            count = json.loads(one.out)["snapshots"]
            if not any(count == len(state.snapshots) for state in possible):
                return f"info tells {count} snapshots"
        if name == "check" and not json.loads(one.out)["ok"]:
            return f"check found {one.out}"
    return ""


def _assert_exact(place: Place, top: Path, image: _Image, kind: str, after: State) -> None:
    for name in ("one", "two"):
        if name in after.snapshots:
            oracle.assert_view_is_copy(top / f"{name}.view", place.shared[f"{kind} {name}"])
    if (top / "out.img").exists():
        oracle.assert_clean(top / "out.img")
        assert _shown(top / "out.img") == ("B", frozenset())
    # By a way that nothing stands in: `check` reads.
    words = [str(image.path), *(["-P", str(image.partition)] if image.partition else [])]
    report = json.loads(place.extsnap("check", "--json", *words).out)
    assert report["ok"], report
