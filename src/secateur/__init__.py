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

from secateur.errors import SecateurError, check_versions

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
    from secateur.checkpoint.save import save
    from secateur.checkpoint.verification import verify
    from secateur.data.calibration import CalibrationOptions
    from secateur.data.options import DataOptions
    from secateur.discovery.discover import discover
    from secateur.evaluation.perplexity import evaluate
    from secateur.evaluation.profile import profile
    from secateur.export.gguf_file import export_gguf
    from secateur.models.inputs import register_inputs
    from secateur.models.loading import load
    from secateur.models.tokenizer import load_tokenizer
    from secateur.pipeline.options import RunOptions
    from secateur.pipeline.recipe import PruneRecipe, load_recipe, prune_recipe
    from secateur.pipeline.run import plan_model, prune_model
    from secateur.pipeline.sweep import sweep
    from secateur.planning.options import CutOptions
    from secateur.planning.plan import plan
    from secateur.pruning.prune import prune
    from secateur.pruning.repair import repair
    from secateur.recovery.options import RecoverOptions
    from secateur.recovery.recipe import RecoverRecipe
    from secateur.recovery.recover import recover
    from secateur.scoring.registry import register_score
    from secateur.scoring.scores import score

__all__ = [
    "CalibrationOptions",
    "CutOptions",
    "DataOptions",
    "PruneRecipe",
    "RecoverOptions",
    "RecoverRecipe",
    "RunOptions",
    "SecateurError",
    "discover",
    "evaluate",
    "export_gguf",
    "load",
    "load_recipe",
    "load_tokenizer",
    "plan",
    "plan_model",
    "profile",
    "prune",
    "prune_model",
    "prune_recipe",
    "recover",
    "register_inputs",
    "register_score",
    "repair",
    "save",
    "score",
    "sweep",
    "verify",
]

# Imported when they are asked for, for torch and transformers come with them: the command line needs neither to help.
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


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with without_collection():
        value = getattr(importlib.import_module(_PLACES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})
