"""The whole way on what is already on the machine: prune the demo model, measure it beside the dense one, report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from secateur.evaluation.costs import Profile
from secateur.evaluation.evaluate import ModelEvaluation, as_json, evaluate_model, load_inputs
from secateur.evaluation.options import EvaluationOptions
from secateur.evaluation.profile import profile
from secateur.files import atomic_folder, check_vacant, write_json
from secateur.models.loading import load
from secateur.models.tokenizer import load_tokenizer
from secateur.pipeline.options import RunOptions
from secateur.pipeline.recipe import PruneRecipe
from secateur.pipeline.run import Pruned, prune_model
from secateur.pipeline.run_log import append_entry
from secateur.planning.plan import Plan
from secateur.progress import Clock
from secateur.report.page import write_report

PROMPT = "A pruning saw cuts"
PROTOCOLS = ("served@128", "served@1024")
MAX_TOKENS = 4096
REPORT_FILE = "report.html"
SUMMARY_FILE = "summary.json"  # by which a folder is known to be a run of the demo


@dataclass(frozen=True, slots=True)
class Demonstration:
    """What the demo measured, dense and pruned."""

    out: Path
    plan: Plan
    evaluations: tuple[ModelEvaluation, ...]
    profiles: tuple[Profile, ...]
    seconds: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        """Plain data, as the run folder's summary.json holds it."""
        return {
            "out": str(self.out),
            "plan": self.plan.to_json(),
            "perplexity": {each.model: [p.to_json() for p in each.perplexity] for each in self.evaluations},
            "profiles": [row.to_json() for row in self.profiles],
            "prompt": PROMPT,
            "samples": {each.model: each.samples[PROMPT] for each in self.evaluations},
            "seconds": dict(self.seconds),
        }


def demonstrate(recipe: PruneRecipe, out: str | Path, *, run: RunOptions | None = None) -> Demonstration:
    """Prune the recipe's model into `out`/pruned, load it as anyone would, and measure both.

    The text is CPython's own language reference: one half calibrates, the other evaluates. The folder also holds the
    statistics, the scores, the measurements and the report; it appears whole or not at all. Raises `SecateurError`.
    """
    out, run = Path(out), run or RunOptions()
    check_vacant(out, overwrite=run.overwrite, mark=SUMMARY_FILE)
    clock = Clock(run.bars)
    with atomic_folder(out, overwrite=run.overwrite, mark=SUMMARY_FILE) as folder:
        pruned = prune_model(recipe, folder / "pruned", run=replace(run, folder=folder, overwrite=False))
        with clock.stage("reload"):
            models = {
                "dense": load(recipe.model, dtype=recipe.loading.dtype, device=recipe.loading.device),
                "pruned": load(str(pruned.out), device=recipe.loading.device),
            }
        tokenizer = load_tokenizer(str(pruned.out))
        options = EvaluationOptions(protocols=PROTOCOLS, max_tokens=MAX_TOKENS, prompts=(PROMPT,), new_tokens=32)
        inputs = load_inputs(options)
        measured = [evaluate_model(name, each, tokenizer, inputs, bars=clock.stage) for name, each in models.items()]
        with clock.stage("profile"):
            profiles = profile(models)
        seconds = {**pruned.seconds, **clock.seconds}
        found = Demonstration(out, pruned.plan, tuple(measured), tuple(profiles), seconds)
        write_json(folder / SUMMARY_FILE, found.to_json())
        _log(found, replace(pruned, out=out / "pruned"), recipe, folder, run)
        write_report(folder, folder / REPORT_FILE)
    return found


def _log(found: Demonstration, pruned: Pruned, recipe: PruneRecipe, folder: Path, run: RunOptions) -> None:
    """Enter what `prune`, `evaluate` and `profile` would, with the models as they are called from outside."""
    line, names = run.command or "secateur demo", {"dense": recipe.model, "pruned": str(pruned.out)}
    evaluated = as_json([replace(each, model=names[each.model]) for each in found.evaluations])
    profiles = [replace(each, model=names[each.model], first_model=recipe.model) for each in found.profiles]
    costs = {"results": [each.to_json() for each in profiles]}
    logged = {"prune": pruned.to_json(), "evaluate": evaluated, "profile": costs}
    for command, result in logged.items():
        append_entry(folder, line, command, result, seed=recipe.calibration.seed, models=list(names.values()))
