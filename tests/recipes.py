"""Recipes as tests want them: a preset's, with single options given by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from secateur.data.calibration import CalibrationOptions
from secateur.discovery.groups import Discovery
from secateur.models.options import LoadOptions
from secateur.pipeline.pipeline import Pipeline
from secateur.pipeline.recipe import PruneRecipe, prune_recipe
from secateur.planning.options import CutOptions
from secateur.planning.plan import Plan
from secateur.progress import Clock


def recipe(
    model: object,
    *,
    preset: str = "best",
    cut: Mapping[str, Any] | None = None,
    calibration: CalibrationOptions | None = None,
    loading: LoadOptions | None = None,
) -> PruneRecipe:
    """The preset's recipe, with these options of the cut, and another calibration or way to load."""
    made = prune_recipe(str(model), preset=preset, cut=cut)
    return replace(made, calibration=calibration or made.calibration, loading=loading or made.loading)


def cut_in_memory(
    model: PreTrainedModel,
    discovery: Discovery,
    options: CutOptions,
    windows: Tensor | None,
    stages: list[str] | None = None,
) -> tuple[PreTrainedModel, Plan]:
    """The model cut as the pipeline cuts it, on these windows, which scores and repair all see; notes the stages."""

    @contextmanager
    def bars(stage: str) -> Iterator[None]:
        if stages is not None:
            stages.append(stage)
        yield

    if windows is None:
        options = replace(options, repair="none", choose="score")
    calibration = CalibrationOptions(score_samples=None, varied=0.0)
    made = PruneRecipe("tiny", cut=options, calibration=calibration)
    return Pipeline(made, model=model, discovery=discovery, windows=windows, clock=Clock(bars)).cut()
