"""The program: which commands there are, and how it ends.

Exit status: 0 done, 1 refused or failed, 2 usage, 3 ``check`` found damage; ``run`` ends with its command's.
A failure is one line on standard error.  Only ``ExtsnapError`` and ``OSError`` are expected; anything else
is a mistake in extsnap and shows its traceback.

Nothing heavy is imported before a command needs it: ``extsnap --help`` and shell completion are run often.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from copy import copy
from typing import Annotated

import typer
from typer.main import get_command

from extsnap.cli import inspection, interruptible, output, serving, snapshots, transfer
from extsnap.cli.failure import INTERRUPTED, REFUSED, USAGE, Failed, OutputClosed, describe
from extsnap.cli.options import Command, Program, Version
from extsnap.errors import ExtsnapError

PROGRAM = "extsnap"

# typer brings its own copy of click's exceptions or uses click's, depending on its version; the class of
# every error in usage is BadParameter's parent in both.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]

app = typer.Typer(
    name=PROGRAM,
    cls=Program,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def program(
    ctx: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of a failure.")] = False,
    version: Version = False,
) -> None:
    """Snapshots inside a plain ext2, ext3 or ext4 volume, kept in its own free space."""
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help(), err=True)
        raise typer.Exit(USAGE)


app.command("create", cls=Command)(snapshots.create)
app.command("list", cls=Command)(snapshots.list_snapshots)
app.command("show", cls=Command)(snapshots.show)
app.command("delete", cls=Command)(snapshots.delete)
app.command("restore", cls=Command)(snapshots.restore)
app.command("export", cls=Command)(transfer.export)
app.command("strip", cls=Command)(snapshots.strip)
app.command("accept", cls=Command)(snapshots.accept)
app.command("set", cls=Command)(snapshots.set_properties)
app.command("guard", cls=Command)(snapshots.guard)
app.command("check", cls=Command)(inspection.check)
app.command("info", cls=Command)(inspection.info)
app.command("dump", cls=Command)(inspection.dump)
app.command("attach", cls=Command)(serving.attach)
app.command("detach", cls=Command)(serving.detach)
app.command("mount", cls=Command)(serving.mount)
app.command("umount", cls=Command)(serving.umount)
app.command("serve", cls=Command)(serving.serve)
app.command("run", cls=serving.RunCommand)(serving.run)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status.

    Args:
        arguments: The command line without the program's name; None is the process's own.
    """
    output.prepare()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if f"_{PROGRAM.upper()}_COMPLETE" in os.environ:
        # The shell asks for completions: click answers and exits.
        get_command(app).main(arguments, prog_name=PROGRAM)
    command = get_command(_with_one_command(arguments))
    debug = False
    try:
        # Not command.main(): it has its own idea of errors, interrupts and closed pipes.
        with output.writing():
            context = command.make_context(PROGRAM, arguments)
        with context:
            debug = bool(context.params.get("debug"))
            command.invoke(context)
        output.finish()
        return 0
    except typer.Exit as leaving:
        return _finish(leaving.exit_code)
    except OutputClosed:
        return REFUSED
    except Failed as failure:
        return _report(failure.__cause__ or failure, failure.subject, failure.status, debug)
    except (ExtsnapError, OSError) as error:
        return _report(error, "", REFUSED, debug)
    except _UsageError as error:
        output.say(_usage_line(error))
        return USAGE
    except KeyboardInterrupt:
        output.say("interrupted; the volume is consistent, and the same command can be given again")
        return INTERRUPTED


def _with_one_command(arguments: Sequence[str]) -> typer.Typer:
    """The program with no other command than the one that is asked for, if that is one.

    To look through the options of all takes a tenth of the time of `extsnap list`.
    """
    name = next((argument for argument in arguments if not argument.startswith("-")), "")
    found = [command for command in app.registered_commands if command.name == name]
    part = copy(app)
    part.registered_commands = found or app.registered_commands
    return part


def _finish(status: int) -> int:
    try:
        output.finish()
    except OutputClosed:
        return status or REFUSED
    except Failed as failure:
        output.say(describe(failure.__cause__ or failure, failure.subject))
        return status or REFUSED
    return status


def _report(error: BaseException, subject: str, status: int, debug: bool) -> int:
    if debug:
        import traceback

        traceback.print_exception(error)
    output.say(describe(error, subject))
    # What was asked for may be half written; that it cannot be finished is no second failure to report.
    try:
        output.finish()
    except (Failed, OutputClosed):
        pass
    return status


def _usage_line(error: Exception) -> str:
    """Return click's message as one line that says where to read on."""
    context = getattr(error, "ctx", None)
    path = PROGRAM if context is None else str(context.command_path)
    formatted = getattr(error, "format_message", error.__str__)
    # pydantic, which newer versions of typer convert values with, puts its own words in front.
    message = " ".join(str(formatted()).replace("Value error, ", "").split()).rstrip(".")
    return f"{message[:1].lower()}{message[1:]}; see {path} --help"


interruptible(by_exception=True)

if __name__ == "__main__":
    sys.exit(main())
