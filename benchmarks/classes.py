"""What can be cut in every type of each auto class, held to the contract of `tests/contract.py`.

    python benchmarks/classes.py [--types AutoModelForMaskedLM/bert,...] [--out runs/classes.jsonl] [--known]

Types that `--out` has already are not done again. `--known` writes tests/known_class_failures.json from all that the
file holds. AutoModelForCausalLM has a benchmark of its own (`architectures.py`).
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
KNOWN = ROOT / "tests" / "known_class_failures.json"
sys.path[:0] = [str(ROOT / "tests")]

SECONDS = 300  # for one type
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
    options = parser.parse_args()
    names = options.types.split(",") if options.types is not None else list(NAMES)
    done = read(options.out)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("a") as file:
        for name in names:
            if name and name not in done:
                done[name] = checks_of(name)
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

    def late(*_: Any) -> None:
        raise TimeoutError(f"took more than {SECONDS} seconds")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        checks = check_type(name, skip=SKIPPED).checks
    except TimeoutError as error:
        checks = {"build": str(error)}
    finally:
        signal.alarm(0)
    reason = checks.get(DISCOVER)
    return {"build": reason} if reason is not None and not reason.startswith("DiscoveryError") else checks


def known(done: dict[str, dict[str, str | None]]) -> dict[str, list[dict[str, Any]]]:
    """Check -> the reasons why types fail it, each with its types."""
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name, checks in sorted(done.items()):
        for check, reason in checks.items():
            if reason is not None:
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
        having = [[checks[name] for name in names if name in checks] for checks in discovered]
        having = [reasons for reasons in having if reasons]
        cells.append(f"{sum(not any(reasons) for reasons in having)}/{len(having)}")
    print(f"| {auto} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
