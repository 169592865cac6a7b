"""Options of calibration that cannot be are errors."""

from __future__ import annotations

from typing import Any

import pytest

from secateur.data.calibration import CalibrationOptions
from secateur.errors import DataError


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"text": ""}, r"text='' names no text\. Expected demo, a file or a data set: CalibrationOptions\('demo'\)"),
        ({"samples": 0}, r"samples=0 is too small\. Expected at least 1, for example samples=64"),
        ({"held_out": 0}, r"held_out=0 is too small\. Expected at least 1, for example held_out=8"),
        ({"length": 1}, r"length=1 is too small\. Expected at least 2, for example length=128"),
        ({"column": ""}, r"column='' names no field\. .*CalibrationOptions\(column='text'\)"),
        (
            {"text": "self", "chat": True},
            r"chat=True are about documents, and 'self' is what .*: Cal.*Options\('self'\)",
        ),
        ({"text": "self", "column": "x"}, r"column='x' and chat=False are about documents"),
        ({"seed": -1}, r"seed=-1 is too small\. Expected at least 0, for example seed=0"),
        ({"varied": -0.1}, r"varied=-0\.1 is no share of the windows .*: CalibrationOptions\(varied=0\.375\)"),
        ({"varied": 1.0}, r"varied=1 is no share .* Expected at least 0 and less than 1: "),
        ({"text": ("a.txt", "")}, r"text='a.txt,' names no text\."),
        ({"text": ()}, r"text='' names no text\."),
        ({"text": ("self", "a.txt")}, r"text='self,a.txt': 'self' is generated, and stands alone\..*Options\('self'\)"),
        ({"text": "self", "varied": 0.5}, r"varied=0\.5 is for texts that are read, and 'self' is generated\."),
        ({"text": "a.txt@0"}, r"'a.txt@0': the weight 0 leaves nothing of it"),
        ({"varied": float("nan")}, r"varied=nan is no share"),
        (
            {"start_tokens": [1, -2]},
            r"start_tokens=\[1, -2\] are no ids .*: CalibrationOptions\(start_tokens=\(1, 2\)\)",
        ),
        (
            {"start_tokens": [1, 2], "length": 2},
            r"start_tokens=\[1, 2\] are no ids that a window of 2 tokens may begin",
        ),
    ],
)
def test_options_that_cannot_be(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(DataError, match=match):
        CalibrationOptions(**changes)
