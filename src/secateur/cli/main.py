"""The command line: parse, call, print."""

from __future__ import annotations

import os
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress

from cyclopts import App, CycloptsError

from secateur import __version__
from secateur.cli.cutting import discover_command, plan_command, prune_command, sweep_command
from secateur.cli.failures import TRACEBACK, explained
from secateur.cli.folders import export_command, push_command, recover_command, verify_command
from secateur.cli.measuring import evaluate_command, profile_command
from secateur.cli.options import command
from secateur.cli.output import COMMAND
from secateur.cli.pages import compare_command, demo_command, report_command
from secateur.errors import SecateurError
from secateur.progress import keep_freed_memory

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
    "push": push_command,
    "report": report_command,
    "demo": demo_command,
    "compare": compare_command,
}

app = App(
    name="secateur",
    help="Prune a language model structurally: cut heads, channels, experts and layers, keep an ordinary model.",
    version=f"secateur {__version__}",
    help_format="plaintext",
    suppress_keyboard_interrupt=False,
)
for _place, (_name, _function) in enumerate(COMMANDS.items()):
    app.command(command(_function), name=_name, sort_key=_place)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exits 0, 2 for what the user can mend, 1 for a failure of ours, 130 for Ctrl-C."""
    keep_freed_memory()
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit status; errors are one line on stderr."""
    COMMAND.set(shlex.join(["secateur", *arguments]))
    try:
        app(list(arguments), exit_on_error=False, print_error=False)
        sys.stdout.flush()
    except SecateurError as error:
        return _fail("; ".join([str(error), *getattr(error, "__notes__", ())]))
    except CycloptsError as error:
        path = " ".join(["secateur", *(name for name in error.command_chain or () if name != "secateur")])
        return _fail(f"{' '.join(str(error).split()).rstrip('.')}. See: {path} --help")
    except KeyboardInterrupt:
        resumable = next(iter(arguments), "") in RESUMABLE
        resume = "; the same command with --resume continues where it can" if resumable else ""
        print(f"secateur: interrupted{resume}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        return _unread()
    except SystemExit as left:  # 1: what rich makes of a broken pipe
        return _unread() if left.code == 1 else int(left.code or 0)
    except Exception as error:
        message = explained(error, next(iter(arguments), ""))
        if message is None or os.environ.get(TRACEBACK):
            traceback.print_exc()
        if message is not None:
            return _fail(message)
        print(f"secateur: failed: {type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def _unread() -> int:
    """Whoever read our output has stopped, as `head` does: nothing is left to say, nor to flush at exit."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _fail(message: str) -> int:
    print(f"secateur: error: {' '.join(message.split())}", file=sys.stderr)
    return 2
