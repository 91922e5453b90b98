"""Arguments and options that several commands share, and the completion of snapshot names."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterable
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from extsnap.cli.output import emit, writing

# Only names that mean nothing to any shell are offered: typer's zsh completion evaluates what it gets,
# and an image may come from somebody else.
_COMPLETABLE = re.compile(r"[\w.@%+,:=][\w.@%+,:=-]*")


class _AsItIs:
    """Takes the place of typer's conversion where there is nothing to convert: a text that stays one, or no value.

    Newer versions of typer convert with pydantic, whose import takes a quarter of the time of ``extsnap list``.  With
    any other value, and with versions that have no such place, typer does what it always does.
    """

    def __init__(self, is_text: bool) -> None:
        self._is_text = is_text

    @classmethod
    def stand_before(cls, parameters: Iterable[Any]) -> None:
        """Wait for the values of those parameters that can have one only."""
        for parameter in parameters:
            descriptor = getattr(parameter, "type_descriptor", None)
            if descriptor is None or getattr(parameter, "_runtime_param", parameter) is not None:
                continue
            if parameter.nargs == 1 and not getattr(parameter, "multiple", False):
                parameter._runtime_param = cls(getattr(descriptor, "annotation", None) is str)

    def coerce(self, value: Any, *, param: Any, ctx: Any) -> Any:
        """Return the value if it is right already."""
        if value is None or (self._is_text and isinstance(value, str)):
            return value
        param._runtime_param = None
        return param.get_runtime_param().coerce(value, param=param, ctx=ctx)


class Program(TyperGroup):
    """The program, of which the commands are parts."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        _AsItIs.stand_before(self.get_params(ctx))
        return super().parse_args(ctx, args)


class Command(TyperCommand):
    """A command whose usage line reads as the manual does: ``extsnap show [OPTIONS] IMAGE NAME``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        _AsItIs.stand_before(self.get_params(ctx))
        # Parsing prints the help and the version; nothing else in it can meet the operating system.
        with writing():
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        from extsnap.serve import numpy_alone

        numpy_alone.load()
        return super().invoke(ctx)

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        arguments = (parameter for parameter in self.params if parameter.param_type_name == "argument")
        return ["[OPTIONS]", *(str(getattr(argument, "metavar", None) or argument.name) for argument in arguments)]


def complete_snapshot(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return the names of the image's snapshots that go on from ``incomplete``; nothing if it cannot be read."""
    # While the value of an option is being typed, click has not yet given the arguments their names.
    image = ctx.params.get("image") or next(iter(ctx.args), None)
    if not isinstance(image, str):
        return []
    from extsnap.errors import ExtsnapError
    from extsnap.serve import session

    partition = ctx.params.get("partition")
    given = set(ctx.params.get("names") or ())
    # A message in the middle of the command line that is being typed helps nobody.
    with contextlib.suppress(ExtsnapError, OSError), contextlib.redirect_stderr(io.StringIO()):
        with session.open_session(image, writable=False, partition=partition) as opened:
            found = opened.call("list")["snapshots"]
        names = (str(snapshot["name"]) for snapshot in found)
        return [
            name for name in names if name.startswith(incomplete) and name not in given and _COMPLETABLE.fullmatch(name)
        ]
    return []


def print_version(value: bool) -> None:
    """Print the version and leave."""
    if value:
        from importlib.metadata import version

        emit(f"extsnap {version('extsnap')}\n")
        raise typer.Exit


Image = Annotated[
    str, typer.Argument(metavar="IMAGE", help="Image file, loop device or block device.", show_default=False)
]
Partition = Annotated[
    int | None,
    typer.Option(
        "--partition",
        "-P",
        metavar="N",
        min=0,
        help="Partition N of a disk image; not needed for the only ext partition. 0 is the whole image.",
        show_default=False,
    ),
]
SnapshotName = Annotated[
    str,
    typer.Argument(metavar="NAME", help="Name of the snapshot.", autocompletion=complete_snapshot, show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Version = Annotated[
    bool,
    typer.Option("--version", help="Print the version and leave.", is_eager=True, callback=print_version),
]
