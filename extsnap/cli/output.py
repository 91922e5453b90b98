"""Standard output, standard error and the progress bar: the only module of ``cli`` that writes anything.

Standard output carries what was asked for and nothing else, through ``emit``.  A reader that went away
(``extsnap list IMAGE | head -1``) ends the program quietly; any other failure to write is reported.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from extsnap.cli.failure import Failed, OutputClosed
from extsnap.cli.units import safe

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.progress import Progress

# Quick commands shall not flash a bar, nor pay for importing one.
_PROGRESS_DELAY_SECONDS = 0.7
# Characters gathered before a write: a dump can have millions of short lines.
_CHUNK_CHARACTERS = 1 << 16
# Wide enough that a table in a pipe is never folded; rich makes it no wider than its content.
_PIPE_WIDTH = 1 << 16


def prepare() -> None:
    """Let names that the locale cannot write come out escaped, instead of failing half-way."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def writing() -> Iterator[None]:
    """Tell a failure of standard output from a failure of the work.

    Raises:
        OutputClosed: The reader went away.
        Failed: Standard output cannot be written for another reason (a full disk).
    """
    try:
        yield
    except BrokenPipeError as error:
        _abandon_stdout()
        raise OutputClosed from error
    except OSError as error:
        _abandon_stdout()
        raise Failed("standard output") from error


def emit(text: str) -> None:
    """Write text to standard output."""
    with writing():
        _stdout().write(text)


def emit_lines(lines: Iterable[str]) -> None:
    """Write many lines to standard output, in large pieces."""
    pieces: list[str] = []
    length = 0
    for line in lines:
        pieces.append(line)
        length += len(line) + 1
        if length >= _CHUNK_CHARACTERS:
            emit("\n".join(pieces) + "\n")
            pieces, length = [], 0
    if pieces:
        emit("\n".join(pieces) + "\n")


def emit_json(result: Mapping[str, Any]) -> None:
    """Write a verb's dict to standard output, without its notices; long lists get a line an element."""
    emit_lines(_json_lines({key: value for key, value in result.items() if key != "notices"}))


def emit_table(renderable: RenderableType) -> None:
    """Write something of rich's to standard output, in colours on a terminal only."""
    terminal = stdout_is_terminal()
    width = shutil.get_terminal_size().columns if terminal else _PIPE_WIDTH
    emit_lines(render_lines(renderable, width=width, colours=terminal and not os.environ.get("NO_COLOR")))


def render_lines(renderable: RenderableType, *, width: int, colours: bool) -> list[str]:
    """Return the lines that rich makes of a renderable; without colours there is no escape sequence at all."""
    from rich.console import Console

    buffer = io.StringIO()
    # color_system=None, not no_color: the latter still writes bold and dim.
    console = Console(
        file=buffer,
        width=width,
        force_terminal=colours,
        color_system="auto" if colours else None,
        legacy_windows=False,
        highlight=False,
        markup=False,
        emoji=False,
    )
    console.print(renderable)
    return [line.rstrip() for line in buffer.getvalue().splitlines()]


def stdout_is_terminal() -> bool:
    """Whether a person reads standard output."""
    return sys.stdout is not None and sys.stdout.isatty()


def finish() -> None:
    """Flush standard output: here a full disk can still be reported, at interpreter exit it cannot."""
    if sys.stdout is not None:
        with writing():
            sys.stdout.flush()


def say(message: str) -> None:
    """Write one line to standard error, whatever the message contains."""
    if sys.stderr is None:
        return
    try:
        print(f"extsnap: {safe(message)}", file=sys.stderr, flush=True)
    except OSError:
        # Nobody listens: the exit status still tells.
        pass


def notices(result: Mapping[str, Any]) -> None:
    """Write what a verb has to say besides its result to standard error."""
    for message in result.get("notices") or ():
        say(str(message))


@contextmanager
def progress(label: str, *, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """Show on a terminal, and only there, that long work goes on.

    Args:
        label: What is being done.
        total: Bytes to do, or None where the work cannot say: the bar then only moves.

    Yields:
        A function to call with the number of bytes that were done since the last call.
    """
    if sys.stderr is None or not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        yield _ignore
        return
    bar = _Bar(label, total)
    try:
        yield bar.advance
    finally:
        bar.stop()


class _Bar:
    """A progress bar that appears after a moment and leaves no trace."""

    def __init__(self, label: str, total: int | None) -> None:
        self._label = safe(label)
        self._total = total
        self._done = 0
        self._progress: Progress | None = None
        self._timer = threading.Timer(_PROGRESS_DELAY_SECONDS, self._start)
        self._timer.daemon = True
        self._timer.start()

    def _start(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

        console = Console(stderr=True, color_system=None if os.environ.get("NO_COLOR") else "auto")
        columns = [TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn()]
        if self._total is not None:
            columns.append(DownloadColumn(binary_units=True))
        bar = Progress(*columns, console=console, transient=True)
        bar.add_task(self._label, total=self._total, completed=self._done)
        bar.start()
        self._progress = bar

    def advance(self, count: int) -> None:
        self._done += count
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=self._done)

    def stop(self) -> None:
        self._timer.cancel()
        # A timer that has just fired still starts the bar: wait for it, or the bar would stay.
        self._timer.join()
        if self._progress is not None:
            self._progress.stop()


def _ignore(count: int) -> None:
    """Progress that nobody watches."""


def _stdout() -> Any:
    if sys.stdout is None:
        raise OSError(9, os.strerror(9))
    return sys.stdout


def _abandon_stdout() -> None:
    """Point standard output at nothing, so that the interpreter's own flush at exit has nothing to complain of."""
    try:
        descriptor = sys.stdout.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    except (AttributeError, OSError, ValueError):
        return
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


def _json_lines(value: Mapping[str, Any]) -> Iterator[str]:
    """Yield JSON line by line: ``json.dumps`` of ten million records would need them all as one text."""
    yield "{"
    yield from _json_members(value, "  ")
    yield "}"


def _json_members(value: Mapping[str, Any], indent: str) -> Iterator[str]:
    left = len(value)
    for key, member in value.items():
        left -= 1
        end = "," if left else ""
        start = f"{indent}{json.dumps(str(key))}: "
        if isinstance(member, Mapping) and member:
            yield start + "{"
            yield from _json_members(member, indent + "  ")
            yield f"{indent}}}{end}"
        elif isinstance(member, list) and member and isinstance(member[0], (Mapping, list)):
            yield start + "["
            last = len(member) - 1
            for number, element in enumerate(member):
                yield f"{indent}  {json.dumps(element)}{',' if number < last else ''}"
            yield f"{indent}]{end}"
        else:
            yield f"{start}{json.dumps(member)}{end}"
