"""The Markdown pages: links and paths lead somewhere, keys and numbers are complete, and every Python block runs."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
import transformers
import yaml

from quality_plot import SHOWN, points_of
from quality_table import QUALITY
from secateur import CalibrationOptions, CutOptions, __all__
from secateur.checkpoint.record import Record
from secateur.decoding import values_by_field
from secateur.files import PLAN_FILE, RECIPE_FILE, RECORD_FILE
from secateur.models.manifest import CARD_FILE, MANIFEST_FILE, Entry
from secateur.models.weight_files import TOKENIZER_FILES
from secateur.pipeline.recipe import PruneRecipe
from secateur.planning.plan import Plan, PlannedGroup
from secateur.recovery.result import CURVES_FILE
from secateur.scoring.registry import SCORES
from tables import result_file

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    *(ROOT / f"{name}.md" for name in ("CHANGELOG", "CONTRIBUTING", "SECURITY")),
    *sorted((ROOT / "docs").glob("**/*.md")),
]

FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```\s*$", re.MULTILINE | re.DOTALL)
CODE_SPAN = re.compile(r"`[^`\n]+`")
LINK = re.compile(r"\]\(\s*<?([^)\s>]+)|\b(?:src|href)=\"([^\"]+)\"|^\[[^\]\n]+\]:\s*(\S+)", re.MULTILINE)
ELSEWHERE = re.compile(r"[a-z][a-z0-9+.-]*:|#|//", re.IGNORECASE)  # a scheme, a place on the same page, a host


def page_name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def relative_links(markdown: str) -> list[str]:
    """Return the file part of every relative link, image and reference outside code."""
    text = CODE_SPAN.sub("", FENCE.sub("", markdown))
    targets = [next(filter(None, groups)) for groups in LINK.findall(text)]
    return [target.split("#")[0] for target in targets if not ELSEWHERE.match(target)]


def python_blocks(markdown: str) -> list[tuple[int, str]]:
    """Return (number of lines above, source) of every ```python block."""
    return [(markdown.count("\n", 0, m.start(2)), m[2]) for m in FENCE.finditer(markdown) if m[1] == "python"]


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_relative_links_exist(page: Path) -> None:
    links = relative_links(page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_links_are_found_outside_code() -> None:
    markdown = (
        "[a](docs/a.md#part) ![b](<b.png> 'title') `[c](c.md)` [d](https://d.org) [e](#e)\n"
        '<img src="f.png">\n```text\n[g](g.md)\n```\n[h]: h.md\n'
    )
    assert relative_links(markdown) == ["docs/a.md", "b.png", "f.png", "h.md"]


def test_python_blocks_are_found_with_their_place() -> None:
    assert python_blocks("one\n```bash\nls\n```\n```python\nx = 1\n```\n") == [(5, "x = 1\n")]


def test_the_page_on_the_format_has_every_file_and_key() -> None:
    page = (ROOT / "docs" / "format.md").read_text(encoding="utf-8")
    keys = {
        f.name for kind in (Plan, CutOptions, CalibrationOptions, PlannedGroup, Record, Entry) for f in fields(kind)
    }
    assert sorted(key for key in keys if f"`{key}`" not in page) == []
    files = (*TOKENIZER_FILES, PLAN_FILE, RECORD_FILE, MANIFEST_FILE, RECIPE_FILE, CARD_FILE, CURVES_FILE)
    assert sorted(name for name in files if f"`{name}`" not in page) == []


def test_the_recipe_on_its_page_is_one() -> None:
    page = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    recipe = yaml.safe_load(next(m[2] for m in FENCE.finditer(page) if m[1] == "yaml"))
    assert values_by_field(
        PruneRecipe, {key: recipe[key] for key in recipe if key not in ("command", "preset")}, "page"
    )


def test_every_score_and_every_public_name_has_a_row() -> None:
    scores, api = [(ROOT / "docs" / page).read_text(encoding="utf-8") for page in ("scores.md", "api/index.md")]
    assert [name for name, score in SCORES.items() if not score.own and f"`{name}`" not in scores] == []
    assert [name for name in __all__ if f"`{name}`" not in api] == []


def test_every_path_that_the_design_names_exists() -> None:
    page = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    table = page[page.index("## To change X") :]
    paths = re.findall(r"`((?:\w+/)+[\w.]*)`|`(tests/[\w/.]+)`", table)
    named = [one or two for one, two in paths]
    assert len(named) > 20
    assert [path for path in named if not any((base / path).exists() for base in (ROOT, ROOT / "src/secateur"))] == []
    assert len(page.splitlines()) <= 100  # two printed pages


def test_the_picture_of_quality_shows_the_rows_of_the_table() -> None:
    points = points_of(json.loads(result_file(QUALITY).read_text(encoding="utf-8")))
    assert [name for name in SHOWN if name not in points] == []
    picture = (ROOT / "docs" / "quality.svg").read_text(encoding="utf-8")
    assert [label for label in SHOWN.values() if f">{label}<" not in picture] == []


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


COMMAND = re.compile(r"^ *\$? ?secateur ([a-z]+) ([^#\n]*)", re.MULTILINE)
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")


def unknown_options(markdown: str) -> list[str]:
    """Return what commands in the blocks of a page have and their help has not."""
    helps = {
        path.stem.removeprefix("help_"): path.read_text("utf-8") for path in (ROOT / "tests/golden").glob("help_*")
    }
    return [
        f"{command} {option}"
        for command, rest in COMMAND.findall(markdown)
        for option in OPTION.findall(rest)
        if option not in OPTION.findall(helps[command])
    ]


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_commands_have_options_that_exist(page: Path) -> None:
    assert unknown_options(page.read_text(encoding="utf-8")) == []


def test_an_option_that_is_gone_is_found() -> None:
    assert unknown_options("    secateur prune demo out --ratio 0.2 --strategy layer\n") == ["prune --strategy"]


@pytest.mark.slow
@pytest.mark.demo_model
@pytest.mark.parametrize("page", [page for page in PAGES if "```python" in page.read_text("utf-8")], ids=page_name)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the blocks of one page in order, in one namespace and an empty folder, as a reader would."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")  # where custom code is copied to and imported from
    namespace: dict[str, object] = {"__name__": "__main__"}
    for lines_above, source in python_blocks(page.read_text(encoding="utf-8")):
        # The empty lines make a traceback point at the line of the page.
        exec(compile("\n" * lines_above + source, str(page), "exec"), namespace)
