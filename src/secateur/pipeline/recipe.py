"""Recipes: the options of a run as one YAML file.

A recipe holds all that decides the weights; `RunOptions` (`options.py`) holds the rest. Every folder that a command
writes has the recipe that makes it again: `secateur prune --recipe OUT/recipe.yaml AGAIN`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import KW_ONLY, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

from secateur import __version__
from secateur.data.calibration import CalibrationOptions
from secateur.decoding import build, check_fields, values_by_field
from secateur.errors import RecipeError, one_line
from secateur.files import RECIPE_FILE, plain
from secateur.models.options import LoadOptions
from secateur.planning.options import CutOptions, automatic, settled, with_preset

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


def prune_recipe(
    model: str | None = None,
    *,
    preset: str | None = None,
    file: str | Path | None = None,
    cut: Mapping[str, Any] | None = None,
    calibration: Mapping[str, Any] | None = None,
    loading: Mapping[str, Any] | None = None,
) -> PruneRecipe:
    """A recipe from a preset, a recipe file over it, and single options over both. Raises `SecateurError`.

    >>> recipe = prune_recipe("demo", preset="fast", cut={"ratio": 0.3})
    >>> recipe.cut.ratio, recipe.calibration.samples
    (0.3, 24)
    """
    with _errors_of_recipes():
        check_fields(CutOptions, cut or {}, "cut")
        check_fields(CalibrationOptions, calibration or {}, "calibration")
        check_fields(LoadOptions, loading or {}, "loading")
    raw: dict[str, Any] = {} if file is None else read_recipe(file, "prune", PruneRecipe)
    model = model if model is not None else raw.get("model")
    if model is None:
        raise RecipeError(f"{file or 'the recipe'}: no model. Expected one, for example `model: demo`")
    options, text = cut_options(raw, cut, calibration, preset=preset)
    plan = None if file is None or raw.get("plan") is None else str(Path(file).parent / raw["plan"])
    load_options = LoadOptions(**dict(raw.get("loading") or {}) | dict(loading or {}))
    return PruneRecipe(model, cut=options, calibration=text, loading=load_options, plan=plan)


def cut_options(
    raw: Mapping[str, Any],
    cut: Mapping[str, Any] | None = None,
    calibration: Mapping[str, Any] | None = None,
    *,
    preset: str | None = None,
) -> tuple[CutOptions, CalibrationOptions]:
    """The options of a recipe, as read, with single ones over those of its sections `cut` and `calibration`.

    >>> cut_options({"preset": "fast", "cut": {"target": 1e8, "of": "parameters"}}, {"ratio": 0.3})[0].target is None
    True
    """
    base, text = (dict(raw.get(name) or {}) for name in ("cut", "calibration"))
    if cut and preset is None and base.keys() == {each.name for each in fields(CutOptions)}:
        base, text = _as_given(base, text)
    if cut and cut.keys() & {"ratio", "target"}:  # one budget replaces another
        base = {key: value for key, value in base.items() if key not in ("ratio", "target")}
    preset = preset or raw.get("preset") or "best"
    return with_preset(preset, base | dict(cut or {}), text | dict(calibration or {}))


def _as_given(cut: Mapping[str, Any], calibration: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of a recipe that was written with a folder, without those that followed from the others."""
    options = CutOptions(**cut)
    usual, shares = automatic(options), asdict(settled(CalibrationOptions(), options))
    return (
        {name: value for name, value in cut.items() if value != usual.get(name)},
        {
            name: value
            for name, value in calibration.items()
            if name not in ("varied", "copied") or value != shares[name]
        },
    )


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


def read_recipe(file: str | Path, command: str, kind: type[Any]) -> dict[str, Any]:
    """The values of a recipe file by field of the dataclass `kind`, and its `preset`; sections stay mappings.

    Raises `RecipeError` for a file that is missing or no YAML, a recipe of another command, an unknown key and a value
    of the wrong type.
    """
    with _errors_of_recipes():
        data = _read_yaml(file, command)
        preset = {name: data.pop(name) for name in ("preset",) if name in data}
        return {**values_by_field(kind, data, str(file)), **preset}


def read_whole_recipe(file: str | Path, command: str, kind: type[Options]) -> Options:
    """The dataclass `kind` from a recipe file. Raises `RecipeError`, and what the dataclass's own checks raise."""
    with _errors_of_recipes():
        return build(kind, _read_yaml(file, command), str(file))


@contextmanager
def _errors_of_recipes() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise RecipeError(str(error)) from error


def _read_yaml(file: str | Path, command: str) -> dict[str, Any]:
    try:
        data = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise RecipeError(f"{file}: no recipe can be read; {one_line(error)}") from error
    if not isinstance(data, dict):
        raise RecipeError(f"{file}: expected keys with values, for example `model: demo`; found {type(data).__name__}")
    if data.pop("command", command) != command:
        raise RecipeError(f"{file}: this is a recipe of another command. Expected `command: {command}`")
    return data


def load_recipe(file: str | Path) -> PruneRecipe:
    """The recipe of a cut in a file. Raises `RecipeError`, and `SecateurError` for options that cannot be."""
    return prune_recipe(file=file)
