"""Structured pruning of language models: cut heads, channels, experts and layers, keep an ordinary model.

import secateur

secateur.prune_model("demo", "smaller")  # the default recipe: 20 % of the non-embedding parameters

The folders of the package are the stages, in the order in which data flows through them: models, data, discovery,
scoring, planning, pruning, vocabulary, checkpoint, evaluation, pipeline, recovery, export, report, compare, cli. What
is not named here is imported from them.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0.dev0"

from secateur.errors import SecateurError as SecateurError
from secateur.errors import check_versions

try:
    check_versions()
except ImportError as _error:
    if Path(sys.argv[0]).stem == "secateur":  # the command, whose errors are one line
        sys.exit(f"secateur: error: {_error}")
    raise

from secateur.models.silence import silence_imports
from secateur.progress import without_collection

silence_imports()

if TYPE_CHECKING:
    from secateur.checkpoint.save import save as save
    from secateur.checkpoint.verification import verify as verify
    from secateur.data.calibration import CalibrationOptions as CalibrationOptions
    from secateur.data.options import DataOptions as DataOptions
    from secateur.discovery.discover import discover as discover
    from secateur.evaluation.perplexity import evaluate as evaluate
    from secateur.evaluation.profile import profile as profile
    from secateur.export.gguf_file import export_gguf as export_gguf
    from secateur.models.inputs import register_inputs as register_inputs
    from secateur.models.loading import load as load
    from secateur.models.tokenizer import load_tokenizer as load_tokenizer
    from secateur.pipeline.options import RunOptions as RunOptions
    from secateur.pipeline.recipe import PruneRecipe as PruneRecipe
    from secateur.pipeline.recipe import load_recipe as load_recipe
    from secateur.pipeline.recipe import prune_recipe as prune_recipe
    from secateur.pipeline.run import plan_model as plan_model
    from secateur.pipeline.run import prune_model as prune_model
    from secateur.pipeline.sweep import sweep as sweep
    from secateur.planning.options import CutOptions as CutOptions
    from secateur.planning.plan import plan as plan
    from secateur.pruning.prune import prune as prune
    from secateur.pruning.repair import repair as repair
    from secateur.recovery.options import RecoverOptions as RecoverOptions
    from secateur.recovery.recipe import RecoverRecipe as RecoverRecipe
    from secateur.recovery.recover import recover as recover
    from secateur.scoring.registry import register_score as register_score
    from secateur.scoring.scores import score as score

# Imported on first use: they bring torch and transformers, which --help does not need.
_PLACES = {
    "CalibrationOptions": "secateur.data.calibration",
    "CutOptions": "secateur.planning.options",
    "DataOptions": "secateur.data.options",
    "PruneRecipe": "secateur.pipeline.recipe",
    "RecoverOptions": "secateur.recovery.options",
    "RecoverRecipe": "secateur.recovery.recipe",
    "RunOptions": "secateur.pipeline.options",
    "discover": "secateur.discovery.discover",
    "evaluate": "secateur.evaluation.perplexity",
    "export_gguf": "secateur.export.gguf_file",
    "load": "secateur.models.loading",
    "load_recipe": "secateur.pipeline.recipe",
    "load_tokenizer": "secateur.models.tokenizer",
    "plan": "secateur.planning.plan",
    "plan_model": "secateur.pipeline.run",
    "profile": "secateur.evaluation.profile",
    "prune": "secateur.pruning.prune",
    "prune_model": "secateur.pipeline.run",
    "prune_recipe": "secateur.pipeline.recipe",
    "recover": "secateur.recovery.recover",
    "register_inputs": "secateur.models.inputs",
    "register_score": "secateur.scoring.registry",
    "repair": "secateur.pruning.repair",
    "save": "secateur.checkpoint.save",
    "score": "secateur.scoring.scores",
    "sweep": "secateur.pipeline.sweep",
    "verify": "secateur.checkpoint.verification",
}
__all__ = ["SecateurError", *_PLACES]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with without_collection():
        value = getattr(importlib.import_module(_PLACES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})
