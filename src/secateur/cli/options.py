"""Options dataclasses -> options of a command: names, types, choices, defaults and help come from their fields.

A command is a function whose parameters may be annotated with `Fields(SomeOptions)`. `command` makes each one option
per field. The first section of a help page has what a common task needs, the second the rest.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict, get_args, get_type_hints

from cyclopts import Group, Parameter, Token
from docstring_parser import parse_from_object

from secateur.cli.output import Output
from secateur.cli.reading import comma_separated, count, run_file, two_numbers, whole_numbers
from secateur.data.calibration import CalibrationOptions
from secateur.decoding import literals
from secateur.errors import RecipeError
from secateur.models.options import LoadOptions
from secateur.pipeline.options import RunOptions
from secateur.pipeline.recipe import PruneRecipe, prune_recipe
from secateur.planning.options import PRESETS, CutOptions
from secateur.progress import without_collection

MAIN = Group("Options", sort_key=1)
ADVANCED = Group("Advanced options", sort_key=2)
COMMON = Group("Common options", sort_key=3)
TOKEN_IDS = "token ids with commas between them, for example 130001,130004"


def main(text: str, **more: Any) -> Parameter:
    """An option of a command's own, in the first section."""
    return Parameter(group=MAIN, help=text, **more)


MODEL = Parameter(help="Hub name, folder, .gguf file, config.json, or `demo`.")


@dataclass(frozen=True, slots=True)
class Fields:
    """The fields of an options dataclass as options of a command; those of a nested dataclass count as `outer.inner`.

    The command gets a mapping of the options that were given, nested as the dataclass is; with `build`, the dataclass.
    """

    kind: type
    main: str = ""  # names of the fields that a common task needs
    omit: str = ""
    names: Mapping[str, str] = field(default_factory=dict)  # field -> option, where it has another name
    read: Mapping[str, Callable[[str], Any]] = field(default_factory=dict)  # field -> what reads its text
    expected: Mapping[str, str] = field(default_factory=dict)  # field -> what its text is to be
    group: Group | None = None  # of all fields
    build: bool = False

    def parsed(self, kind: type | None = None, outer: str = "") -> Any:
        """The type that the parser fills: a dictionary with a key for each field, none of which must be there."""
        kind = kind or self.kind
        hints = get_type_hints(kind)
        about = {each.arg_name: " ".join((each.description or "").split()) for each in parse_from_object(kind).params}
        keys: dict[str, Any] = {}
        for each in fields(kind):
            name, hint = outer + each.name, hints[each.name]
            if name in self.omit.split():
                continue
            if is_dataclass(hint) and isinstance(hint, type):
                keys[each.name] = self.parsed(hint, f"{name}.")
                continue
            text = _with_default(about.get(each.name, ""), each, hint, reads=name in self.read)
            group = self.group or (MAIN if name in self.main.split() else ADVANCED)
            negative = f"--no-{self.option(name)[2:]}" if hint == (bool | None) else ()
            convert = partial(self._convert, name) if name in self.read else None
            parameter = Parameter(self.option(name), converter=convert, help=text, group=group, negative=negative)
            keys[each.name] = Annotated[Any if convert else hint, parameter]  # Any: the parser takes it as text
        given = TypedDict("Given", keys, total=False)  # type: ignore[misc]  # a type made at run time
        return Annotated[given, Parameter(name="*")]

    def option(self, name: str) -> str:
        """The option of a field.

        >>> CUTTING.option("calibration.text"), CUTTING.option("calibration.score_samples")
        ('--calibration', '--score-samples')
        """
        return self.names.get(name, "--" + name.rpartition(".")[2].replace("_", "-"))

    def _convert(self, name: str, _: Any, tokens: Sequence[Token]) -> Any:
        text = tokens[0].value
        try:
            return self.read[name](text)
        except (ValueError, OverflowError):
            raise RecipeError(f"{self.option(name)} {text}: expected {self.expected[name]}") from None


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options that its parameters annotated with `Fields` stand for.

    >>> def shown(model: str, /, *, loading: Annotated[LoadOptions, Fields(LoadOptions, build=True)]) -> None:
    ...     print(model, loading.dtype)
    >>> command(shown)("demo", loading={"dtype": "float32"})
    demo float32
    """
    signature = inspect.signature(function, eval_str=True)
    parameters = dict(signature.parameters)
    spread = {
        name: about
        for name, parameter in parameters.items()
        for about in get_args(parameter.annotation)[1:]
        if isinstance(about, Fields)
    }
    for name, about in spread.items():  # {}, not None: from Python 3.12 on pydantic validates it
        parameters[name] = parameters[name].replace(annotation=about.parsed(), default={})

    @functools.wraps(function)
    def run(*positional: Any, **options: Any) -> None:
        _begin()
        for name, about in spread.items():
            given = options.get(name) or {}
            options[name] = about.kind(**given) if about.build else given
        function(*positional, **options)

    paragraphs = (inspect.getdoc(function) or "").split("\n\n")
    run.__doc__ = "\n\n".join(" ".join(each.split()) for each in paragraphs)  # the terminal's width breaks the lines
    run.__annotations__ = {name: parameter.annotation for name, parameter in parameters.items()}
    vars(run)["__signature__"] = signature.replace(parameters=[*parameters.values()])  # what the parser looks at
    return run


def _begin() -> None:
    """Import what every command needs, and join the process group, of which only the first process prints."""
    if "transformers.modeling_utils" not in sys.modules:
        with without_collection():
            importlib.import_module("transformers.modeling_utils")
        gc.freeze()  # what the imports have made stays: it is not looked through again
        atexit.register(gc.unfreeze)  # else triton reports its types as leaked, line by line
    from secateur import processes

    processes.join()
    if not processes.is_first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123 - to the end of this process


def _with_default(text: str, each: Any, hint: Any, *, reads: bool) -> str:
    """The help of an option, with its choices where the parser cannot know them, and its default."""
    default = each.default
    if reads and (choices := literals(hint)):
        text += f" [choices: {', '.join(choices)}]"
    if default in (None, MISSING, "", ()) or default is False:
        return text
    if isinstance(default, tuple):
        default = ",".join(map(str, default))
    return f"{text} [default: {default}]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cutting:
    """All that decides a cut."""

    preset: Literal["best", "fast", "llm-pruner"] | None = None
    """best (the default), fast (a fifth of the text), or llm-pruner: the paper's recipe, 25 % of the units of the
    middle layers."""
    recipe: Path | None = None
    """Take options from this YAML file; options on the command line win."""
    cut: CutOptions
    calibration: CalibrationOptions
    score_file: Path | None = None
    """Run this Python file first; it registers scores of your own."""
    inputs: Path | None = None
    """Run this Python file first; it registers what a model takes, if that cannot be found."""


CUTTING = Fields(
    Cutting,
    main="preset recipe cut.ratio cut.of cut.target cut.axes cut.shape cut.engine calibration.text calibration.samples",
    names={"calibration.text": "--calibration", "cut.engine": "--for"},
    read={
        "cut.target": count,
        "cut.axes": comma_separated,
        "cut.layers": two_numbers,
        "cut.schedule": two_numbers,
        "calibration.start_tokens": whole_numbers,
    },
    expected={
        "cut.target": "a number such as 100M, 1.5B or 100000000",
        "cut.layers": "first:last with the last left out, for example 4:30 or 0.125:0.9375",
        "cut.schedule": "two numbers, for example 0.5:1.5",
        "calibration.start_tokens": TOKEN_IDS,
    },
)
CALIBRATION = Fields(
    CalibrationOptions,
    main="text samples",
    names={"text": "--calibration"},
    read={"start_tokens": whole_numbers},
    expected={"start_tokens": TOKEN_IDS},
)
RUN = Fields(RunOptions, main="folder overwrite resume", names={"folder": "--run"}, omit="command bars")

START_TOKENS = replace(
    CALIBRATION,
    main="start_tokens",
    omit=" ".join(each.name for each in fields(CalibrationOptions) if each.name != "start_tokens"),
)

Given = dict[str, Any]
Cut = Annotated[Given, CUTTING]
Run = Annotated[Given, RUN]
Folder = Annotated[Given, replace(RUN, omit="command bars overwrite resume")]
Overwrite = Annotated[Given, replace(RUN, omit="command bars folder resume")]
Loading = Annotated[LoadOptions, Fields(LoadOptions, group=COMMON, build=True)]
Trust = Annotated[LoadOptions, Fields(LoadOptions, group=COMMON, build=True, omit="dtype device")]
Inputs = Annotated[
    Path | None, main("Run this Python file first; it registers what a model takes, if that cannot be found.")
]
StartTokens = Annotated[Given, START_TOKENS]
Quiet = Annotated[Output, Fields(Output, group=COMMON, build=True, omit="track")]
Measured = Annotated[Output, Fields(Output, group=COMMON, build=True)]
assert set(PRESETS) == set(get_args(get_args(get_type_hints(Cutting)["preset"])[0]))  # the help lists what there is


def recipe_of(model: str | None, cutting: Given, loading: LoadOptions) -> PruneRecipe:
    """The recipe that a command line asks for. Raises `SecateurError`."""
    run_files(cutting)
    parts = {name: cutting.get(name) for name in ("preset", "cut", "calibration")}
    return prune_recipe(model, file=cutting.get("recipe"), loading=changed(loading), **parts)


def run_files(cutting: Given) -> None:
    """Run the user's files that register scores and inputs. Raises `SecateurError`."""
    run_file("--score-file", cutting.get("score_file"))
    run_file("--inputs", cutting.get("inputs"))


def changed(loading: LoadOptions) -> Given:
    """The options that are no defaults, and so go before those of a recipe file."""
    return {name: value for name, value in asdict(loading).items() if value != getattr(LoadOptions(), name)}


def model_and_out(model: str, out: Path | None, recipe: Path | None, command: str) -> tuple[str | None, Path]:
    """MODEL and OUT of a command; with a recipe, which names the model, one argument is OUT. Raises `RecipeError`."""
    if out is not None:
        return model, out
    if recipe is None:
        raise RecipeError(
            f"OUT is missing: secateur {command} {model} OUT writes a folder; with --recipe FILE, OUT alone"
        )
    return None, Path(model)
