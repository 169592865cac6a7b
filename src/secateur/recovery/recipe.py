"""All that decides the weights of a trained folder, as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from secateur.data.calibration import CalibrationOptions
from secateur.data.options import DataOptions
from secateur.errors import RecipeError
from secateur.models.loading import LoadOptions
from secateur.pipeline.recipe import build, read_recipe
from secateur.planning.options import CutOptions
from secateur.recovery.options import RecoverOptions


@dataclass(frozen=True, slots=True)
class RecoverRecipe:
    """Train a pruned folder: all that decides the weights of the result, as plain data.

    >>> RecoverRecipe("small", DataOptions(("alpaca.json",))).options.method
    'lora'
    """

    model: str
    """Pruned folder, or any model."""

    data: DataOptions
    """What to train on."""

    options: RecoverOptions = field(default_factory=RecoverOptions)
    """How to train."""

    eval_texts: tuple[str, ...] = ()
    """Held-out texts, each NAME=FILE: the checkpoint with the lowest perplexity on them is kept. Without texts, the
    validation loss decides."""

    teacher: str | None = None
    """Teacher for distillation. Default: the dense model that the folder's record names."""

    loading: LoadOptions = field(default_factory=LoadOptions)
    """How models are loaded."""


@dataclass(frozen=True, slots=True)
class RoundsRecipe:
    """Cut a dense model and train what is left, several times: all that decides the weights of the result."""

    training: RecoverRecipe
    """How each round trains. Its model is the dense model, which is also the teacher unless another is named."""

    cut: CutOptions = field(default_factory=CutOptions)
    """The whole cut, of all rounds together."""

    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)
    """The text that scores and repair look at."""

    rounds: int = 3
    """Number of rounds; each removes the same part of what the whole cut removes, then trains."""


def load_recover_recipe(file: str | Path) -> RecoverRecipe | RoundsRecipe:
    """The recipe of a training in a file; one with `training` and `rounds` is of rounds. Raises `RecipeError`."""
    kind: type[RecoverRecipe] | type[RoundsRecipe] = RecoverRecipe
    try:
        data = read_recipe(file, "recover", RecoverRecipe)
    except RecipeError:
        kind, data = RoundsRecipe, read_recipe(file, "recover", RoundsRecipe)
    return build(kind, data, str(file))
