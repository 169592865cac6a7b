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

import secateur.hushed  # noqa: F401 - before all that imports transformers
from secateur.axes import Discovery, discover
from secateur.calibration import CalibrationOptions
from secateur.checkpoint import Verified, save, verify
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
from secateur.evaluate import Perplexity, evaluate
from secateur.export import Exported, export_gguf
from secateur.merge import Merged, merge_adapter
from secateur.models import load, load_tokenizer, register
from secateur.plan import CutOptions, Plan, plan
from secateur.profile import Profile, profile
from secateur.prune import prune
from secateur.quantize import Quantised, export_int8
from secateur.recover import Recovered, RecoverOptions, prune_and_recover, recover
from secateur.repair import Repaired, repair
from secateur.report import Report, write_report
from secateur.run import Pruned, plan_model, prune_model
from secateur.scores import Scores, register_score, score
from secateur.statistics import Evidence, Statistics
from secateur.steps import cut_in_steps
from secateur.sweep import Sweep, sweep
from secateur.tuning_data import DataOptions
from secateur.zero_shot import TaskResult, load_tasks, zero_shot

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
    "Exported",
    "Merged",
    "ModelError",
    "PageError",
    "Perplexity",
    "Plan",
    "PlanError",
    "Profile",
    "Pruned",
    "Quantised",
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
