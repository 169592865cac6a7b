"""Cut whole heads, channels and layers out of a language model and keep an ordinary model.

import secateur

model, tokenizer = secateur.load("demo"), secateur.load_tokenizer("demo")
discovery = secateur.discover(model)
scores = secateur.score(model, tokenizer, discovery=discovery)
plan = secateur.plan(discovery, secateur.CutOptions(ratio=0.2), config=model.config, scores=scores)
pruned = secateur.prune(model, plan)
secateur.save(pruned, "smaller", plan=plan, tokenizer=tokenizer)
"""

from __future__ import annotations

__version__ = "0.1.0"

import secateur.models.silence  # noqa: F401 - before all that imports transformers
from secateur.checkpoint.save import save
from secateur.checkpoint.verification import Verified, verify
from secateur.data.calibration import CalibrationOptions
from secateur.data.options import DataOptions
from secateur.discovery.discover import discover
from secateur.discovery.groups import Discovery
from secateur.errors import (
    CheckpointError,
    DataError,
    DiscoveryError,
    DiskError,
    ExportError,
    ModelError,
    PageError,
    PlanError,
    ScoreError,
    SecateurError,
    TaskError,
    TrainingError,
    UntrustedCodeError,
)
from secateur.evaluation.costs import Profile
from secateur.evaluation.perplexity import Perplexity, evaluate
from secateur.evaluation.profile import profile
from secateur.evaluation.task_results import TaskResult
from secateur.evaluation.tasks import load_tasks, zero_shot
from secateur.export.gguf_file import GgufResult, export_gguf
from secateur.export.int8 import Int8Result, export_int8
from secateur.export.merge import MergeResult, merge_adapter
from secateur.export.options import GgufOptions, Int8Options, MergeOptions
from secateur.models.config import register
from secateur.models.loading import load
from secateur.models.tokenizer import load_tokenizer
from secateur.pipeline.run import Pruned, plan_model, prune_model
from secateur.pipeline.sweep import Sweep, sweep
from secateur.planning.options import CutOptions
from secateur.planning.plan import Plan, plan
from secateur.pruning.iterative import cut_in_steps
from secateur.pruning.prune import prune
from secateur.pruning.repair import Repaired, repair
from secateur.recovery.options import RecoverOptions
from secateur.recovery.recover import recover
from secateur.recovery.result import Recovered
from secateur.recovery.rounds import prune_and_recover
from secateur.report.page import Report, write_report
from secateur.scoring.scores import Scores, register_score, score
from secateur.scoring.statistics import Evidence, Statistics

__all__ = [
    "CalibrationOptions",
    "CheckpointError",
    "CutOptions",
    "DataError",
    "DataOptions",
    "Discovery",
    "DiscoveryError",
    "DiskError",
    "Evidence",
    "ExportError",
    "GgufOptions",
    "GgufResult",
    "Int8Options",
    "Int8Result",
    "MergeOptions",
    "MergeResult",
    "ModelError",
    "PageError",
    "Perplexity",
    "Plan",
    "PlanError",
    "Profile",
    "Pruned",
    "RecoverOptions",
    "Recovered",
    "Repaired",
    "Report",
    "ScoreError",
    "Scores",
    "SecateurError",
    "Statistics",
    "Sweep",
    "TaskError",
    "TaskResult",
    "TrainingError",
    "UntrustedCodeError",
    "Verified",
    "cut_in_steps",
    "discover",
    "evaluate",
    "export_gguf",
    "export_int8",
    "load",
    "load_tasks",
    "load_tokenizer",
    "merge_adapter",
    "plan",
    "plan_model",
    "profile",
    "prune",
    "prune_and_recover",
    "prune_model",
    "recover",
    "register",
    "register_score",
    "repair",
    "save",
    "score",
    "sweep",
    "verify",
    "write_report",
    "zero_shot",
]
