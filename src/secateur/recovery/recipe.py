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
class RoundOptions:
    """How a dense model is cut in rounds, each followed by a training."""

    count: int = 3
    """Number of rounds; each removes the same part of what the whole cut removes, then trains."""
    cut: CutOptions = field(default_factory=CutOptions)
    """The whole cut, of all rounds together."""
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)
    """The text that scores and repair look at."""


@dataclass(frozen=True, slots=True)
class RecoverRecipe:
    """All that decides what `recover` makes.

    >>> RecoverRecipe("small", DataOptions(("alpaca.json",))).options.method
    'auto'
    """

    model: str
    """Pruned folder, or any model; a dense model where it is cut in rounds."""
    data: DataOptions
    """What to train on."""
    options: RecoverOptions = field(default_factory=RecoverOptions)
    """How to train."""
    _: KW_ONLY
    eval_texts: tuple[str, ...] = ()
    """Held-out texts, each NAME=FILE: the checkpoint with the lowest perplexity on them is kept. Without texts, the
    validation loss decides."""
    teacher: str | None = None
    """Teacher for distillation. Default: the dense model that the folder's record names, or that is cut in rounds."""
    rounds: RoundOptions | None = None
    """Cut the model and train it, in rounds. Default: train it as it is."""
    loading: LoadOptions = field(default_factory=LoadOptions)
    """Dtype and device of the models."""


def recover_recipe(
    model: str | None = None, *, preset: str | None = None, file: str | Path | None = None, **changes: Any
) -> RecoverRecipe:
    """A recipe from a preset, a recipe file over it, and single options over both. Raises `SecateurError`.

    `changes` are fields of `RecoverRecipe`; of `data`, `options`, `rounds` and `loading` a mapping changes single
    options. Where no data is named, the model is trained on the texts that its cut looked at.

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
    chosen["rounds"] = _rounds(raw.get("rounds"), changes.get("rounds"))
    if not sections["data"].get("sources"):
        sections["data"]["sources"] = _texts_of_the_cut(model, chosen["rounds"])
    options, data = with_preset(preset or raw.get("preset") or "default", sections["options"], sections["data"])
    chosen["eval_texts"] = chosen["eval_texts"] or ()
    return RecoverRecipe(model, data, options, **chosen, loading=LoadOptions(**sections["loading"]))


def _rounds(of_file: Mapping[str, Any] | None, given: RoundOptions | Mapping[str, Any] | None) -> RoundOptions | None:
    """The rounds of a recipe file with single options over them; what no file says is cut at once, in one round."""
    if isinstance(given, RoundOptions) or (of_file is None and given is None):
        return given
    base, given = {"count": 1} if of_file is None else of_file, given or {}
    if of_file is None and "cut" not in given:
        raise PlanError("rounds: say how much is to go in all, for example --rounds 3 --ratio 0.5")
    kinds = {"cut": CutOptions, "calibration": CalibrationOptions}
    whole = {name: given[name] for name, kind in kinds.items() if isinstance(given.get(name), kind)}  # which say all
    cut, calibration = cut_options(base, *(None if name in whole else given.get(name) for name in kinds))
    return RoundOptions(**{**base, **given, "cut": cut, "calibration": calibration, **whole})


def _texts_of_the_cut(model: str, rounds: RoundOptions | None) -> tuple[str, ...]:
    """The texts that the cut looked at, with their weights: what is trained on unless other data is named."""
    if rounds is not None:
        return tuple(rounds.calibration.text)
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
