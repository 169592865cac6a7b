"""Lists of what model types are known to fail, which only shrink: check -> [{"reason": ..., "types": [...]}]."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from contract import Report
from every_type import NOT_BUILT, TYPES

EVERY = 10  # of the types that fail a check for one reason, one in so many is looked at
BUILT = tuple(model_type for model_type in TYPES if model_type not in NOT_BUILT)


def known_failures(model_type: str, file: Path) -> dict[str, str]:
    """What the type is known to fail, and why."""
    listed = json.loads(file.read_text(encoding="utf-8"))
    return {
        check: entry["reason"] for check, entries in listed.items() for entry in entries if model_type in entry["types"]
    }


def not_looked_at(model_type: str, file: Path) -> list[str]:
    """Checks that the type fails for a reason that it shares with many, of which others are looked at."""
    return [
        check
        for check, entries in json.loads(file.read_text(encoding="utf-8")).items()
        for entry in entries
        if len(entry["types"]) > EVERY and model_type in entry["types"] and model_type not in entry["types"][::EVERY]
    ]


def check_reasons(file: Path, *, built: Sequence[str] = BUILT) -> None:
    """Every entry names types that are built, once, and a reason."""
    for check_, entries in json.loads(file.read_text(encoding="utf-8")).items():
        listed = [model_type for entry in entries for model_type in entry["types"]]
        assert set(listed) <= set(built)
        assert len(listed) == len(set(listed)), f"{check_} lists a type twice"
        assert all(entry["reason"].strip() and entry["types"] == sorted(entry["types"]) for entry in entries)


def verdict(report: Report, file: Path, *, skipped: Sequence[str] = ()) -> list[str]:
    """What is not as listed: a failure that is not known, or a known one that is none any more."""
    known = {check: why for check, why in known_failures(report.model_type, file).items() if check not in skipped}
    failed = {check: reason for check, reason in report.checks.items() if reason is not None}
    new = [f"{report.model_type} fails {check}: {reason}" for check, reason in failed.items() if check not in known]
    over = [f"{report.model_type} passes {check}: take it off {file.name}" for check in known if check not in failed]
    return new + over
