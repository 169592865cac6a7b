"""Recipes: the options of a run as one YAML file, and how a run treats what is there already.

A recipe holds all that decides the weights; `RunOptions` holds the rest. Every folder that a command writes has the
recipe that makes it again: `secateur prune --recipe OUT/recipe.yaml AGAIN`.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from secateur import __version__
from secateur.data.calibration import CalibrationOptions
from secateur.errors import RecipeError, did_you_mean, one_line
from secateur.models.loading import LoadOptions
from secateur.planning.options import CutOptions, with_preset
from secateur.progress import ProgressBars

RECIPE_FILE = "recipe.yaml"
Options = TypeVar("Options")


@dataclass(frozen=True, slots=True)
class PruneRecipe:
    """All that decides what `prune` makes.

    >>> PruneRecipe("demo").cut.ratio, PruneRecipe("demo", cut=CutOptions(target=100_000_000)).cut.ratio
    (0.2, None)
    """

    model: str
    """Hub name, folder, .gguf file or `demo`."""
    _: KW_ONLY
    cut: CutOptions = field(default_factory=CutOptions)
    """What to cut, and how much."""
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)
    """The text that scores and repair look at."""
    loading: LoadOptions = field(default_factory=LoadOptions)
    """Dtype and device of the model while it is cut."""
    plan: str | None = None
    """A plan file: which units stay is decided there, and `cut` and `calibration` are those of the plan."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """How a run treats what is there, what it keeps and what it shows; none of it changes the weights."""

    overwrite: bool = False
    """Replace the output folder if it exists."""
    resume: bool = False
    """Continue a killed run from its last finished stage."""
    folder: Path | None = None
    """Run folder: keep statistics here, for other plans of the same model and text."""
    command: str | None = None
    """The command line, for the record in the folder."""
    bars: ProgressBars | None = None
    """What shows progress bars: stage -> context manager of a callback."""


def prune_recipe(
    model: str | None = None,
    *,
    preset: str | None = None,
    file: str | Path | None = None,
    cut: Mapping[str, Any] | None = None,
    calibration: Mapping[str, Any] | None = None,
    loading: Mapping[str, Any] | None = None,
    plan: str | None = None,
) -> PruneRecipe:
    """A recipe from a preset, a recipe file over it, and single options over both. Raises `SecateurError`.

    >>> recipe = prune_recipe("demo", preset="fast", cut={"ratio": 0.3})
    >>> recipe.cut.ratio, recipe.calibration.samples
    (0.3, 24)
    """
    raw: dict[str, Any] = {} if file is None else read_recipe(file, "prune", PruneRecipe, also=("preset",))
    base = {name: dict(raw.get(name) or {}) for name in ("cut", "calibration", "loading")}
    if cut and cut.keys() & {"ratio", "target"}:  # one budget replaces another
        base["cut"] = {key: value for key, value in base["cut"].items() if key not in ("ratio", "target")}
    model = model if model is not None else raw.get("model")
    if model is None:
        raise RecipeError(f"{file or 'the recipe'}: no model. Expected one, for example `model: demo`")
    preset = preset or raw.get("preset") or "best"
    options, text = with_preset(preset, base["cut"] | dict(cut or {}), base["calibration"] | dict(calibration or {}))
    plan = plan if plan is not None else raw.get("plan")
    if plan is not None and file is not None:
        plan = str(Path(file).parent / plan)
    load_options = LoadOptions(**base["loading"] | dict(loading or {}))
    return PruneRecipe(model, cut=options, calibration=text, loading=load_options, plan=plan)


def recipe_text(command: str, recipe: Any) -> str:
    """A recipe as YAML; `command` is what replays it.

    >>> recipe_text("prune", PruneRecipe("demo")).splitlines()[1:4]
    ['command: prune', 'model: demo', 'cut:']
    """
    head = f"# Written by Secateur {__version__}. Replay: secateur {command} --recipe {RECIPE_FILE} OUT\n"
    values = {"command": command, **plain(recipe)}
    text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)
    if yaml.safe_load(text) != values:  # a name with a line break of Unicode: only in ASCII it is kept
        text = yaml.safe_dump(values, sort_keys=False, width=120)
    return head + text


def write_recipe(folder: Path, command: str, recipe: Any) -> None:
    """Put the recipe into a folder that is being written."""
    (folder / RECIPE_FILE).write_text(recipe_text(command, recipe), encoding="utf-8")


def read_recipe(file: str | Path, command: str, kind: type, *, also: tuple[str, ...] = ()) -> dict[str, Any]:
    """The values of a recipe file by field of the dataclass `kind`; nested sections stay mappings of checked values.

    Raises `RecipeError` for a file that is missing or no YAML, a recipe of another command, an unknown key and a value
    of the wrong type.
    """
    try:
        data = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RecipeError(f"{file}: no recipe can be read; {one_line(error)}") from error
    if not isinstance(data, dict):
        raise RecipeError(f"{file}: expected keys with values, for example `model: demo`; found {type(data).__name__}")
    if data.pop("command", command) != command:
        raise RecipeError(f"{file}: this is a recipe of another command. Expected `command: {command}`")
    extra = {name: data.pop(name) for name in also if name in data}
    return {**checked(kind, data, str(file)), **extra}


def load_recipe(file: str | Path) -> PruneRecipe:
    """The recipe of a cut in a file. Raises `RecipeError`, and `SecateurError` for options that cannot be."""
    return prune_recipe(file=file)


def plain(value: Any) -> Any:
    """A value as YAML and JSON hold it: dataclasses as mappings, tuples as lists, paths as text."""
    if is_dataclass(value) and not isinstance(value, type):
        return {each.name: plain(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, Mapping):
        return {str(name): plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value


def checked(kind: type, data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Values by field of a dataclass, each of the type that the field has. Raises `RecipeError`.

    >>> checked(CutOptions, {"axes": ["mlp"]}, "recipe.yaml: cut")
    {'axes': ('mlp',)}
    """
    hints = get_type_hints(kind)
    known = [each.name for each in fields(kind)]
    for name in data:
        if name not in known:
            hint = did_you_mean(str(name), known)
            raise RecipeError(f"{where}: {name!r} is unknown. Known: {', '.join(known)}{hint}")
    return {name: _typed(hints[name], value, f"{where}: {name}") for name, value in data.items()}


def build(kind: type[Options], data: Mapping[str, Any], where: str) -> Options:
    """The dataclass with these values, sections and all. Raises `RecipeError`, and what its own checks raise."""
    values = checked(kind, data, where)
    hints = get_type_hints(kind)
    for name, value in values.items():
        section = next((each for each in (hints[name], *get_args(hints[name])) if is_dataclass(each)), None)
        if isinstance(value, dict) and isinstance(section, type):
            values[name] = build(section, value, f"{where}: {name}")
    try:
        return kind(**values)
    except TypeError as error:  # a field that must be given
        raise RecipeError(f"{where}: {one_line(error)}") from error


def _typed(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        for each in sorted(arguments, key=lambda each: each is not type(None)):
            try:
                return _typed(each, value, where)
            except RecipeError:
                continue
    elif origin is Literal:
        if value in arguments:
            return value
    elif origin is tuple and isinstance(value, (list, tuple)):
        items = arguments[:1] * len(value) if arguments[-1:] == (...,) else arguments
        if len(items) == len(value):
            return tuple(_typed(each, item, where) for each, item in zip(items, value, strict=True))
    elif is_dataclass(hint) and isinstance(hint, type) and isinstance(value, Mapping):
        return checked(hint, value, where)
    elif origin is not None and isinstance(value, Mapping):
        return dict(value)
    elif hint is float and isinstance(value, str):  # YAML 1.1 reads 1e-4 as text
        try:
            return float(value)
        except ValueError:
            pass
    elif hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return value  # whole numbers stay whole: layers 4:30 are no shares
    elif hint is Path and isinstance(value, str):
        return Path(value)
    elif hint is Any or (hint is type(None) and value is None) or (isinstance(hint, type) and type(value) is hint):
        return value
    raise RecipeError(f"{where}: {value!r} is no {_name(hint)}{did_you_mean(str(value), _literals(hint))}")


def _literals(hint: Any) -> list[str]:
    return [str(each) for each in get_args(hint) if not isinstance(each, type)] if get_origin(hint) is Literal else []


def _name(hint: Any) -> str:
    return " or ".join(_literals(hint)) or getattr(hint, "__name__", str(hint))
