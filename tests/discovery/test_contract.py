"""Every model type keeps the contract, but for what is listed in known_failures.json; the list can only shrink."""

from __future__ import annotations

import json
import re
from importlib.metadata import version
from pathlib import Path

import pytest

from contract import Report, check_type
from every_type import TYPES
from known import BUILT, EVERY, check_reasons, not_looked_at, verdict

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"  # `make architectures` writes it
KNOWN = Path(__file__).parents[1] / "known_failures.json"  # check -> [{"reason": ..., "types": [...]}]
QUICK = ("llama", "mamba2", "mixtral")
# A quarter of a minute to minutes each: `make long`, and `make architectures`, which looks at all.
LONG = (
    *("axk2", "bailing_hybrid", "blt", "deepseek_v4", "inkling2_loop_text", "kimi_linear", "longcat_flash"),
    *("olmo_hybrid", "phi4_multimodal", "qwen4_exp", "qwen4_exp_text", "zamba", "zamba2"),
)


def check(model_type: str) -> None:
    skip = not_looked_at(model_type, KNOWN)
    problems = verdict(check_type(model_type, skip=skip), KNOWN, skipped=skip)
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("model_type", QUICK)
def test_some_types_keep_the_contract(model_type: str) -> None:
    check(model_type)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [model_type for model_type in BUILT if model_type not in (*QUICK, *LONG)])
def test_every_type_keeps_the_contract(model_type: str) -> None:
    check(model_type)


@pytest.mark.long
@pytest.mark.parametrize("model_type", LONG)
def test_large_types_keep_the_contract(model_type: str) -> None:
    check(model_type)


def test_the_list_of_known_failures_can_only_shrink(tmp_path: Path) -> None:
    passes = Report("llama", {"discover": None, "mlp": None})
    fails = Report("llama", {"discover": None, "mlp": "the cut model is off by 1.0e+00"})

    def listed(*checks: str) -> Path:
        known = {check: [{"reason": "its code reads the width twice", "types": ["llama"]}] for check in checks}
        (tmp_path / "known.json").write_text(json.dumps(known))
        return tmp_path / "known.json"

    assert verdict(passes, listed()) == []
    assert verdict(fails, listed("mlp")) == []
    assert verdict(fails, listed()) == ["llama fails mlp: the cut model is off by 1.0e+00"]
    assert verdict(passes, listed("mlp")) == ["llama passes mlp: take it off known.json"]
    assert verdict(passes, listed("state")) == ["llama passes state: take it off known.json"]


def test_a_failure_that_many_types_share_is_looked_at_in_some(tmp_path: Path) -> None:
    types = [f"t{number:02}" for number in range(EVERY + 2)]
    (tmp_path / "known.json").write_text(json.dumps({"mlp": [{"reason": "its code reads the width", "types": types}]}))
    looked_at = [each for each in types if not not_looked_at(each, tmp_path / "known.json")]
    assert looked_at == [types[0], types[EVERY]]
    assert verdict(Report("t01", {"discover": None}), tmp_path / "known.json", skipped=["mlp"]) == []


def test_every_known_failure_names_types_and_a_reason() -> None:
    check_reasons(KNOWN)


def test_the_page_of_architectures_has_a_row_for_every_type() -> None:
    page = PAGE.read_text(encoding="utf-8")
    if f"transformers {version('transformers')} " not in page:
        pytest.skip("docs/architectures.md was written with another version of transformers")
    rows = re.findall(r"^\| ([\w-]+) \|", page.partition("| type |")[2], re.MULTILINE)
    assert rows == sorted(TYPES)
