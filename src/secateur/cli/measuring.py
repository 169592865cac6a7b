"""Commands that measure models: what they lose, and what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from secateur.cli.options import MODEL, Fields, Folder, Given, Inputs, Loading, Measured, main
from secateur.cli.output import check_files, finish, progress_bars
from secateur.cli.reading import comma_separated, run_file, whole_numbers
from secateur.errors import ModelError, TaskError
from secateur.evaluation.options import EvaluationOptions, ProfileOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from secateur.evaluation.evaluate import ModelEvaluation

PlanFile = Annotated[Path | None, main("Also each MODEL as this plan prunes it, in memory.")]
EVALUATION = Fields(
    EvaluationOptions,
    main="texts protocols max_tokens tasks tasks_data limit prompts",
    names={"texts": "--ppl", "protocols": "--protocol", "prompts": "--prompt"},
    read={"tasks": comma_separated},
)
PROFILE = Fields(
    ProfileOptions,
    main="seq_lens batch_sizes new_tokens repeats sizes_only",
    names={"seq_lens": "--seq-len", "batch_sizes": "--batch"},
    read=dict.fromkeys(("seq_lens", "batch_sizes"), whole_numbers),
    expected=dict.fromkeys(("seq_lens", "batch_sizes"), "whole numbers, for example 64 or 64,512"),
)


def evaluate_command(
    *models: Annotated[str, MODEL],
    options: Annotated[Given, EVALUATION],
    plan: PlanFile = None,
    run: Folder,
    loading: Loading,
    output: Measured,
) -> None:
    """Measure perplexity, accuracy in tasks, and see samples of text.

    Every model stands beside the first one given, window by window and question by question. Without --ppl, --tasks or
    --prompt the text is the half of Python's language reference that calibration does not see.
    """
    from secateur.checkpoint.record import read_record
    from secateur.evaluation.contamination import warn_of_overlap
    from secateur.evaluation.evaluate import as_json, evaluate_model, load_inputs, of_same_text
    from secateur.models.config import check_writes_text, load_config
    from secateur.models.loading import load
    from secateur.models.tokenizer import load_tokenizer
    from secateur.models.weight_files import weight_file_bytes
    from secateur.pipeline.run import prune_as_planned
    from secateur.planning.plan import read_plan
    from secateur.report.tables.evaluation import evaluation_tables
    from secateur.vocabulary.tokenizer import cut_tokenizer

    _check_named(models, "evaluate")
    check_files(output.json, run=run.get("folder"))
    bars = progress_bars(quiet=output.quiet)
    for name in models:
        config = load_config(name, trust_remote_code=loading.trust_remote_code)
        check_writes_text(config, name=name, doing="evaluate")  # refused before another is measured
    planned = read_plan(plan) if plan is not None else None
    if options.get("tasks") == ():
        raise TaskError("tasks=',' names no task. Expected for example --tasks boolq,piqa, or --tasks zero-shot")
    inputs = load_inputs(EvaluationOptions(**options))
    results: list[ModelEvaluation] = []
    first: PreTrainedTokenizerBase | None = None
    for name in models:
        with bars(f"load {name}"):
            model = load(name, dtype=loading.dtype, device=loading.device, trust_remote_code=loading.trust_remote_code)
            tokenizer = load_tokenizer(name, trust_remote_code=loading.trust_remote_code)
        record = read_record(Path(name))
        for calibrated in (record.to_json() if record else None, planned.scored if planned else None):
            if calibrated and not output.quiet:
                warn_of_overlap(name, tokenizer, inputs.texts, calibrated)
        first = first or tokenizer
        variants = {name: (model, tokenizer)}
        if planned is not None:
            keep = planned.kept_tokens
            reader = tokenizer if keep is None else cut_tokenizer(tokenizer, keep)
            variants[f"{name} + {plan}"] = prune_as_planned(model, planned, tokenizer, bars=bars), reader
        for label, (each, reader) in variants.items():
            files = weight_file_bytes(name) if label == name else None
            seen = of_same_text(inputs, first, reader)
            results.append(evaluate_model(label, each, reader, seen, bars=bars, file_bytes=files))
        del model, each, variants  # before the next one is loaded
    finish(as_json(results), output, evaluation_tables(results), run=run.get("folder"), kind="evaluate", models=models)


def profile_command(
    *models: Annotated[str, MODEL],
    options: Annotated[Given, PROFILE],
    plan: PlanFile = None,
    inputs: Inputs = None,
    run: Folder,
    loading: Loading,
    output: Measured,
) -> None:
    """Measure parameters, MACs, memory and speed.

    All models take turns in one run, so that a busy machine slows all of them alike. Without weights, a config.json
    gives the sizes.
    """
    from secateur.evaluation.profile import profile_models
    from secateur.planning.plan import read_plan
    from secateur.report.tables.profile import profile_tables

    _check_named(models, "profile")
    check_files(output.json, run=run.get("folder"))
    run_file("--inputs", inputs)
    wanted = ProfileOptions(**options)
    with progress_bars(quiet=output.quiet)("profile") as progress:
        planned = None if plan is None else read_plan(plan)
        rows = profile_models(models, wanted, plan=planned, plan_name=str(plan), loading=loading, progress=progress)
    result, folder = {"results": [row.to_json() for row in rows]}, run.get("folder")
    finish(result, output, profile_tables(rows), run=folder, kind="profile", seed=wanted.seed, models=models)


def _check_named(models: Sequence[str], command: str) -> None:
    if not models:
        raise ModelError(f"no MODEL is named: give one or more, for example secateur {command} demo")
