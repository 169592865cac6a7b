"""All that decides what `recover` writes, as plain data: built from a preset, a recipe file and single options."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

from secateur.data.calibration import DEMO, SELF, CalibrationOptions
from secateur.data.options import DataOptions
from secateur.errors import DataError, PlanError, RecipeError
from secateur.files import RECIPE_FILE
from secateur.models.options import LoadOptions
from secateur.models.sources import resolve
from secateur.pipeline.recipe import cut_options, load_recipe, read_recipe
from secateur.planning.options import CutOptions
from secateur.recovery.options import BUDGETS, RecoverOptions, with_preset


@dataclass(frozen=True, slots=True)
class RecoverRecipe:
    """All that decides what `recover` makes.

    >>> RecoverRecipe("small", DataOptions(("alpaca.json",))).options.method
    'auto'
    """

    model: str
    """Pruned folder, or any model; a dense one where it is cut first."""
    data: DataOptions
    """What to train on."""
    options: RecoverOptions = field(default_factory=RecoverOptions)
    """How to train."""
    _: KW_ONLY
    eval_texts: tuple[str, ...] = ()
    """Held-out texts, each NAME=FILE: the checkpoint with the lowest perplexity on them is kept. Without texts, the
    validation loss decides."""
    teacher: str | None = None
    """Teacher for distillation. Default: the dense model that the folder's record names, or that is cut first."""
    cut: CutOptions | None = None
    """Cut the model, then train it. Default: train it as it is."""
    calibration: CalibrationOptions | None = None
    """The text that scores and repair of the cut look at."""
    loading: LoadOptions = field(default_factory=LoadOptions)
    """Dtype and device of the models."""


def recover_recipe(
    model: str | None = None, *, preset: str | None = None, file: str | Path | None = None, **changes: Any
) -> RecoverRecipe:
    """A recipe from a preset, a recipe file over it, and single options over both. Raises `SecateurError`.

    `changes` are fields of `RecoverRecipe`; of `data`, `options`, `cut`, `calibration` and `loading` a mapping changes
    single options. Where no data is named, the model is trained on the texts that its cut looked at.

    >>> recipe = recover_recipe("small", preset="llm-pruner", data={"sources": ("alpaca.json",)}, options={"epochs": 1})
    >>> recipe.options.epochs, recipe.options.learning_rate
    (1, 0.0001)
    """
    raw = {} if file is None else read_recipe(file, "recover", RecoverRecipe)
    sections = {name: _merged(raw, changes, name) for name in ("data", "options", "loading")}
    if set(BUDGETS) & set(given := changes.get("options") or {}):  # one budget replaces another
        unset = {name for name in BUDGETS if name not in given}
        sections["options"] = {name: value for name, value in sections["options"].items() if name not in unset}
    sections["options"]["lora"] = _merged(raw.get("options") or {}, changes.get("options") or {}, "lora")
    model = model if model is not None else raw.get("model")
    if model is None:
        raise RecipeError(f"{file or 'the recipe'}: no model. Expected one, for example `model: small`")
    chosen: dict[str, Any] = {name: changes.get(name, raw.get(name)) for name in ("eval_texts", "teacher")}
    chosen |= _cut_first(raw, changes)
    if not sections["data"].get("sources"):
        sections["data"]["sources"] = _texts_of_the_cut(model, chosen.get("calibration"))
    options, data = with_preset(preset or raw.get("preset") or "default", sections["options"], sections["data"])
    chosen["eval_texts"] = chosen["eval_texts"] or ()
    return RecoverRecipe(model, data, options, **chosen, loading=LoadOptions(**sections["loading"]))


def _cut_first(raw: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The cut and its text, where there is one: those of a recipe file with single options over them."""
    given = {name: changes.get(name) for name in ("cut", "calibration")}
    of_file = {name: raw[name] for name in given if raw.get(name) is not None}
    if given["cut"] is None and "cut" not in of_file:
        if of_file or given["calibration"] is not None:
            raise PlanError("calibration is of a cut, and there is none. Expected one beside it, for example cut: {}")
        return {}
    whole = {name: each for name, each in given.items() if isinstance(each, CutOptions | CalibrationOptions)}
    cut, calibration = cut_options(of_file, *(None if name in whole else given[name] for name in given))
    return {"cut": cut, "calibration": calibration, **whole}


def _texts_of_the_cut(model: str, calibration: CalibrationOptions | None) -> tuple[str, ...]:
    """The texts that the cut looked at, with their weights: what is trained on unless other data is named."""
    if calibration is not None:
        return tuple(calibration.text)
    file = (resolve(model).path or Path(model)) / RECIPE_FILE
    with suppress(RecipeError):
        return tuple(load_recipe(file).calibration.text)
    with suppress(RecipeError):
        return tuple(read_recipe(file, "recover", RecoverRecipe)["data"]["sources"])
    raise DataError(
        f"--data is missing, and {model!r} has no {RECIPE_FILE} that names the text of its cut. Expected a file, a "
        f"data set, {DEMO} or {SELF} to train on, for example --data alpaca.json"
    )


def _merged(raw: Mapping[str, Any], changes: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {**(raw.get(name) or {}), **(changes.get(name) or {})}
