"""What can be cut in every model type of transformers, held to the contract of `tests/contract.py`.

    python benchmarks/architectures.py [--types llama,gpt2] [--workers 2] [--peer] [--out FILE] [--docs]

Each type's model is tiny and random. `--peer` holds Torch-Pruning to the same contract with the same models, masks and
units (pip install -e '.[bench]'; `dependency_graph.py` says how). `--docs` writes docs/architectures.md, and `--read
FILE` shows the results that `--out` wrote instead of running anything.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from multiprocessing.connection import Connection
from multiprocessing.pool import ThreadPool
from pathlib import Path
from threading import local
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs" / "architectures.md"
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks")]

MINUTES = 10  # for one type
PEER_SECONDS = 120  # for one part of one type
MLP = ("mlp",)
MLP_OF_EXPERTS = ("expert_mlp", "shared_mlp")  # stand for the MLP where there is no plain one
REASONS = 2  # for what is frozen, of each type
LENGTH = 110  # of a reason

# What each type is: {"built": None, or why it has no tiny model that runs; "checks": {check: None, or why not};
# "uniform": [kinds]; "parts": {part: [kinds]}, those it has, with the kinds of groups that cut them; "kinds": {kind:
# share of the parameters}; "frozen": [[share, reason]]; "peer": {part: None, or why not}}.
Outcome = dict[str, Any]


def main() -> None:
    """Run what is asked for, and show and write the results."""
    options = parsed()
    if options.read is not None:
        data = json.loads(options.read.read_text())
    else:
        found = dict(outcomes(options))
        names = ("torch", "transformers", *(("torch-pruning",) if options.peer else ()))
        data = {
            "date": datetime.now(UTC).date().isoformat(),
            "versions": {name: version(name) for name in names},
            "types": {model_type: found[model_type] for model_type in sorted(found)},
        }
    if options.out is not None:
        options.out.write_text(json.dumps(data, indent=1) + "\n")
    if options.docs:
        DOCS.write_text(document(data["types"]))
    show(data["types"])


def parsed() -> argparse.Namespace:
    """The arguments of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", help="model types, separated by commas; default: all")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="the most that one type may take")
    parser.add_argument("--peer", action="store_true", help="Torch-Pruning too")
    parser.add_argument("--peer-only", action="store_true", help="Torch-Pruning, without our own checks")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the results as JSON")
    parser.add_argument("--read", type=Path, metavar="FILE", help="show the results in FILE instead of running")
    parser.add_argument("--docs", action="store_true", help=f"write {DOCS.relative_to(ROOT)}")
    options = parser.parse_args()
    options.peer |= options.peer_only
    if options.docs and options.peer_only:
        parser.error("--docs: expected our own checks, which --peer-only leaves out")
    return options


# --- one process per worker -------------------------------------------------------------------------------------


def outcomes(options: argparse.Namespace) -> Iterator[tuple[str, Outcome]]:
    """The outcome of every type, in the order in which they are done; one that hangs or dies fails."""
    from every_type import TYPES

    types = options.types.split(",") if options.types else list(TYPES)
    if unknown := sorted(set(types) - set(TYPES)):
        sys.exit(f"--types: {', '.join(unknown)}: expected types that AutoModelForCausalLM knows")
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
    mine = local()  # each thread has a process of its own, which it replaces where it must

    def ask(model_type: str) -> tuple[str, Outcome]:
        if getattr(mine, "worker", None) is None:
            mine.worker = Worker(own=not options.peer_only, peer=options.peer)
        outcome, goes_on = mine.worker.ask(model_type, options.minutes)
        if not goes_on:
            mine.worker = None
        return model_type, outcome

    with bar, ThreadPool(options.workers) as pool:
        task = bar.add_task("", total=len(types))
        for model_type, outcome in pool.imap_unordered(ask, types):
            bar.update(task, advance=1, description=model_type)
            yield model_type, outcome


class Worker:
    """A process that holds one type after the other to the contract."""

    def __init__(self, *, own: bool, peer: bool) -> None:
        spawning = multiprocessing.get_context("spawn")
        self.connection, theirs = spawning.Pipe()
        self.process = spawning.Process(target=serve, args=(theirs, own, peer), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, model_type: str, minutes: float) -> tuple[Outcome, bool]:
        """The outcome of a type, what of it there is where it hangs or dies, and whether the process goes on."""
        self.connection.send(model_type)
        outcome: Outcome = {"built": "not tried", "checks": {}, "uniform": [], "parts": {}}
        while self.connection.poll(minutes * 60):
            try:
                more = self.connection.recv()
            except EOFError:
                return ended(outcome, "the process died"), False
            if more is None:
                return outcome, True
            for name, value in more.items():
                outcome[name] = {**outcome[name], **value} if name in ("checks", "peer") else value
        self.process.kill()
        return ended(outcome, f"took more than {minutes:g} minutes"), False


def ended(outcome: Outcome, reason: str) -> Outcome:
    """The outcome of a type whose process ended in the middle: what is not done has failed."""
    if outcome["built"] is not None:
        outcome["built"] = None
        outcome["checks"] = {"discover": reason}
    for name in ("checks", "peer"):
        for check in outcome.pop(f"{name}_ahead", ()):
            outcome[name].setdefault(check, reason)
    return outcome


def serve(connection: Connection, own: bool, peer: bool) -> None:
    """Answer with pieces of the outcome of each type that comes in, and with None at its end."""
    import torch

    torch.set_num_threads(1)
    while True:
        for piece in pieces(connection.recv(), own=own, peer=peer):
            connection.send(piece)
        connection.send(None)


# --- one type ---------------------------------------------------------------------------------------------------


def pieces(model_type: str, *, own: bool, peer: bool) -> Iterator[Outcome]:
    """The outcome of one type, piece by piece."""
    from contract import DISCOVER, FOLDER, check_type, logits, subject
    from every_type import tiny_inputs, tiny_type_model

    try:
        model = tiny_type_model(model_type)
        logits(model, tiny_inputs(model_type, model.config))
    except Exception as error:  # here and below, whatever fails is the finding
        yield {"built": said(error)}
        return
    modules = " ".join(type(module).__name__ for module in model.modules())
    yield {"built": None}
    try:
        tested = subject(model_type)
    except Exception as error:
        parts: dict[str, tuple[str, ...]] = {"mlp": (), "attention": ()}
        if "Expert" in modules:
            parts["expert"] = ()
        yield {"checks": {DISCOVER: said(error)}, "parts": parts}
        if peer:
            from dependency_graph import Unfinished

            yield {"peer": {DISCOVER: UNMEASURED, **dict.fromkeys(parts, UNMEASURED)}}
        return
    parts = parts_of(tested.kinds, scored=bool(tested.state.scored), modules=modules)
    yield {"parts": parts, **anatomy(tested.discovery)}
