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
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
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
KNOWN = ROOT / "tests" / "known_failures.json"
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks")]

MINUTES = 10  # for one type
PEER_SECONDS = 120  # for one part of one type
DISCOVER, FOLDER = "discover", "stock folder"  # as in tests/contract.py
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
        DOCS.write_text(document(data["types"], data["versions"]))
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
                return {name: value for name, value in outcome.items() if not name.endswith("_ahead")}, True
            for name, value in more.items():
                outcome[name] = {**outcome.get(name, {}), **value} if name in ("checks", "peer") else value
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
    with suppress(EOFError):  # nothing more comes
        while True:
            for piece in pieces(connection.recv(), own=own, peer=peer):
                connection.send(piece)
            connection.send(None)


# --- one type ---------------------------------------------------------------------------------------------------


def pieces(model_type: str, *, own: bool, peer: bool) -> Iterator[Outcome]:
    """The outcome of one type, piece by piece."""
    from contract import DISCOVER, FOLDER, Report, checks_of, logits, outcome, said, subject
    from every_type import tiny_inputs, tiny_type_model

    try:
        model = tiny_type_model(model_type)
        logits(model, tiny_inputs(model_type, model.config))
    except Exception as error:  # here and below, whatever fails is the finding
        yield {"built": said(error)}
        return
    yield {"built": None}
    modules = " ".join(type(module).__name__ for module in model.modules())
    has_experts = "Expert" in modules
    try:
        tested = subject(model_type)
    except Exception as error:
        parts: dict[str, list[str]] = {"mlp": [], "attention": [], **({"expert": []} if has_experts else {})}
        yield {"checks": {DISCOVER: said(error)}, "parts": parts}
        if peer:
            yield {"peer": dict.fromkeys((DISCOVER, *parts), "not measured: it is asked for the groups that we find")}
        return
    parts = parts_of(tested.kinds, has_attention=bool(tested.state.beside_softmax), has_experts=has_experts)
    yield {"parts": parts, "checks": {DISCOVER: None}, **anatomy(tested.discovery)}
    if own:
        report = Report(model_type)
        checks = checks_of(tested, report)
        yield {"checks_ahead": list(checks)}
        for name, check in checks.items():
            yield {"checks": {name: outcome(check)}}
        yield {"uniform": list(report.uniform) if report.checks.get(FOLDER) is None else []}
    if peer:
        from dependency_graph import check_peer_cut, check_peer_graph

        yield {"peer_ahead": [DISCOVER, *parts], "peer": {DISCOVER: outcome(partial(check_peer_graph, tested))}}
        for part, kinds in parts.items():
            reasons = [outcome(partial(in_time, partial(check_peer_cut, tested, kind))) for kind in kinds]
            passes = (any if part == "attention" else all)(reason is None for reason in reasons)  # heads of either kind
            yield {"peer": {part: None if passes and kinds else next(filter(None, reasons), "not measured")}}


def in_time(check: Callable[[], None], seconds: int = PEER_SECONDS) -> None:
    """Run a check; raises `TimeoutError` where it takes longer, each second anew for code that tries something else."""

    def late(*_: object) -> None:
        raise TimeoutError(f"took more than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1)
    try:
        check()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def parts_of(kinds: Sequence[str], *, has_attention: bool, has_experts: bool) -> dict[str, list[str]]:
    """The parts of a model that are counted, each with the kinds of groups that cut it.

    A part that the model has and that no group cuts stands with no kinds, and counts as failed.
    """
    parts: dict[str, list[str]] = {}
    if mlp := [kind for kind in kinds if kind in MLP] or [kind for kind in kinds if kind in MLP_OF_EXPERTS]:
        parts["mlp"] = mlp
    if has_attention:
        parts["attention"] = [kind for kind in kinds if kind in ("attention", "query")]
    if has_experts:
        parts["expert"] = [kind for kind in kinds if kind == "expert"]
    return parts


def anatomy(discovery: Any) -> Outcome:
    """What share of the parameters each kind of group reaches, and what is frozen and why."""
    from secateur.discovery.coverage import coverage_by_kind, frozen_reasons

    frozen = [[round(each.share, 3), each.reason] for each in frozen_reasons(discovery)]
    return {
        "kinds": {kind: round(found.share, 3) for kind, found in coverage_by_kind(discovery).items()},
        "frozen": frozen,
    }


# --- what is shown ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Criterion:
    """One of the counts: which types it is about, and which of them pass."""

    name: str
    least: float  # the share that is to pass
    part: str  # "discover", "stock folder", or a part

    def about(self, types: Mapping[str, Outcome]) -> list[str]:
        """The types that have the part."""
        built = [name for name, outcome in types.items() if outcome["built"] is None]
        return [name for name in built if self.part in (DISCOVER, FOLDER) or self.part in types[name]["parts"]]

    def failure(self, outcome: Outcome) -> str | None:
        """Why a type does not pass with us, or None."""
        checks = outcome["checks"]
        if checks[DISCOVER] is not None or self.part in (DISCOVER, FOLDER):
            return str(reason) if (reason := checks.get(DISCOVER) or checks.get(self.part)) else None
        kinds = outcome["parts"][self.part]
        if not kinds:
            return checks.get(self.part) or ("its axis is found as another kind" if self.part == "expert" else "frozen")
        return next((f"{kind}: {checks[kind]}" for kind in kinds if checks[kind] is not None), None)

    def peer_failure(self, outcome: Outcome) -> str | None:
        """Why a type does not pass with Torch-Pruning, or None."""
        reason: str | None = outcome["peer"][self.part]
        return reason


CRITERIA = (
    Criterion("discover", 0.95, DISCOVER),
    Criterion("MLP: cut = mask", 0.9, "mlp"),
    Criterion("attention: cut = mask", 0.9, "attention"),
    Criterion("whole experts: cut = mask", 0.85, "expert"),
    Criterion("stock folder: save, load, generate", 0.8, FOLDER),
)


def show(types: Mapping[str, Outcome]) -> None:
    """Print the counts, ours and Torch-Pruning's where it ran, and every type that does not pass."""
    console = Console()
    peer = any("peer" in outcome for outcome in types.values())
    own = any(len(outcome["checks"]) > 1 for outcome in types.values())
    failures: dict[str, dict[str, str]] = {}
    table = Table("of the types that have it", "asked", box=None, title_justify="left")
    for heading in (["Secateur"] if own else []) + (["Torch-Pruning"] if peer else []):
        table.add_column(heading, justify="right")
    for each in CRITERIA:
        about = each.about(types)
        row = [each.name, f"{each.least:.0%}"]
        if own:
            failures[each.name] = {name: why for name in about if (why := each.failure(types[name]))}
            row.append(share(len(about) - len(failures[each.name]), len(about)))
        if peer:
            tried = [name for name in about if each.part in types[name].get("peer", {})]
            passed = sum(each.peer_failure(types[name]) is None for name in tried)
            row.append(share(passed, len(about)) if each.part != FOLDER else "writes none")
        table.add_row(*row)
    unbuilt = {name: outcome["built"] for name, outcome in types.items() if outcome["built"] is not None}
    console.print(f"{len(types)} model types, {len(types) - len(unbuilt)} build tiny and run on a CPU")
    console.print(table)
    for heading, found in [("not built", unbuilt), *failures.items()]:
        for name, reason in sorted(found.items()):
            console.print(f"{heading}: {name}: {short(known(name, heading, reason))}", highlight=False, markup=False)
    without = sorted(
        name for name, outcome in types.items() if outcome["built"] is None and "mlp" not in outcome["parts"]
    )
    console.print(f"no MLP: {', '.join(without) or 'none'}", highlight=False)


def share(some: int, whole: int) -> str:
    """Two numbers and their ratio.

    >>> share(189, 195)
    '189/195 = 96.9%'
    """
    return f"{some}/{whole} = {some / whole:.1%}" if whole else "none"


def known(model_type: str, check: str, reason: str) -> str:
    """The reason that the list of known failures gives, where it has the type."""
    listed = json.loads(KNOWN.read_text())
    by_check = {each.name: each.part for each in CRITERIA}
    for entry in listed.get(by_check.get(check, check), []):
        if model_type in entry["types"]:
            return str(entry["reason"])
    return reason


def short(text: str) -> str:
    """A text of at most LENGTH letters, on one line."""
    text = " ".join(text.split())
    return text if len(text) <= LENGTH else text[: LENGTH - 1].rstrip() + "…"


def document(types: Mapping[str, Outcome], versions: Mapping[str, str]) -> str:
    """The page docs/architectures.md."""
    lines = [
        "# Architectures",
        "",
        "What can be cut in every type of causal language model of transformers, on a tiny random model of each.",
        "This page is generated (`make architectures`); kinds are explained in [Internals](internals.md#discovery).",
        "",
        f"With transformers {versions['transformers']} and torch {versions['torch']}:",
        "",
        "| of the types that have it | pass | asked |",
        "|---|---|---|",
    ]
    for each in CRITERIA:
        about = each.about(types)
        passed = sum(each.failure(types[name]) is None for name in about)
        lines.append(f"| {each.name} | {share(passed, len(about))} | {each.least:.0%} |")
    lines += [
        "",
        '- **Can be cut**: kinds of groups that pass "cut equals mask" in float64.',
        "- **Stock folder**: kinds that the type's own config can say; such a cut loads with `from_pretrained` and",
        "  generates the same.",
        "- **Fails**: kinds that are found and do not pass, with the reason (in full: `tests/known_failures.json`).",
        "- **Frozen**: why axes of parameters cannot be cut, with the share of the parameters that have such an axis;",
        f"  the {REASONS} largest. Most of these weights can be cut along their other axes.",
        "",
        "| type | can be cut | stock folder | fails | frozen |",
        "|---|---|---|---|---|",
    ]
    lines += [row(name, types[name]) for name in sorted(types)]
    return "\n".join(lines) + "\n"


def row(name: str, outcome: Outcome) -> str:
    """The row of one type."""
    if outcome["built"] is not None:
        return f"| {name} | | | not built: {cell(outcome['built'])} | |"
    checks = {check: reason for check, reason in outcome["checks"].items() if check not in (DISCOVER, FOLDER)}
    whole = {check: reason for check, reason in outcome["checks"].items() if reason is not None}
    passes = ", ".join(check for check, reason in checks.items() if reason is None)
    fails = "; ".join(f"{check}: {cell(known(name, check, reason))}" for check, reason in whole.items())
    frozen = "; ".join(f"{part:.0%} {cell(reason)}" for part, reason in outcome.get("frozen", [])[:REASONS])
    return f"| {name} | {passes} | {', '.join(outcome['uniform'])} | {fails} | {frozen} |"


def cell(text: str) -> str:
    """A text that fits into a table of Markdown."""
    return short(text).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")


if __name__ == "__main__":
    main()
