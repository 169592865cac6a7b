"""The tutorials: their form, and that a run prints what they store."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode

import notebooks
from notebooks import INSTALL, MEASURED, UNCHECKED, read

PATHS = notebooks.notebooks()
BYTES_OF_PICTURE = 60_000
# An absolute path, a colour of a terminal, a bar of tqdm, an error, a warning.
TRACES = re.compile(r"(?<![\w.:/])/\w+/\w|\x1b\[|\dit/s|Traceback|Warning\b")


def test_there_are_four() -> None:
    assert [path.stem[:2] for path in PATHS] == ["1_", "2_", "3_", "4_"]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_as_it_was_run(path: Path) -> None:
    notebook = read(path)
    nbformat.validate(notebook)
    assert dict(notebook.metadata) == notebooks.METADATA  # no kernel of a user
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert all("execution" not in cell.metadata for cell in code)
    assert {tag for cell in code for tag in notebooks.tags(cell)} <= {INSTALL, MEASURED, UNCHECKED}
    printing = [cell for cell in code if "print(" in cell.source and MEASURED not in notebooks.tags(cell)]
    assert all(cell.outputs for cell in printing)
    assert not any(cell.outputs for cell in code if MEASURED in notebooks.tags(cell))
    assert notebook.cells[0].source.startswith("# ")  # the title of the page


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_outputs_are_plain_and_small(path: Path) -> None:
    notebook = read(path)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"] == []
    texts = [notebooks.output_text(cell) for cell in notebook.cells if cell.cell_type == "code"]
    assert [text for text in texts if TRACES.search(text)] == []
    pictures = notebooks.pictures(notebook)
    assert 1 <= len(pictures) <= 2
    assert all(cell.metadata.get("alt") for cell, _ in pictures)  # what a reader who cannot see it is told
    assert [size for _, data in pictures if (size := len(base64.b64decode(data))) > BYTES_OF_PICTURE] == []


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_the_head_is_as_make_notebooks_writes_it(path: Path) -> None:
    notebook, address = read(path), notebooks.repository()
    lines = notebook.cells[0].source.split("\n")
    expected = notebooks.badge(address, path.name)
    assert [line for line in lines if "colab" in line.lower()] == ([] if expected is None else [expected])
    installing = [cell.source for cell in notebook.cells if INSTALL in notebooks.tags(cell)]
    assert installing == [notebooks.install_source(address)]


def test_the_badge_follows_the_repository() -> None:
    address = "https://github.com/me/secateur"
    line = notebooks.badge(address, "a.ipynb")
    place = "me/secateur/blob/main/docs/notebooks/a.ipynb"
    assert line == f"[![Open in Colab](colab.svg)](https://colab.research.google.com/github/{place})"
    assert (notebooks.FOLDER / notebooks.BADGE_PICTURE).is_file()
    assert notebooks.badge(None, "a.ipynb") is None
    cells = [nbformat.v4.new_markdown_cell("# A\n\nText."), nbformat.v4.new_code_cell(metadata={"tags": [INSTALL]})]
    notebook = nbformat.v4.new_notebook(cells=cells)
    for _ in range(2):  # twice is once
        notebooks.put_head(notebook, "a.ipynb", address)
        assert notebook.cells[0].source == f"# A\n\n{line}\n\nText."
    assert f"git+{address}" in notebook.cells[1].source
    notebooks.put_head(notebook, "a.ipynb", None)
    assert notebook.cells[0].source == "# A\n\nText."


@pytest.mark.parametrize(
    ("stored", "new", "same"),
    [
        ("damage 0.20", "damage 0.21", True),
        ("damage 0.20", "damage 0.22", False),
        ("123,935,040 parameters", "123,898,176 parameters", True),
        ("123,935,040 parameters", "113,281,344 parameters", False),
        ("30 layers", "31 layers", False),
        ("lora: 8 steps", "full: 8 steps", False),
        ("8 steps", "8 steps, and a warning", False),
    ],
)
def test_another_number_or_word_is_found(stored: str, new: str, same: bool) -> None:
    assert notebooks.same_text(stored, new) is same


def test_a_cell_that_prints_something_else_is_found() -> None:
    def printing(text: str, **metadata: object) -> NotebookNode:
        output = nbformat.v4.new_output("stream", name="stdout", text=text)
        cell: NotebookNode = nbformat.v4.new_code_cell(outputs=[output], metadata=metadata)
        return cell

    stored = nbformat.v4.new_notebook(cells=[printing("loss 1.5"), printing("a", tags=[UNCHECKED])])
    new = nbformat.v4.new_notebook(cells=[printing("loss 1.7"), printing("b", tags=[UNCHECKED])])
    assert notebooks.differences(stored, new) == ["cell 0: stored 'loss 1.5', now 'loss 1.7'"]
    assert notebooks.differences(stored, stored) == []


@pytest.mark.slow
@pytest.mark.demo_model
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_run_prints_what_is_stored(path: Path, tmp_path: Path) -> None:
    stored, new = read(path), notebooks.run(path, tmp_path)
    assert notebooks.differences(stored, new) == []
    assert len(notebooks.pictures(new)) == len(notebooks.pictures(stored))
