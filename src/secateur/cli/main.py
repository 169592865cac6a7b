"""The command line: parse, call, print."""

from __future__ import annotations

import os
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Annotated

import typer

from secateur import __version__, processes
from secateur.cli.cutting import discover_command, plan_command, prune_command, sweep_command
from secateur.cli.folders import export_command, verify_command
from secateur.cli.measuring import evaluate_command, profile_command
from secateur.cli.options import Command, spread
from secateur.cli.pages import compare_command, demo_command, report_command
from secateur.cli.recovering import recover_command
from secateur.errors import SecateurError

INTERRUPTED = 130  # 128 + SIGINT, as shells count
RESUMABLE = ("prune", "recover", "sweep")
COMMANDS: dict[str, Callable[..., None]] = {  # in the order of the help
    "discover": discover_command,
    "plan": plan_command,
    "prune": prune_command,
    "recover": recover_command,
    "evaluate": evaluate_command,
    "profile": profile_command,
    "sweep": sweep_command,
    "verify": verify_command,
    "export": export_command,
    "report": report_command,
    "demo": demo_command,
    "compare": compare_command,
}

app = typer.Typer(
    name="secateur",
    help="Cut heads, channels and layers out of a language model; what is left is an ordinary model.",
    add_completion=False,
    rich_markup_mode=None,
)
for _name, _function in COMMANDS.items():
    app.command(_name, cls=Command)(spread(_function))


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(f"secateur {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exits 0, 2 for what the user can mend, 1 for a failure of ours, 130 for Ctrl-C."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit status; errors are one line on stderr."""
    processes.join()
    if not processes.is_first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123 - to the end of this process
    command = typer.main.get_command(app)
    line = shlex.join(["secateur", *arguments])
    try:
        result = command.main(args=list(arguments), prog_name="secateur", standalone_mode=False, obj=line)
        sys.stdout.flush()
    except SecateurError as error:
        return _fail("; ".join([str(error), *getattr(error, "__notes__", ())]))
    except KeyboardInterrupt:
        return _interrupted(arguments)
    except BrokenPipeError:
        return _unread()
    except SystemExit as left:  # the parser turns a broken pipe into this
        return _unread() if left.code == 1 else int(left.code or 0)
    except Exception as error:
        message = getattr(error, "format_message", None)
        if message is not None:  # the parser's own errors
            context = getattr(error, "ctx", None)
            told = message().strip()
            stop = "" if told.endswith((".", "?")) else "."
            return _fail(told + (f"{stop} See: {context.command_path} --help" if context is not None else stop))
        if type(error).__name__ == "Abort":  # what the parser makes of Ctrl-C
            return _interrupted(arguments)
        traceback.print_exc()
        print(f"secateur: failed: {type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    if result == INTERRUPTED:  # what newer versions of the parser make of it
        return _interrupted(arguments)
    return result if isinstance(result, int) else 0


def _fail(message: str) -> int:
    print(f"secateur: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _interrupted(arguments: Sequence[str]) -> int:
    resumable = arguments[:1] and arguments[0] in RESUMABLE
    resume = "; the same command with --resume goes on where it can" if resumable else ""
    print(f"secateur: interrupted{resume}", file=sys.stderr)
    return INTERRUPTED


def _unread() -> int:
    """Whoever read our output has stopped reading, as `head` does; nothing is left to say."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the exit would flush into the pipe
    return 0
