"""Structured pruning of language models: cut heads, channels, experts and layers, keep an ordinary model.

import secateur

secateur.prune_model("demo", "smaller")  # the default recipe: 20 % of the non-embedding parameters

The folders of the package are the stages, in the order in which data flows through them: models, data, discovery,
scoring, planning, pruning, vocabulary, checkpoint, evaluation, pipeline, recovery, export, report, compare, cli. What
is not named here is imported from them.
"""

from __future__ import annotations

import sys
from pathlib import Path

__version__ = "0.2.0.dev0"

from secateur.errors import SecateurError, check_versions

try:
    check_versions()
except ImportError as _error:
    if Path(sys.argv[0]).stem == "secateur":  # the command, whose errors are one line
        sys.exit(f"secateur: error: {_error}")
    raise

import secateur.models.silence  # noqa: F401 - before all that imports transformers
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
from secateur.pipeline.recipe import PruneRecipe, RunOptions, load_recipe, prune_recipe
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
