"""The whole way on what is already on the machine: prune the demo model, measure it beside the dense one, report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from secateur.data.text import demo_texts
from secateur.evaluation.costs import Profile
from secateur.evaluation.inference import sample_text
from secateur.evaluation.perplexity import Perplexity, evaluate
from secateur.evaluation.profile import profile
from secateur.files import atomic_folder, check_vacant, write_json
from secateur.models.loading import load
from secateur.models.tokenizer import load_tokenizer
from secateur.pipeline.recipe import PruneRecipe, RunOptions
from secateur.pipeline.run import Pruned, prune_model
from secateur.pipeline.run_log import append_entry
from secateur.planning.plan import Plan
from secateur.progress import Clock
from secateur.report.page import write_report

PROMPT = "A pruning saw cuts"
PROTOCOLS = ("llm-pruner@128", "llm-pruner@1024")
MAX_TOKENS = 4096
REPORT_FILE = "report.html"
SUMMARY_FILE = "summary.json"  # by which a folder is known to be a run of the demo


@dataclass(frozen=True, slots=True)
class Demonstration:
    """What the demo measured, dense and pruned."""

    out: Path
    plan: Plan
    perplexity: Mapping[str, tuple[Perplexity, ...]]
    profiles: tuple[Profile, ...]
    samples: Mapping[str, str]
    seconds: Mapping[str, float]

    @property
    def report(self) -> Path:
        """The page that shows all of it."""
        return self.out / REPORT_FILE

    def to_json(self) -> dict[str, Any]:
        """Plain data, as the run folder's summary.json holds it."""
        return {
            "out": str(self.out),
            "plan": self.plan.to_json(),
            "perplexity": {name: [p.to_json() for p in results] for name, results in self.perplexity.items()},
            "profiles": [row.to_json() for row in self.profiles],
            "prompt": PROMPT,
            "samples": dict(self.samples),
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
        found = _measured(out, pruned, models, clock)
        write_json(folder / SUMMARY_FILE, found.to_json())
        _log(found, replace(pruned, out=out / "pruned"), recipe, folder, run)
        write_report(folder, folder / REPORT_FILE)
    return found


def _measured(out: Path, pruned: Pruned, models: Mapping[str, PreTrainedModel], clock: Clock) -> Demonstration:
    """Perplexity, size, speed and a sample of both models."""
    tokenizer, texts = load_tokenizer(str(pruned.out)), {"python reference": demo_texts()[1]}
    perplexity = {}
    for name, model in models.items():
        with clock.stage(f"evaluate {name}") as progress:
            results = evaluate(model, tokenizer, texts, protocols=PROTOCOLS, max_tokens=MAX_TOKENS, progress=progress)
        perplexity[name] = tuple(results)
    with clock.stage("profile"):
        profiles = tuple(profile(models))
    with clock.stage("sample"):
        samples = {name: sample_text(model, tokenizer, PROMPT, new_tokens=32) for name, model in models.items()}
    seconds = {**pruned.seconds, **clock.seconds}
    return Demonstration(out, pruned.plan, perplexity, profiles, samples, seconds)


def _log(found: Demonstration, pruned: Pruned, recipe: PruneRecipe, folder: Path, run: RunOptions) -> None:
    """Enter what `prune`, `evaluate` and `profile` would, with the models as they are called from outside."""
    line, names = run.command or "secateur demo", {"dense": recipe.model, "pruned": str(pruned.out)}
    evaluated = []
    for name, results in found.perplexity.items():
        samples, perplexity = [{"prompt": PROMPT, "text": found.samples[name]}], [each.to_json() for each in results]
        evaluated.append({"model": names[name], "perplexity": perplexity, "tasks": {}, "samples": samples})
    profiles = [row.to_json() | {"model": names[row.model]} for row in found.profiles]
    for row in profiles:
        if "against" in row:
            row["against"] = {**row["against"], "model": names[row["against"]["model"]]}
    logged = {"prune": pruned.to_json(), "evaluate": {"results": evaluated}, "profile": {"results": profiles}}
    for command, result in logged.items():
        append_entry(folder, line, command, result, seed=recipe.calibration.seed, models=list(names.values()))
