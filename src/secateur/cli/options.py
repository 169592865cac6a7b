"""Options dataclasses -> options of a command: names, types, choices, defaults and help come from their fields.

A command is a function whose parameters may be annotated with `Fields(SomeOptions)`. `command` replaces each by one
option per field. The first section of a help page has what a common task needs, the second the rest.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from cyclopts import Group, Parameter
from docstring_parser import parse_from_object

from secateur.cli.reading import comma_separated, count, layer_range, proportion, run_score_file
from secateur.data.calibration import CalibrationOptions
from secateur.decoding import literals
from secateur.errors import RecipeError
from secateur.models.loading import LoadOptions
from secateur.pipeline.recipe import PruneRecipe, RunOptions, prune_recipe
from secateur.planning.options import PRESETS, CutOptions

MAIN = Group("Options", sort_key=1)
ADVANCED = Group("Advanced options", sort_key=2)
COMMON = Group("Common options", sort_key=3)


def main(text: str, **more: Any) -> Parameter:
    """An option of a command's own, in the first section."""
    return Parameter(group=MAIN, help=text, **more)


MODEL = Parameter(help="Hub name, folder, .gguf file, config.json, or `demo`.")
OUT = Parameter(help="Folder to write.")


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
    group: Group | None = None  # of all fields
    build: bool = False

    def parameters(self, kind: type | None = None, outer: str = "") -> dict[str, inspect.Parameter]:
        """One keyword parameter for each field, by the field's name."""
        kind = kind or self.kind
        hints, about = get_type_hints(kind), help_of(kind)
        found: dict[str, inspect.Parameter] = {}
        for each in fields(kind):
            name, hint = outer + each.name, hints[each.name]
            if name in self.omit.split():
                continue
            if is_dataclass(hint) and isinstance(hint, type):
                found |= self.parameters(hint, f"{name}.")
                continue
            text = _with_default(about.get(each.name, ""), each, hint, reads=name in self.read)
            group = self.group or (MAIN if name in self.main.split() else ADVANCED)
            negative = f"--no-{self.option(name)[2:]}" if hint == (bool | None) else ()
            parameter = Parameter(name=self.option(name), help=text, group=group, negative=negative)
            found[name] = inspect.Parameter(
                self.option(name).removeprefix("--").replace("-", "_"),
                inspect.Parameter.KEYWORD_ONLY,
                annotation=Annotated[(str if name in self.read else _as_option(hint)) | None, parameter],
                default=None,
            )
        return found

    def option(self, name: str) -> str:
        """The option of a field.

        >>> CUTTING.option("calibration.text"), CUTTING.option("calibration.score_samples")
        ('--calibration', '--score-samples')
        """
        return self.names.get(name, "--" + name.rpartition(".")[2].replace("_", "-"))

    def value(self, given: Mapping[str, Any]) -> Any:
        """What the command gets, from what was given by field."""
        values: dict[str, Any] = {}
        for name, value in given.items():
            if value is not None:
                outer, _, inner = name.rpartition(".")
                place = values.setdefault(outer, {}) if outer else values
                place[inner] = self._read(name, value)
        return self.kind(**values) if self.build else values

    def _read(self, name: str, value: Any) -> Any:
        if name in self.read:
            return self.read[name](value)
        return tuple(value) if isinstance(value, list) else value


def help_of(kind: type) -> dict[str, str]:
    """Field -> its docstring, on one line."""
    parsed = parse_from_object(kind)
    return {each.arg_name: " ".join((each.description or "").split()) for each in parsed.params}


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options that its parameters annotated with `Fields` stand for.

    >>> def shown(model: str, /, *, loading: Annotated[LoadOptions, Fields(LoadOptions, build=True)]) -> None:
    ...     print(model, loading.dtype)
    >>> list(inspect.signature(command(shown)).parameters)
    ['model', 'dtype', 'device', 'trust_remote_code']
    >>> command(shown)("demo", dtype="float32")
    demo float32
    """
    parameters: list[inspect.Parameter] = []
    spread: dict[str, tuple[Fields, dict[str, str]]] = {}
    for parameter in inspect.signature(function, eval_str=True).parameters.values():
        about = [each for each in get_args(parameter.annotation)[1:] if isinstance(each, Fields)]
        if not about:
            parameters.append(parameter)
            continue
        own = about[0].parameters()
        parameters += own.values()
        spread[parameter.name] = about[0], {each.name: name for name, each in own.items()}

    @functools.wraps(function)
    def run(*positional: Any, **options: Any) -> None:
        groups = {
            name: kind.value({each: options.pop(option, None) for option, each in own.items()})
            for name, (kind, own) in spread.items()
        }
        function(*positional, **options, **groups)

    run.__annotations__ = {each.name: each.annotation for each in parameters}
    vars(run)["__signature__"] = inspect.Signature(parameters)  # what the parser looks at
    return run


def _as_option(hint: Any) -> Any:
    """The type of an option: without None, and lists for tuples of any length."""
    if get_origin(hint) in (Union, type(int | None)):
        hint = next(each for each in get_args(hint) if each is not type(None))
    if get_origin(hint) is tuple and get_args(hint)[-1:] == (...,):
        return list[get_args(hint)[0]]  # type: ignore[misc]  # a type made at run time
    return hint


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
class Output:
    """What a command prints and writes besides its result."""

    quiet: bool = False
    """Print nothing but errors."""
    json: Path | None = None
    """Also write the result to this file, as JSON."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cutting:
    """All that decides a cut."""

    preset: Literal["best", "fast", "llm-pruner"] | None = None
    """best (the default), fast (a tenth of the text), or llm-pruner: the paper's recipe, 25 % of the units of the
    middle layers."""
    recipe: Path | None = None
    """Take options from this YAML file; options on the command line win."""
    cut: CutOptions
    calibration: CalibrationOptions
    score_file: Path | None = None
    """Run this Python file first; it registers scores of your own."""


CUTTING = Fields(
    Cutting,
    main="preset recipe cut.ratio cut.of cut.target cut.axes cut.shape cut.repair calibration.text calibration.samples",
    names={"calibration.text": "--calibration"},
    read={
        "cut.target": count,
        "cut.axes": comma_separated,
        "cut.layers": layer_range,
        "cut.schedule": lambda text: proportion(text, option="--schedule"),
    },
)
CALIBRATION = Fields(CalibrationOptions, main="text samples", names={"text": "--calibration"})
LOADING = Fields(LoadOptions, group=COMMON, build=True)
TRUST = Fields(LoadOptions, group=COMMON, build=True, omit="dtype device")
OUTPUT = Fields(Output, group=COMMON, build=True)
RUN = Fields(RunOptions, main="folder overwrite resume", names={"folder": "--run"}, omit="command bars")
FOLDER = Fields(RunOptions, main="folder", names={"folder": "--run"}, omit="command bars overwrite resume")
OVERWRITE = Fields(RunOptions, main="overwrite", omit="folder command bars resume")

Given = dict[str, Any]
Cut = Annotated[Given, CUTTING]
Run = Annotated[Given, RUN]
Folder = Annotated[Given, FOLDER]
Loading = Annotated[LoadOptions, LOADING]
Trust = Annotated[LoadOptions, TRUST]
Quiet = Annotated[Output, OUTPUT]
assert set(PRESETS) == set(get_args(get_args(get_type_hints(Cutting)["preset"])[0]))  # the help lists what there is


def recipe_of(model: str | None, cutting: Given, loading: LoadOptions) -> PruneRecipe:
    """The recipe that a command line asks for. Raises `SecateurError`."""
    run_score_file(cutting.get("score_file"))
    parts = {name: cutting.get(name) for name in ("preset", "cut", "calibration")}
    return prune_recipe(model, file=cutting.get("recipe"), loading=changed(loading), **parts)


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
