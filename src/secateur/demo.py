"""The whole path once, on a model and a text that are already on the machine; every stage's value is kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from secateur.checkpoint.record import make_record
from secateur.checkpoint.save import check_saveable, save
from secateur.checkpoint.tensor_accounting import account_for_tensors
from secateur.data.calibration import CalibrationOptions
from secateur.data.text import demo_texts
from secateur.data.windows import calibration_windows
from secateur.discovery.discover import discover
from secateur.discovery.groups import Discovery
from secateur.errors import CheckpointError
from secateur.evaluation.costs import Profile
from secateur.evaluation.inference import sample_text
from secateur.evaluation.perplexity import Perplexity, evaluate
from secateur.evaluation.profile import profile
from secateur.evaluation.protocols import Protocol
from secateur.evaluation.texts import DEMO_TEXT
from secateur.files import atomic_folder, check_vacant, write_json
from secateur.models.config import load_config
from secateur.models.loading import LoadOptions, load
from secateur.models.silence import quiet
from secateur.models.sources import DEMO
from secateur.models.tensors import check_finite
from secateur.models.tokenizer import load_tokenizer
from secateur.pipeline.run import Pruned
from secateur.pipeline.run_log import append_entry
from secateur.planning.options import CutOptions, calibration_for, options_for, settled
from secateur.planning.plan import Plan, plan
from secateur.planning.selection import groups_to_cut
from secateur.progress import Clock, ProgressBars, peak_rss
from secateur.pruning.prune import prune
from secateur.pruning.repair import repair
from secateur.report.page import write_report
from secateur.scoring.scores import score, write_scores

PROMPT = "A pruning saw cuts"
SEQ_LENS = (128, 1024)
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
            "perplexity": {name: [asdict(p) for p in results] for name, results in self.perplexity.items()},
            "profiles": [row.to_json() for row in self.profiles],
            "prompt": PROMPT,
            "samples": dict(self.samples),
            "seconds": dict(self.seconds),
        }


def demonstrate(
    out: str | Path,
    *,
    preset: str = "fast",
    cut: Mapping[str, Any] | None = None,
    loading: LoadOptions | None = None,
    seed: int = 0,
    overwrite: bool = False,
    command: str | None = None,
    bars: ProgressBars | None = None,
) -> Demonstration:
    """Prune the demo model into `out`/pruned, load it again, and measure both.

    The text is CPython's own language reference: one half calibrates, the other evaluates. Beside the pruned model
    the folder holds the discovery, the scores, the plan, the measurements, the samples, the log and the report of
    all of it; it appears whole or not at all. Raises `SecateurError`.
    """
    out = Path(out)
    check_vacant(out, overwrite=overwrite, mark=SUMMARY_FILE)
    loading = loading or LoadOptions()
    clock = Clock(bars) if bars else Clock()
    with clock.stage("discover"):
        discovery = discover(DEMO)
    options = options_for(preset, discovery, cut or {})
    config = load_config(DEMO)
    check_saveable(plan(discovery, options, config=config), config=config, discovery=discovery)
    with atomic_folder(out, overwrite=overwrite, mark=SUMMARY_FILE) as folder:
        found = _run(
            out,
            folder,
            discovery,
            options,
            calibration=settled(calibration_for(preset, seed=seed), options),
            loading=loading,
            command=command,
            clock=clock,
        )
        write_json(folder / SUMMARY_FILE, found.to_json())
        _append_to_log(found, folder, seed=seed, command=command)
        write_report(folder, folder / REPORT_FILE)
    return found


def _append_to_log(found: Demonstration, folder: Path, *, seed: int, command: str | None) -> None:
    """Log what `prune`, `evaluate` and `profile` would; the models' names are what to call them by from outside."""
    line, names = command or "secateur.demo.demonstrate", {"dense": DEMO, "pruned": str(found.out / "pruned")}
    written = Pruned(found.plan, found.out / "pruned", found.seconds, peak_rss())
    append_entry(folder, line, "prune", written.to_json(), seed=seed, models=list(names.values()))
    rows = [
        {
            "model": names[name],
            "perplexity": [asdict(measured) for measured in results],
            "tasks": {},
            "samples": [{"prompt": PROMPT, "text": found.samples[name]}],
        }
        for name, results in found.perplexity.items()
    ]
    append_entry(folder, line, "evaluate", {"results": rows}, seed=seed, models=list(names.values()))
    profiles = [row.to_json() | {"model": names[row.model]} for row in found.profiles]
    for row in profiles:
        if "against" in row:
            row["against"] = {**row["against"], "model": names[row["against"]["model"]]}
    append_entry(folder, line, "profile", {"results": profiles}, seed=seed, models=list(names.values()))


def _run(
    out: Path,
    folder: Path,
    discovery: Discovery,
    options: CutOptions,
    *,
    calibration: CalibrationOptions,
    loading: LoadOptions,
    command: str | None,
    clock: Clock,
) -> Demonstration:
    """Every stage, each with its value written to `folder`, which is to become `out`."""
    write_json(folder / "discovery.json", discovery.to_json())
    with clock.stage("load"):
        dense = load(DEMO, dtype=loading.dtype, device=loading.device)
        tokenizer = load_tokenizer(DEMO)
        check_finite(dense)
    with clock.stage("score") as progress:
        scores = score(
            dense,
            tokenizer,
            discovery=discovery,
            name=options.score,
            reduce=options.reduce,
            calibration=calibration,
            groups=[group.name for groups in groups_to_cut(discovery, options).values() for group in groups],
            progress=progress,
        )
    write_scores(folder / "scores.safetensors", scores)
    with clock.stage("plan"):
        decided = plan(discovery, options, config=dense.config, scores=scores)
    weights: Mapping[str, Tensor] = {}
    if options.repairs:
        with clock.stage("repair") as progress:
            repaired = repair(
                dense,
                decided,
                discovery,
                calibration_windows(tokenizer, calibration),
                method=options.repair,
                choose=options.choose == "obs",
                progress=progress,
            )
        decided, weights = repaired.plan, repaired.weights
    write_json(folder / "plan.json", decided.to_json())
    with clock.stage("cut"):
        pruned = prune(dense, decided, discovery=discovery, weights=weights)
    with clock.stage("save"):
        record = make_record(
            dense,
            name=DEMO,
            calibration=scores.calibration,
            calibration_options=decided.scored["calibration_options"],
            seed=calibration.seed,
            command=command,
            tensors=account_for_tensors(dense, pruned, decided, discovery),
        )
        save(pruned, folder / "pruned", plan=decided, tokenizer=tokenizer, record=record)
    with clock.stage("reload"):
        reloaded = _reload(folder / "pruned", pruned, stock=decided.settings is not None)
    models = {"dense": dense, "pruned": reloaded}
    evaluation = {DEMO_TEXT: demo_texts()[1]}
    perplexity = {}
    for name, each in models.items():
        with clock.stage(f"evaluate {name}") as progress:
            protocols = [Protocol(length) for length in SEQ_LENS]
            results = evaluate(
                each, tokenizer, evaluation, protocols=protocols, max_tokens=MAX_TOKENS, progress=progress
            )
        perplexity[name] = tuple(results)
    write_json(folder / "evaluation.json", {name: [asdict(p) for p in found] for name, found in perplexity.items()})
    with clock.stage("profile"):
        profiles = tuple(profile(models))
    write_json(folder / "profile.json", [row.to_json() for row in profiles])
    with clock.stage("sample"):
        samples = {name: sample_text(each, tokenizer, PROMPT, new_tokens=32) for name, each in models.items()}
    write_json(folder / "samples.json", {"prompt": PROMPT, **samples})
    return Demonstration(out, decided, perplexity, profiles, samples, clock.seconds)


def _reload(folder: Path, pruned: PreTrainedModel, *, stock: bool) -> PreTrainedModel:
    """Load the folder as anyone would; its logits must be those of the model in memory."""
    with quiet():
        reloaded: PreTrainedModel = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=pruned.dtype)
            if stock
            else load(str(folder), dtype=pruned.dtype, device="cpu")  # the file of code that lies there is our own
        )
    reloaded = reloaded.to(pruned.device).eval()  # type: ignore[arg-type]  # transformers wraps `to`
    ids = torch.arange(32, device=pruned.device)[None]
    with torch.inference_mode():
        if not torch.equal(reloaded(input_ids=ids).logits, pruned(input_ids=ids).logits):
            raise CheckpointError(f"{folder}: the model loaded from it gives other logits than the one in memory")
    return reloaded
