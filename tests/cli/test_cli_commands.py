"""Every command against a session that only remembers: what is asked of it, what is printed, how it ends."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import images
import oracle
import pytest
import typer

from extsnap import errors
from extsnap.cli import app, options
from extsnap.cli.app import main
from extsnap.serve import nbd

from .conftest import Call, FakeSession, process, snapshot

# Command -> arguments that are enough.
COMMANDS: dict[str, list[str]] = {
    "create": ["IMAGE"],
    "list": ["IMAGE"],
    "show": ["IMAGE", "first"],
    "delete": ["IMAGE", "first"],
    "restore": ["IMAGE", "first"],
    "export": ["IMAGE", "first", "OUT"],
    "strip": ["IMAGE"],
    "accept": ["IMAGE"],
    "set": ["IMAGE", "on-full=refuse"],
    "guard": ["IMAGE", "off"],
    "check": ["IMAGE"],
    "info": ["IMAGE"],
    "dump": ["IMAGE", "header"],
    "attach": ["IMAGE", "DIR"],
    "detach": ["IMAGE"],
    "mount": ["IMAGE", "DIR"],
    "umount": ["DIR"],
    "serve": ["IMAGE"],
    "run": ["IMAGE", "--", "true"],
}

MOUNT = {"image": "I", "directory": "D", "snapshot": None, "scratch": False, "allow_other": False}
SERVE: dict[str, Any] = {"image": "I", "snapshot": None, "scratch": False, "address": nbd.Address(), "program": None}
INFO = {
    "version": 1,
    "type": "ext4",
    "uuid": "u",
    "label": "",
    "block_size": 1024,
    "blocks": 10,
    "free_blocks": 5,
    "inodes": 3,
    "free_inodes": 2,
    "groups": 1,
    "features": [],
    "offset": 0,
    "guard": False,
    "snapshots": 0,
    "store": None,
    "attached": None,
}
CHECK = {
    "version": 1,
    "ok": True,
    "base": {"e2fsck": 0, "ok": True},
    "snapshots": [{"name": "first", "e2fsck": 0, "ok": True, "errors": []}],
    "store": {"ok": True, "errors": []},
}
ANSWERS: dict[str, Any] = {
    "create": {"version": 1, "name": "first", "id": 1},
    "list": {"version": 1, "snapshots": [snapshot("first"), snapshot("second")]},
    "show": {"version": 1, **snapshot("first"), "records": 1, "volume_bytes": 10240, "block_size": 1024},
    "delete": {"version": 1, "deleted": ["first"], "freed_bytes": 4096},
    "restore": {"version": 1, "restored": "first", "safety": "before-restore-first-x"},
    "export": {"version": 1, "name": "first", "out": "/abs/OUT", "bytes": 10240},
    "strip": {"version": 1, "snapshots": 2},
    "accept": {"version": 1, "tainted": ["one"]},
    "set": {"version": 1, "properties": {"on-full": "refuse"}},
    "guard": {"version": 1, "guard": False},
    "check": CHECK,
    "info": INFO,
    "dump": {"version": 1, "header": {"generation": 1}},
    "attach": None,
    "detach": True,
    "mount": None,
    "umount": None,
    "serve": {"uri": "nbd+unix:///?socket=/run/s", "program": "nbdkit", "read_only": False},
    "run": 0,
}


@pytest.fixture
def answering(fake: FakeSession) -> FakeSession:
    fake.answers.update(ANSWERS)
    return fake


def test_the_commands_are_those_of_the_contract(extsnap: Call) -> None:
    listed = re.findall(r"^  (\w+)  ", extsnap("--help").out.partition("Commands:")[2], re.MULTILINE)
    assert listed == list(COMMANDS)


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help(command: str, extsnap: Call) -> None:
    for option in ("--help", "-h"):
        done = extsnap(*filter(None, [command, option]))
        assert (done.status, done.err) == (0, "")
        assert done.out.startswith(f"Usage: extsnap {command}".rstrip())
        assert "--version" in done.out


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_version(command: str, extsnap: Call) -> None:
    done = extsnap(*filter(None, [command, "--version"]))
    assert (done.status, done.err) == (0, "")
    assert re.fullmatch(r"extsnap \d+\.\d+\S*\n", done.out)


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_an_unknown_option_is_usage(command: str, extsnap: Call, answering: FakeSession) -> None:
    done = extsnap(*filter(None, [command, "--no-such-option", *COMMANDS.get(command, [])]))
    assert (done.status, done.out) == (2, "")
    assert len(done.error_lines) == 1
    assert done.err.startswith("extsnap: no such option: --no-such-option")
    assert done.err.endswith(f"; see {f'extsnap {command}'.strip()} --help\n")
    assert not answering.calls


@pytest.mark.parametrize("command", COMMANDS)
def test_a_missing_argument_is_usage(command: str, extsnap: Call, answering: FakeSession) -> None:
    # detach, umount and the like need one argument: none is one less than enough.
    for count in range(1 if command == "set" else len(COMMANDS[command])):  # set shows what there is
        given = COMMANDS[command][:count]
        if command in {"delete", "restore"} or "--" in COMMANDS[command]:
            given = given[:1]
        done = extsnap(command, *given)
        assert (done.status, done.out) == (2, ""), given
        assert len(done.error_lines) == 1
        assert done.err.rstrip().endswith(f"see extsnap {command} --help")
    assert not answering.calls


@pytest.mark.parametrize(
    "arguments",
    [
        ["no-such-command"],
        ["list", "IMAGE", "more"],
        ["dump", "IMAGE", "nonsense"],
        ["delete", "IMAGE"],
        ["delete", "IMAGE", "--kind", "nonsense"],
        ["restore", "IMAGE"],
        ["restore", "IMAGE", "first", "--undo"],
        ["export", "IMAGE", "first", "-", "--json"],
        ["run", "IMAGE"],
        ["run", "IMAGE", "--"],
        ["run", "IMAGE", "true"],
        ["run", "--ok", "x", "IMAGE", "--", "true"],
        ["run", "--ok", "", "IMAGE", "--", "true"],
        ["run", "--ok", "256", "IMAGE", "--", "true"],
        ["run", "--ok", "0,,1", "IMAGE", "--", "true"],
        ["run", "--ok", "-1", "IMAGE", "--", "true"],
        ["create", "IMAGE", "-dash"],
        ["create", "IMAGE", "a", "-m"],
        ["guard", "IMAGE", "perhaps"],
        ["mount", "IMAGE", "DIR", "--scratch"],
        ["serve", "IMAGE", "--scratch"],
        ["serve", "IMAGE", "--tcp", "10809"],
        ["serve", "IMAGE", "--tcp", "10809", "--tls", "DIR", "--insecure"],
        ["serve", "IMAGE", "--tcp", "host", "--insecure"],
        ["serve", "IMAGE", "--tcp", "65536", "--insecure"],
        ["serve", "IMAGE", "--tcp", "1", "--insecure", "--socket", "PATH"],
        ["serve", "IMAGE", "--insecure"],
        ["serve", "IMAGE", "--tls", "DIR"],
        ["serve", "IMAGE", "--with", "cat"],
        ["list", "-P", "x", "IMAGE"],
        ["list", "-P", "-1", "IMAGE"],
        ["umount", "-P", "1", "DIR"],
    ],
    ids=" ".join,
)
def test_usage(arguments: list[str], extsnap: Call, answering: FakeSession) -> None:
    done = extsnap(*arguments)
    assert (done.status, done.out) == (2, "")
    assert len(done.error_lines) == 1
    assert re.fullmatch(r"extsnap: .+; see extsnap( \w+)? --help", done.error_lines[0])
    assert not answering.calls


def test_no_command_shows_the_help_on_stderr(extsnap: Call) -> None:
    done = extsnap()
    assert (done.status, done.out) == (2, "")
    assert done.err.startswith("Usage: extsnap")


@pytest.mark.parametrize(
    ("arguments", "verb", "passed"),
    [
        ("create I", "create", {"name": None, "message": "", "freeze": True, "quiesced": False}),
        (
            "create I n -m text --no-freeze --quiesced",
            "create",
            {"name": "n", "message": "text", "freeze": False, "quiesced": True},
        ),
        ("create I --message text n", "create", {"name": "n", "message": "text", "freeze": True, "quiesced": False}),
        ("list I", "list", {}),
        ("show I n", "show", {"name": "n"}),
        ("delete I a b", "delete", {"names": ["a", "b"], "kind": None}),
        ("delete I --kind safety", "delete", {"names": [], "kind": "safety"}),
        ("restore I n", "restore", {"name": "n", "undo": False, "safety": True}),
        ("restore I n --no-safety", "restore", {"name": "n", "undo": False, "safety": False}),
        ("restore I --undo", "restore", {"name": None, "undo": True, "safety": True}),
        ("export I n /x/out", "export", {"name": "n", "out": "/x/out", "force": False}),
        ("export I n /x/out --force", "export", {"name": "n", "out": "/x/out", "force": True}),
        ("strip I", "strip", {}),
        ("accept I", "accept", {}),
        ("set I on-full=refuse", "set", {"values": {"on-full": "refuse"}}),
        ("set I a=b=c on-full=drop-oldest", "set", {"values": {"a": "b=c", "on-full": "drop-oldest"}}),
        ("guard I on", "guard", {"wanted": True}),
        ("guard I off", "guard", {"wanted": False}),
        ("check I", "check", {"image": "I", "names": [], "quick": False}),
        ("check I a b --quick", "check", {"image": "I", "names": ["a", "b"], "quick": True}),
        ("info I", "info", {}),
        ("dump I header", "dump", {"what": "header"}),
        ("attach I D", "attach", {"image": "I", "directory": "D", "foreground": False, "allow_other": False}),
        (
            "attach I D --foreground --allow-other",
            "attach",
            {"image": "I", "directory": "D", "foreground": True, "allow_other": True},
        ),
        ("detach I", "detach", {"target": "I", "force": False}),
        ("detach D --force", "detach", {"target": "D", "force": True}),
        ("mount I D", "mount", MOUNT),
        ("mount I D --snapshot n", "mount", {**MOUNT, "snapshot": "n"}),
        ("mount I D --allow-other", "mount", {**MOUNT, "allow_other": True}),
        ("mount I D --snapshot n --scratch", "mount", {**MOUNT, "snapshot": "n", "scratch": True}),
        ("umount D", "umount", {"directory": "D"}),
        ("serve I", "serve", SERVE),
        ("serve I --snapshot n --socket /s", "serve", {**SERVE, "snapshot": "n", "address": nbd.Address("/s")}),
        ("serve I --tcp 0 --insecure", "serve", {**SERVE, "address": nbd.Address("", "localhost", 0)}),
        ("serve I --tcp [::1]:9 --tls /t", "serve", {**SERVE, "address": nbd.Address("", "::1", 9, "/t")}),
        ("serve I --with qemu-nbd", "serve", {**SERVE, "program": "qemu-nbd"}),
        ("run I -- a", "run", {"image": "I", "command": ["a"], "atomic": False, "ok": frozenset({0})}),
        (
            "run --atomic --ok 0,1 I -- a",
            "run",
            {"image": "I", "command": ["a"], "atomic": True, "ok": frozenset({0, 1})},
        ),
    ],
)
def test_what_is_asked_for(
    arguments: str, verb: str, passed: dict[str, Any], extsnap: Call, answering: FakeSession
) -> None:
    done = extsnap(*arguments.split())
    assert (done.status, done.err) == (0, "")
    assert answering.calls == [(verb, passed)]
    writing = {"create", "delete", "restore", "strip", "accept", "set", "guard"}
    reading = {"list", "show", "export", "info", "dump"}
    assert answering.opened == ([("I", verb in writing)] if verb in writing | reading else [])


def test_properties_are_shown_without_writing(extsnap: Call, answering: FakeSession) -> None:
    done = extsnap("set", "I")
    assert (done.status, done.out, done.err) == (0, "on-full=refuse\n", "")
    assert answering.opened == [("I", False)]


@pytest.mark.parametrize("word", ["on-full", "=refuse", ""])
def test_what_is_no_property_with_a_value(word: str, extsnap: Call, answering: FakeSession) -> None:
    done = extsnap("set", "I", word)
    assert (done.status, done.out, len(done.error_lines)) == (2, "", 1)
    assert "is not PROPERTY=VALUE" in done.err
    assert not answering.calls


@pytest.mark.parametrize(
    "arguments",
    [
        "create I", "list I", "show I n", "delete I a", "restore I n", "export I n /x/out", "strip I", "accept I",
        "set I on-full=refuse", "guard I on",
        "check I", "info I", "dump I header", "attach I D", "detach I", "mount I D", "run I -- a",
    ],
)  # fmt: skip
def test_every_command_takes_the_number_of_a_partition(arguments: str, extsnap: Call, answering: FakeSession) -> None:
    verb, *rest = arguments.split()
    for option in (["-P", "3"], ["--partition", "3"], ["--partition=0"], []):
        done = extsnap(verb, *option, *rest)
        assert (done.status, done.err) == (0, "")
    assert answering.partitions == [3, 3, 0, None]


def test_run_passes_everything_after_the_dashes_verbatim(extsnap: Call, answering: FakeSession) -> None:
    command = ["cmd", "--json", "-x", "--", "{}", "--help", "", "a b", "$x", "\udcff", "--atomic"]
    done = extsnap("run", "IMAGE", "--", *command)
    assert (done.status, done.out, done.err) == (0, "", "")
    assert answering.calls[0][1]["command"] == command
    assert answering.calls[0][1]["atomic"] is False


@pytest.mark.parametrize("status", [0, 1, 2, 3, 42, 126, 127, 130, 255])
def test_run_ends_as_its_command(status: int, extsnap: Call, answering: FakeSession) -> None:
    answering.answers["run"] = status
    assert extsnap("run", "IMAGE", "--", "x").status == status
    done = extsnap("run", "--json", "IMAGE", "--", "x")
    assert (done.status, json.loads(done.out)) == (status, {"version": 1, "status": status})


def test_run_fails_with_125(extsnap: Call, answering: FakeSession) -> None:
    for error in (errors.VolumeBusy("in use", hint="wait"), OSError(errno.EIO, "bad")):
        answering.answers["run"] = error
        done = extsnap("run", "IMAGE", "--", "x")
        assert (done.status, done.out, len(done.error_lines)) == (125, "", 1)


@pytest.mark.usefixtures("answering", "in_utc")
@pytest.mark.parametrize(
    ("command", "printed"),
    [
        ("create", "first\n"),
        ("delete", ""),
        ("restore", "before-restore-first-x\n"),
        ("export", ""),
        ("strip", ""),
        ("accept", "one\n"),
        ("set", ""),
        ("guard", ""),
        ("attach", ""),
        ("detach", ""),
        ("mount", ""),
        ("umount", ""),
        ("serve", "nbd+unix:///?socket=/run/s\n"),
        ("run", ""),
        ("dump", "generation  1\n"),
    ],
)
def test_what_is_printed(command: str, printed: str, extsnap: Call) -> None:
    done = extsnap(command, *COMMANDS[command])
    assert (done.status, done.out, done.err) == (0, printed, "")


@pytest.mark.parametrize("command", COMMANDS)
def test_json(command: str, extsnap: Call, answering: FakeSession) -> None:
    if isinstance(ANSWERS[command], dict):
        answering.answers[command] = {**ANSWERS[command], "notices": ["look here"]}
    done = extsnap(command, "--json", *COMMANDS[command])
    assert done.status == 0
    result = json.loads(done.out)
    assert result["version"] == 1
    assert "notices" not in result
    if isinstance(ANSWERS[command], dict):
        expected = {**ANSWERS[command], "out": "OUT"} if command == "export" else ANSWERS[command]
        if command == "serve":
            expected = {**expected, "version": 1, "image": "IMAGE", "snapshot": None, "scratch": False}
        assert result == expected
        assert done.err == ("" if command == "serve" else "extsnap: look here\n")  # it ends, and says so, later


def test_notices_go_to_stderr_one_line_each(extsnap: Call, answering: FakeSession) -> None:
    answering.answers["create"] = {**ANSWERS["create"], "notices": ["plain mounts are read-only", "little\nspace"]}
    done = extsnap("create", "IMAGE")
    assert done.out == "first\n"
    assert done.err == "extsnap: plain mounts are read-only\nextsnap: little\\nspace\n"


def test_an_empty_list_says_so_on_stderr(extsnap: Call, answering: FakeSession) -> None:
    answering.answers["list"] = {"version": 1, "snapshots": []}
    done = extsnap("list", "IMAGE")
    assert (done.status, done.out) == (0, "")
    assert done.err == "extsnap: IMAGE has no snapshots; extsnap create takes one\n"
    assert json.loads(extsnap("list", "--json", "IMAGE").out) == {"version": 1, "snapshots": []}


def test_export_paths_are_absolute_for_the_server_and_as_given_for_the_user(
    extsnap: Call, answering: FakeSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = extsnap("export", "IMAGE", "first", "out.img", "--json")
    assert answering.calls[0][1]["out"] == str(tmp_path / "out.img")
    assert json.loads(done.out)["out"] == "out.img"


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    "error",
    [
        errors.VolumeBusy("IMAGE is mounted at /mnt", hint="umount it"),
        errors.SnapshotNotFound("no snapshot first"),
        OSError(errno.EACCES, "Permission denied", "IMAGE"),
        BrokenPipeError(errno.EPIPE, "Broken pipe"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_failure_is_one_line(command: str, error: Exception, extsnap: Call, answering: FakeSession) -> None:
    answering.answers[command] = error
    done = extsnap(command, *COMMANDS[command])
    assert (done.status, done.out) == (125 if command == "run" else 1, "")
    assert len(done.error_lines) == 1
    assert done.err.startswith("extsnap: ")
    assert ("DIR" if command == "umount" else "IMAGE") in done.err
    assert "; " in done.err
    assert "Traceback" not in done.err


def test_debug_shows_the_traceback_and_then_the_line(extsnap: Call, answering: FakeSession) -> None:
    answering.answers["list"] = errors.VolumeFull("full")
    done = extsnap("--debug", "list", "IMAGE")
    assert done.status == 1
    assert "Traceback (most recent call last)" in done.err
    assert "VolumeFull" in done.err
    assert done.error_lines[-1].startswith("extsnap: IMAGE: full; ")


def test_mistakes_of_our_own_are_not_hidden(answering: FakeSession) -> None:
    answering.answers["list"] = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError):
        main(["list", "IMAGE"])


@pytest.mark.parametrize("command", COMMANDS)
def test_ctrl_c(command: str, extsnap: Call, answering: FakeSession) -> None:
    answering.answers[command] = KeyboardInterrupt()
    done = extsnap(command, *COMMANDS[command])
    assert (done.status, done.out, len(done.error_lines)) == (130, "", 1)


@pytest.mark.parametrize(
    ("changes", "named", "step"),
    [
        ({"base": {"e2fsck": 4, "ok": False}}, "the base volume", "e2fsck -fy"),
        ({"store": {"ok": False, "errors": ["x"]}}, "the store", "strip"),
        (
            {"snapshots": [{"name": "a\x1b", "e2fsck": 4, "ok": False, "errors": ["x"]}]},
            "snapshot a\\x1b",
            "delete the damaged",
        ),
    ],
)
def test_check_ends_with_3_where_something_is_damaged(
    changes: dict[str, Any], named: str, step: str, extsnap: Call, answering: FakeSession
) -> None:
    answering.answers["check"] = {**CHECK, **changes, "ok": False}
    for option in ([], ["--json"]):
        done = extsnap("check", "IMAGE", *option)
        assert done.status == 3
        assert len(done.error_lines) == 1
        assert f"IMAGE: damage found in {named}; " in done.err
        assert step in done.err
        assert done.out
    assert json.loads(done.out)["ok"] is False


def test_a_mounted_base_volume_is_no_damage(extsnap: Call, answering: FakeSession) -> None:
    answering.answers["check"] = {**CHECK, "base": {"e2fsck": None, "ok": None, "skipped": "mounted at /mnt"}}
    done = extsnap("check", "IMAGE")
    assert (done.status, done.err) == (0, "")
    assert "mounted at /mnt" in done.out


def test_a_volume_left_unclean_by_detach_is_a_failure(extsnap: Call, answering: FakeSession) -> None:
    answering.answers["detach"] = False
    done = extsnap("detach", "IMAGE")
    assert (done.status, len(done.error_lines)) == (1, 1)
    assert "recovers" in done.err


# ---- completion


def complete(words: str, extsnap: Call, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    with monkeypatch.context() as patch:
        patch.setenv("_EXTSNAP_COMPLETE", "complete_bash")
        patch.setenv("COMP_WORDS", words)
        patch.setenv("COMP_CWORD", str(len(words.split(" ")) - 1))
        done = extsnap()
    assert done.err == ""
    return done.out.split()


def test_names_of_snapshots_are_completed(
    extsnap: Call, answering: FakeSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    hostile = ["$(reboot)", "`reboot`", "a;b", "a b", "x\\$(reboot)", "-rf", "é*", "a\nb", "'", '"']
    names = ["before", "be-2", "größe", *hostile]
    answering.answers["list"] = {"version": 1, "snapshots": [snapshot(name) for name in names], "notices": ["x"]}
    assert complete("extsnap show IMAGE ", extsnap, monkeypatch) == ["before", "be-2", "größe"]
    assert complete("extsnap show IMAGE be", extsnap, monkeypatch) == ["before", "be-2"]
    assert complete("extsnap delete IMAGE before be", extsnap, monkeypatch) == ["be-2"]
    assert complete("extsnap mount IMAGE DIR --snapshot g", extsnap, monkeypatch) == ["größe"]
    assert complete("extsnap restore IMAGE bef", extsnap, monkeypatch) == ["before"]
    assert set(answering.opened) == {("IMAGE", False)}


def test_commands_and_choices_are_completed(extsnap: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    assert complete("extsnap re", extsnap, monkeypatch) == ["restore"]
    assert complete("extsnap dump IMAGE re", extsnap, monkeypatch) == ["records"]


def test_completion_of_a_bad_image_is_silent(
    extsnap: Call, answering: FakeSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    for error in (errors.NotExtError("no"), FileNotFoundError(2, "x")):
        answering.answers["open"] = error
        assert complete("extsnap show IMAGE ", extsnap, monkeypatch) == []


def test_every_completable_name_is_one_word_to_the_shells() -> None:
    for character in map(chr, range(33, 127)):
        if options._COMPLETABLE.fullmatch("a" + character):
            echoed = subprocess.run(["bash", "-c", f"echo a{character}"], capture_output=True, text=True, check=True)
            assert echoed.stdout == f"a{character}\n"


# ---- the process


FAKE = """
from extsnap.serve import session
import contextlib, os, signal, time
class Fake:
    served = None
    def call(self, verb, **arguments):
        if verb == "create":
            if "READY" in os.environ:
                open(os.environ["READY"], "w").close()
            time.sleep(float(os.environ.get("SLEEP", "0")))
            return {"version": 1, "name": "first", "id": 1}
        if verb == "dump":
            return {"version": 1, "records": [{"block": n, "state": "x" * 50} for n in range(100000)]}
        return {"version": 1, "snapshots": [SNAPSHOT]}
    def __enter__(self): return self
    def __exit__(self, *exception): pass
session.open_session = lambda image, **options: Fake()
SNAPSHOT = %r
"""


def fake_code(**changes: Any) -> str:
    return FAKE % (snapshot(**changes),)


def fake_process(*arguments: str, **keywords: Any) -> subprocess.Popen[str]:
    program = f"import sys\n{fake_code()}\nfrom extsnap.cli.app import main\nsys.exit(main())"
    keywords = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **keywords}
    return subprocess.Popen([sys.executable, "-c", program, *arguments], text=True, **keywords)


def test_a_reader_that_goes_away_is_no_news() -> None:
    child = fake_process("dump", "IMAGE", "records")
    assert child.stdout is not None
    assert child.stderr is not None
    assert child.stdout.readline().split() == ["BLOCK", "STATE"]
    child.stdout.close()
    assert child.stderr.read() == ""
    assert child.wait(30) == 1
    child.stderr.close()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize("arguments", ["list IMAGE", "list --json IMAGE", "--help", "run --help", "--version"])
def test_a_full_disk_under_stdout_is_reported(arguments: str) -> None:
    with open("/dev/full", "w") as full:
        child = fake_process(*arguments.split(), stdout=full)
        _, written = child.communicate(timeout=30)
    assert child.returncode == 1
    assert written == "extsnap: standard output: no space left on device; free some space there and try again\n"


def test_closed_standard_streams() -> None:
    child = subprocess.run(
        ["sh", "-c", f"{sys.executable} -m extsnap.cli.app --version >&-"], capture_output=True, text=True
    )
    assert child.returncode == 1
    assert child.stderr.startswith("extsnap: standard output: bad file descriptor; ")
    child = subprocess.run(
        ["sh", "-c", f"{sys.executable} -m extsnap.cli.app list /no/such 2>&-"], capture_output=True, text=True
    )
    assert (child.returncode, child.stdout) == (1, "")


def test_a_real_ctrl_c(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    child = fake_process(
        "create",
        "IMAGE",
        env={**os.environ, "SLEEP": "30", "READY": str(ready)},
        # In the background of a shell the tests may have been started with it ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not ready.exists():
        assert child.poll() is None
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=30)
    assert (child.returncode, out) == (130, "")
    assert err.count("\n") == 1
    assert err.startswith("extsnap: interrupted; ")


def test_text_that_the_locale_cannot_write() -> None:
    program = f"{fake_code(name='größe')}\nfrom extsnap.cli.app import main\nimport sys\nsys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", program, "list", "IMAGE"],
        env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "gr\\xf6\\xdfe" in done.stdout


Terminal = Callable[..., tuple[int, str]]


def test_colours_on_a_terminal_unless_unwanted(terminal: Terminal) -> None:
    code = fake_code(state="damaged")
    status, written = terminal("list", "IMAGE", code=code, NO_COLOR="")
    assert status == 0
    assert "\x1b[1;31mdamaged" in written
    status, written = terminal("list", "IMAGE", code=code, NO_COLOR="1")
    assert status == 0
    assert "\x1b" not in written
    assert "damaged" in written


def test_no_colours_in_a_pipe() -> None:
    child = fake_process("list", "IMAGE", env={**os.environ, "FORCE_COLOR": "1", "TERM": "xterm-256color"})
    out, _ = child.communicate(timeout=30)
    assert "\x1b" not in out
    assert "first" in out


def test_progress_on_a_terminal_only(terminal: Terminal) -> None:
    status, written = terminal("create", "IMAGE", code=fake_code(), SLEEP="1.5")
    assert status == 0
    assert "taking a snapshot" in written
    status, written = terminal("create", "IMAGE", code=fake_code())
    assert (status, written) == (0, "first\r\n")
    child = fake_process("create", "IMAGE", env={**os.environ, "SLEEP": "1.5"})
    assert child.communicate(timeout=30) == ("first\n", "")


# ---- speed


def stderr_of(code: str, *words: str | Path) -> str:
    """What a program says on standard error that succeeds, in a process of its own."""
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True).stderr


def test_help_and_list_import_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['extsnap', '--help']\n"
        "from extsnap.cli.app import main\n"
        "main()\n"
        "heavy = {'rich.table', 'rich.console', 'numpy', 'construct', 'extsnap.snapshot', 'extsnap.serve',\n"
        "         'asyncio', 'importlib.metadata'}\n"
        "print(*sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    assert stderr_of(code).split() == []


def test_numpy_comes_without_threads_and_leaves_the_environment(tmp_path: Path) -> None:
    image = oracle.copy_image(images.image("ext4-1k"), tmp_path / "disk.img")
    code = (
        "import os, sys; from extsnap.cli.app import main\n"
        "before = dict(os.environ)\n"
        "main(sys.argv[1:])\n"
        "print('numpy' in sys.modules, os.environ == before, len(os.listdir('/proc/self/task')), file=sys.stderr)"
    )
    assert stderr_of(code, "list", image).splitlines()[-1] == "True True 1"


def test_list_imports_only_what_it_needs(tmp_path: Path) -> None:
    """Nothing is converted by pydantic, which takes as long as numpy; NBD and check are other commands.

    The metadata of packages is wanted by `--version` alone.
    """
    image = oracle.copy_image(images.image("ext4-1k"), tmp_path / "disk.img")
    code = (
        "import sys; from extsnap.cli.app import main\n"
        "assert main(sys.argv[1:3]) == main(sys.argv[3:]) == 0\n"
        "heavy = {'pydantic', 'extsnap.serve.nbd', 'extsnap.serve.checking', 'rich.progress', 'importlib.metadata'}\n"
        "print(*sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    assert stderr_of(code, "create", image, "list", image).splitlines()[-1] == ""
    # Values that are not texts are still converted, and refused, by typer.
    wrong = process("list", image, "--partition", "one")
    assert wrong.returncode == 2
    assert "--partition" in wrong.stderr


def test_options_of_other_commands_are_not_looked_at() -> None:
    """Putting all commands together takes as long as typer's import; what is no command is told by all of them."""

    def commands(*arguments: str) -> list[str]:
        return list(typer.main.get_command(app._with_one_command(arguments)).commands)  # type: ignore[attr-defined]

    every = [command.name for command in app.app.registered_commands]
    assert len(every) > 15
    assert commands("list", "disk.img") == commands("--debug", "list", "--help") == ["list"]
    assert commands() == commands("--help") == commands("lst") == commands("--version") == every


def test_help_is_quick() -> None:
    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert process("--help").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    # Of a processor, and the best of some: other work on the machine is not ours.
    assert min(seconds() for _ in range(5)) < 0.25


def test_the_console_script_is_main() -> None:
    from importlib.metadata import entry_points

    (script,) = entry_points(group="console_scripts", name="extsnap")
    assert script.load() is app.main
