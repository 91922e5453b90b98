"""The one line of a failure: what, where, what to do next."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from extsnap import errors
from extsnap.cli.failure import Failed, about, describe


def every_error(kind: type[errors.ExtsnapError] = errors.ExtsnapError) -> list[type[errors.ExtsnapError]]:
    return [kind, *(below for child in kind.__subclasses__() for below in every_error(child))]


def make(kind: type[errors.ExtsnapError], message: str, **options: str) -> errors.ExtsnapError:
    if issubclass(kind, errors.FormatError):
        return kind(message, structure="superblock", **options)
    return kind(message, **options)


@pytest.mark.parametrize("kind", every_error(), ids=lambda kind: kind.__name__)
def test_every_error_says_what_where_and_what_to_do_next(kind: type[errors.ExtsnapError]) -> None:
    line = describe(make(kind, "it went\nwrong"), "some.img")
    assert line.startswith("some.img: ")
    assert "it went\\nwrong; " in line
    assert not line.endswith("; ")
    assert line.isprintable()


@pytest.mark.parametrize("kind", every_error(), ids=lambda kind: kind.__name__)
def test_a_hint_of_the_error_wins(kind: type[errors.ExtsnapError]) -> None:
    line = describe(make(kind, "wrong", hint="do this"), "some.img")
    assert line.endswith("wrong; do this")
    assert line.count(";") == 1


def test_an_image_that_is_named_is_not_named_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    absolute = str(tmp_path / "some.img")
    assert describe(errors.VolumeBusy("some.img is mounted", hint="x"), "some.img") == "some.img is mounted; x"
    assert describe(errors.VolumeBusy(f"{absolute} is mounted", hint="x"), "some.img") == f"{absolute} is mounted; x"


@pytest.mark.parametrize(
    "number",
    [errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOSPC, errno.EIO, errno.EBUSY, errno.ENOTEMPTY],
)
def test_system_errors(number: int) -> None:
    line = describe(OSError(number, os.strerror(number), "/dir/some.img"), "/dir/some.img")
    what, _, step = line.partition("; ")
    assert what.lower() == f"/dir/some.img: {os.strerror(number)}".lower()
    assert step
    assert "--debug" not in step


def test_a_system_error_without_path_gets_the_image() -> None:
    assert describe(OSError(errno.EIO, "Input/output error"), "some.img").startswith("some.img: input/output error; ")
    assert describe(OSError("odd"), "some.img").startswith("some.img: odd; ")


def test_hostile_file_names_stay_on_the_line() -> None:
    assert describe(errors.ExtsnapError("x", hint="y"), "a\n\x1b[2Jb") == "a\\n\\x1b[2Jb: x; y"


def test_only_expected_errors_become_failures() -> None:
    with pytest.raises(Failed) as caught, about("some.img", status=125):
        raise errors.VolumeFull("full")
    assert (caught.value.subject, caught.value.status) == ("some.img", 125)
    assert isinstance(caught.value.__cause__, errors.VolumeFull)
    with pytest.raises(ZeroDivisionError), about("some.img"):
        raise ZeroDivisionError
