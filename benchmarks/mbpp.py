"""MBPP's functions -> problems to choose by, in HumanEval's format, and text to calibrate on; no function is in both.

    python benchmarks/mbpp.py sanitized-mbpp.json --text FILE.jsonl [--column input] --problems FILE.jsonl.gz

The file is google-research's (`mbpp/sanitized-mbpp.json`, arXiv 2108.07732): an array of objects with `prompt`, `code`,
`test_list` and `test_imports`. Each becomes a function as a programmer writes it: its head, its description and first
test as the docstring, its body. What has more than one function is left out. Of the others, in random order, the first
are the problems, which `code_tasks.py` asks, and the rest are the text, four functions a document.
"""

from __future__ import annotations

import argparse
import ast
import gzip
import json
import random
from pathlib import Path
from typing import Any

SEED = 0
PROBLEMS = 123  # three batches of `code_tasks.py`
FUNCTIONS = 4  # of a document of text: few windows then run past its end


def main() -> None:
    """Read, split, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--problems", type=Path, required=True, metavar="FILE", help="packed where it ends in .gz")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE")
    parser.add_argument("--column", default="text", help="the field of the text's documents")
    options = parser.parse_args()
    found = [problem for row in json.loads(options.file.read_text()) if (problem := problem_of(row)) is not None]
    random.Random(SEED).shuffle(found)
    _write(options.problems, found[:PROBLEMS])
    functions = [f"{each['prompt']}{each['canonical_solution'].rstrip()}\n\n\n" for each in found[PROBLEMS:]]
    starts = range(0, len(functions), FUNCTIONS)
    _write(options.text, [{options.column: "".join(functions[start : start + FUNCTIONS])} for start in starts])
    print(f"{len(found[:PROBLEMS])} problems in {options.problems}, {len(functions)} functions in {options.text}")


def problem_of(row: dict[str, Any]) -> dict[str, str] | None:
    r"""One problem in HumanEval's format; None where its code is not one function, with imports at most.

    >>> row = {"task_id": 1, "prompt": "Add one.", "code": "def more(n):\r\n  return n+1", "test_imports": []}
    >>> problem = problem_of({**row, "test_list": ["assert more(1) == 2"]})
    >>> [line.strip(' "') for line in problem["prompt"].splitlines()]
    ['def more(n):', 'Add one.', '>>> more(1) == 2', 'True', '']
    >>> problem["canonical_solution"], problem["test"]
    ('    return n + 1\n', 'def check(candidate):\n    assert more(1) == 2\n')
    >>> problem_of({**row, "code": "n = 1", "test_list": ["assert n == 1"]}) is None
    True
    """
    statements = ast.parse(row["code"].replace("\r", "").replace("\t", "    ")).body
    imports = [ast.unparse(each) for each in statements if isinstance(each, ast.Import | ast.ImportFrom)]
    match [each for each in statements if not isinstance(each, ast.Import | ast.ImportFrom)]:
        case [ast.FunctionDef() as function] if f"{function.name}(" in row["test_list"][0]:
            pass
        case _:
            return None
    example = row["test_list"][0].removeprefix("assert ")
    head = [*imports, *([""] if imports else []), f"def {function.name}({ast.unparse(function.args)}):"]
    docstring = [f'    """ {row["prompt"]}', f"    >>> {example}", "    True", '    """']
    body = [f"    {line}" for each in function.body for line in ast.unparse(each).splitlines()]
    tests = [*row["test_imports"], "def check(candidate):", *(f"    {test.strip()}" for test in row["test_list"])]
    return {
        "task_id": f"MBPP/{row['task_id']}",
        "prompt": "\n".join([*head, *docstring, ""]),
        "entry_point": function.name,
        "test": "\n".join([*tests, ""]),
        "canonical_solution": "\n".join([*body, ""]),
    }


def _write(file: Path, rows: list[dict[str, str]]) -> None:
    text = "".join(f"{json.dumps(row)}\n" for row in rows)
    file.write_bytes(gzip.compress(text.encode()) if file.suffix == ".gz" else text.encode())


if __name__ == "__main__":
    main()
