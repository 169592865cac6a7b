"""What can be cut in every type of each auto class, held to the contract of `tests/contract.py`.

    python benchmarks/classes.py [--types AutoModelForMaskedLM/bert,...] [--out runs/classes.jsonl] [--known] [--peer]

Types that `--out` has already are not done again. `--known` writes tests/known_class_failures.json from all that the
file holds. `--peer` holds Torch-Pruning to the same contract (`dependency_graph.py`; pip install -e '.[bench]'); it
is asked for the groups that we find, so a type that we do not discover is not measured. AutoModelForCausalLM has a
benchmark of its own (`architectures.py`).
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from architectures import in_time

ROOT = Path(__file__).resolve().parents[1]
KNOWN = ROOT / "tests" / "known_class_failures.json"
sys.path[:0] = [str(ROOT / "tests")]

SECONDS = 300  # for one type
MEMORY = 16 * 2**30  # of the process: sizes that are tried may ask for all there is
PEER = "Torch-Pruning: "
SKIPPED = ("head_dim",)
PARTS = {  # what is asked for -> checks of which a type has one or more
    "MLP: cut = mask": ("mlp", "expert_mlp", "shared_mlp"),
    "attention: cut = mask": ("attention", "query"),
    "stock folder": ("stock folder",),
}


def main() -> None:
    """Run what is asked for and not done, and show the results."""
    from class_types import NAMES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", help="names such as AutoModel/bert, separated by commas; default: all")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "classes.jsonl", metavar="FILE")
    parser.add_argument("--known", action="store_true", help="write the list of known failures")
    parser.add_argument("--peer", action="store_true", help="Torch-Pruning too; it needs all types of --out")
    options = parser.parse_args()
    allowed = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY if allowed < 0 else min(MEMORY, allowed), allowed))
    names = options.types.split(",") if options.types is not None else list(NAMES)
    done = read(options.out)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("a") as file:
        for name in names:
            if name and name not in done:
                done[name] = checks_of(name) | (peer_checks_of(name) if options.peer else {})
                file.write(json.dumps({"name": name, "checks": done[name]}) + "\n")
                file.flush()
    if options.known:
        KNOWN.write_text(json.dumps(known(done), indent=1) + "\n")
    for auto in dict.fromkeys(name.partition("/")[0] for name in NAMES):
        show(auto, {name: checks for name, checks in done.items() if name.startswith(f"{auto}/")})


def read(file: Path) -> dict[str, dict[str, str | None]]:
    """Name -> check -> None where it passes, else why not."""
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return {row["name"]: row["checks"] for row in rows}


def checks_of(name: str) -> dict[str, str | None]:
    """The checks of one type; a type without a tiny model has the check `build` alone."""
    from contract import DISCOVER, check_type

    checks: dict[str, str | None] = {}
    try:
        in_time(lambda: checks.update(check_type(name, skip=SKIPPED).checks), SECONDS)
    except TimeoutError as error:
        checks = {"build": str(error)}
    reason = checks.get(DISCOVER)
    return {"build": reason} if reason is not None and not reason.startswith("DiscoveryError") else checks


def peer_checks_of(name: str) -> dict[str, str | None]:
    """The checks of Torch-Pruning, by the names of ours behind `PEER`; none, where we find no groups."""
    from contract import outcome, subject
    from dependency_graph import check_peer_cut, check_peer_graph

    try:
        tested = subject(name)
    except Exception:  # the finding of `checks_of`
        return {}
    found = {"discover": outcome(partial(check_peer_graph, tested))}
    for kind in tested.kinds:
        if any(kind in kinds for kinds in PARTS.values()):
            found[kind] = outcome(partial(in_time, partial(check_peer_cut, tested, kind)))
    return {f"{PEER}{check}": reason for check, reason in found.items()}


def known(done: dict[str, dict[str, str | None]]) -> dict[str, list[dict[str, Any]]]:
    """Check -> the reasons why types fail it, each with its types."""
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name, checks in sorted(done.items()):
        for check, reason in checks.items():
            if reason is not None and not check.startswith(PEER):
                found[check][reason].append(name)
    return {
        check: [{"reason": reason, "types": types} for reason, types in sorted(reasons.items())]
        for check, reasons in sorted(found.items())
    }


def show(auto: str, done: dict[str, dict[str, str | None]]) -> None:
    """One line for an auto class, as the table of docs/encoders.md has it."""
    built = [checks for checks in done.values() if "build" not in checks]
    discovered = [checks for checks in built if checks["discover"] is None]
    cells = [f"{len(done)}", f"{len(discovered)}/{len(built)}"]
    for names in PARTS.values():
        cells.append(passing(discovered, names))
    if any(check.startswith(PEER) for checks in discovered for check in checks):
        cells.append(f"{PEER}{passing(discovered, (f'{PEER}discover',))}")
        for names in [*PARTS.values()][:2]:
            cells.append(passing(discovered, [f"{PEER}{name}" for name in names]))
    print(f"| {auto} | {' | '.join(cells)} |")


def passing(types: Sequence[Mapping[str, str | None]], names: Sequence[str]) -> str:
    """Of the types that have any of these checks, those that pass all that they have.

    >>> passing([{"mlp": None}, {"mlp": "off"}, {"attention": None}], ["mlp"])
    '1/2'
    """
    having = [[checks[name] for name in names if name in checks] for checks in types]
    having = [reasons for reasons in having if reasons]
    return f"{sum(not any(reasons) for reasons in having)}/{len(having)}"


if __name__ == "__main__":
    main()
