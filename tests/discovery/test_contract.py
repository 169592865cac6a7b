"""Every model type keeps the contract, but for what is listed in known_failures.json; the list can only shrink."""

from __future__ import annotations

import json
import re
from importlib.metadata import version
from pathlib import Path

import pytest

from contract import Report, check_type
from every_type import NOT_BUILT, TYPES

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"  # `make architectures` writes it
KNOWN = Path(__file__).parents[1] / "known_failures.json"  # check -> [{"reason": ..., "types": [...]}]
QUICK = ("llama", "mamba2", "mixtral")
BUILT = tuple(model_type for model_type in TYPES if model_type not in NOT_BUILT)


def known_failures(model_type: str, file: Path = KNOWN) -> dict[str, str]:
    """What the type is known to fail, and why."""
    listed = json.loads(file.read_text(encoding="utf-8"))
    return {
        check: entry["reason"] for check, entries in listed.items() for entry in entries if model_type in entry["types"]
    }


def check_reasons(file: Path) -> None:
    """Every entry names types that are built, once, and a reason."""
    for check_, entries in json.loads(file.read_text(encoding="utf-8")).items():
        listed = [model_type for entry in entries for model_type in entry["types"]]
        assert set(listed) <= set(BUILT)
        assert len(listed) == len(set(listed)), f"{check_} lists a type twice"
        assert all(entry["reason"].strip() and entry["types"] == sorted(entry["types"]) for entry in entries)


def verdict(report: Report, known: dict[str, str]) -> list[str]:
    """What is not as listed: a failure that is not known, or a known one that is none any more."""
    failed = {check: reason for check, reason in report.checks.items() if reason is not None}
    new = [f"{report.model_type} fails {check}: {reason}" for check, reason in failed.items() if check not in known]
    over = [f"{report.model_type} passes {check}: take it off {KNOWN.name}" for check in known if check not in failed]
    return new + over


def check(model_type: str) -> None:
    problems = verdict(check_type(model_type), known_failures(model_type))
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("model_type", QUICK)
def test_some_types_keep_the_contract(model_type: str) -> None:
    check(model_type)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [model_type for model_type in BUILT if model_type not in QUICK])
def test_every_type_keeps_the_contract(model_type: str) -> None:
    check(model_type)


def test_the_list_of_known_failures_can_only_shrink() -> None:
    passes = Report("llama", {"discover": None, "mlp": None})
    fails = Report("llama", {"discover": None, "mlp": "the cut model is off by 1.0e+00"})
    assert verdict(passes, {}) == []
    assert verdict(fails, {"mlp": "its code reads the width twice"}) == []
    assert verdict(fails, {}) == ["llama fails mlp: the cut model is off by 1.0e+00"]
    assert verdict(passes, {"mlp": "x"}) == ["llama passes mlp: take it off known_failures.json"]
    assert verdict(passes, {"state": "x"}) == ["llama passes state: take it off known_failures.json"]


def test_every_known_failure_names_types_and_a_reason() -> None:
    check_reasons(KNOWN)


def test_the_page_of_architectures_has_a_row_for_every_type() -> None:
    page = PAGE.read_text(encoding="utf-8")
    if f"transformers {version('transformers')} " not in page:
        pytest.skip("docs/architectures.md was written with another version of transformers")
    rows = re.findall(r"^\| ([\w-]+) \|", page.partition("| type |")[2], re.MULTILINE)
    assert rows == sorted(TYPES)
